"""Batches of a plan, read and decoded ahead by Grain: steps -> dicts of numpy arrays.

A batch is a pure function of its step, so the position is all the state there is, and a
process that dies or hangs costs nothing but time: the loader begins anew where it is.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from minigpt4_jax.data.batch import Bad, MakeArrays, MakeBatch, Read
from minigpt4_jax.data.images import PixelRules, read_image, squash
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.read_ahead import Lost, ReadAhead
from minigpt4_jax.errors import DataError

logger = logging.getLogger(__name__)

RETRIES = 3  # in a row
PATIENCE = 100  # batches after which a recovery is forgiven
FEW = 1_000  # examples, of which the budget's share may be bad at first


class Source(Protocol):
    """What is asked of a data set here (data/sources.py: Examples)."""

    def image(self, i: int) -> bytes: ...
    def where(self, i: int) -> str: ...


class ReadPixels:
    """(source, example) -> uint8 [S S 3], all that `preprocess` does before it divides."""

    def __init__(self, sources: Sequence[Source], rules: PixelRules):
        self.sources = list(sources)
        # Plain values: the preset's class would bring JAX into every worker.
        self.rules: Any = SimpleNamespace(
            image_size=rules.image_size, resize=rules.resize
        )
        self.blank = np.zeros((rules.image_size, rules.image_size, 3), np.uint8)

    def __call__(self, source: int, example: int) -> np.ndarray:
        image_HWC = read_image(self.sources[source].image(example))
        return squash(image_HWC, self.rules)


class Loader:
    """Iterator over the batches of steps 0..stop, or from where `set_state` puts it.

    A batch is what `make_arrays` gives for the step and its picks, and beside it `image`,
    stacked from what `read` gives, and ok_B float32: 0 where an image was not readable
    and zeros stand in its place, so that all hosts take the same steps.

    Args:
        make_arrays: arrays of the whole batch over all hosts. Those with a suffix that
            begins with B or R are cut to this host's part, others stay whole. order_B,
            if it is there, is the order in which they have the picks.
        read: raises InputError or DataError for a bad example.
        image: name of the array of images, as pixels_BHWC.
        blank: what stands for a bad image; shape and dtype of all.
        part: (k, n): this is host k of n.
        workers: processes; 0: threads of this one.
        prefetch: batches that each worker has ready.
        limit_s: how long a batch may take until the workers are given up.
        budget: share of bad examples at which DataError is raised.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        plan: Plan,
        make_arrays: MakeArrays,
        read: Read,
        *,
        image: str,
        blank: np.ndarray,
        stop: int,
        part: tuple[int, int] = (0, 1),
        workers: int = 2,
        prefetch: int = 2,
        limit_s: float = 120,
        budget: float = 0.01,
    ):
        self.make = MakeBatch(plan, make_arrays, read, image, blank, part)
        self.sources = sources
        self.step, self.stop = 0, stop
        self.workers, self.prefetch = workers, prefetch
        self.limit_s, self.budget = limit_s, budget
        self.seen, self.bad = 0, Counter[str]()
        self._ahead: ReadAhead | None = None
        self._failed_at: list[int] = []

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.step >= self.stop:
            self.close(kill=True)  # they have nothing left, and Grain's wait to be told
            raise StopIteration
        while True:
            if self._ahead is None:
                steps = range(self.step, self.stop)
                self._ahead = ReadAhead(self.make, steps, self.workers, self.prefetch)
            try:
                batch, bad = self._ahead.get(self.limit_s)
                break
            except Lost as lost:
                self.close(kill=True)
                self._recover(lost)
            except Exception:
                self.close()
                raise
        self.step += 1
        self._count(len(batch["ok_B"]), bad)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, and what counts against the budget, for JSON."""
        return {"step": self.step, "seen": self.seen, "bad": dict(self.bad)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a position, of a loader with whatever hosts and workers."""
        self.close()
        self.step, self.seen = state["step"], state["seen"]
        self.bad = Counter(state["bad"])

    def close(self, kill: bool = False) -> None:
        """End the workers; the next batch would start new ones."""
        if self._ahead is not None:
            self._ahead.close(kill)
            self._ahead = None

    def _recover(self, lost: "Lost") -> None:
        recent = [step for step in self._failed_at if step > self.step - PATIENCE]
        self._failed_at = [*recent, self.step]
        if len(recent) >= RETRIES:
            raise DataError(
                f"step {self.step}: {lost}, {len(recent) + 1} times in a row; is the "
                "disk reachable and memory enough (of /dev/shm too)? "
                "config.loader.limit_s is how long a batch may take"
            ) from lost
        logger.warning("step %d: %s; loading begins anew there", self.step, lost)

    def _count(self, examples: int, bad: list[Bad]) -> None:
        self.seen += examples
        for source, example, reason in bad:
            where = self.sources[source].where(example)
            logger.warning("%s: %s; counts for nothing", where, reason)
            self.bad[where.partition(": ")[0]] += 1
        total = sum(self.bad.values())
        if bad and total > self.budget * max(self.seen, FEW):
            shard, count = self.bad.most_common(1)[0]
            raise DataError(
                f"{shard}: {count} examples cannot be read, {total} of {self.seen} in "
                f"all, the last of them: {reason}; get the shard again, or allow more "
                f"than a share of {self.budget:g} (config.loader.budget)"
            )
