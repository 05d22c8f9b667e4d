"""Batches of a plan, read and decoded ahead by Grain: steps -> dicts of numpy arrays.

A batch is a pure function of its step, so the position is all the state there is, and a
process that dies or hangs costs nothing but time: the loader begins anew where it is.
"""

import contextlib
import logging
import math
import multiprocessing.spawn
import os
import queue
import shutil
import signal
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from minigpt4_jax.data import loader_worker
from minigpt4_jax.data.images import PixelRules, read_image, squash
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.errors import DataError, InputError

logger = logging.getLogger(__name__)

RETRIES = 3  # in a row
PATIENCE = 100  # batches after which a recovery is forgiven
START_S = 60  # that the first batch of a process may take at least
ALIGNED = 64  # bytes; where arrays begin, so that JAX need not copy them on a CPU
FEW = 1_000  # examples, of which the budget's share may be bad at first

MakeArrays = Callable[[int, np.ndarray], dict[str, np.ndarray]]
Read = Callable[[int, int], np.ndarray]


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
    """Iterator over the batches of steps start..stop.

    A batch is what `make_arrays` gives for the step and its picks, and beside it `image`,
    stacked from what `read` gives, and ok_B float32: 0 where an image was not readable
    and zeros stand in its place, so that all hosts take the same steps.

    Args:
        make_arrays: arrays of the whole batch over all hosts. Those with a suffix that
            begins with B or R are cut to this host's part, others stay whole.
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
        start: int = 0,
        stop: int,
        part: tuple[int, int] = (0, 1),
        workers: int = 2,
        prefetch: int = 2,
        limit_s: float = 120,
        budget: float = 0.01,
    ):
        self.make = _MakeBatch(
            plan, make_arrays, read, image, blank, part, reuse=workers > 0
        )
        self.sources, self.plan = sources, plan
        self.step, self.stop = start, stop
        self.workers, self.prefetch = workers, prefetch
        self.limit_s, self.budget = limit_s, budget
        self.seen, self.bad = 0, Counter[str]()
        self._ahead: _Ahead | None = None
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
                self._ahead = _Ahead(self.make, steps, self.workers, self.prefetch)
            try:
                batch, bad = self._ahead.get(self.limit_s)
                break
            except _Lost as lost:
                self.close(kill=True)
                self._recover(lost)
            except Exception:
                self.close()
                raise
        self.step += 1
        self._count(len(batch["ok_B"]), bad)
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, for JSON."""
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a position, of a loader with whatever hosts and workers."""
        self.close()
        self.step = int(state["step"])

    def close(self, kill: bool = False) -> None:
        """End the workers; the next batch would start new ones."""
        if self._ahead is not None:
            self._ahead.close(kill)
            self._ahead = None

    def _recover(self, lost: "_Lost") -> None:
        recent = [step for step in self._failed_at if step > self.step - PATIENCE]
        self._failed_at = [*recent, self.step]
        if len(recent) >= RETRIES:
            raise DataError(
                f"step {self.step}: {lost}, {len(recent) + 1} times in a row; is the "
                "disk reachable and memory enough (of /dev/shm too)? "
                "config.loader.limit_s is how long a batch may take"
            ) from lost
        logger.warning("step %d: %s; loading begins anew there", self.step, lost)

    def _count(self, examples: int, bad: list[tuple[int, int, str]]) -> None:
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


@dataclass(frozen=True)
class _Contents:
    """What lies where in a batch's one block of memory, and which examples are bad."""

    arrays: list[tuple[str, np.dtype, tuple[int, ...], int]]  # ..., shape, offset
    bad: list[tuple[int, int, str]]  # source, example, reason

    def views(self, block: np.ndarray) -> dict[str, np.ndarray]:
        block = np.asarray(block)  # the base class of Grain's shared memory
        return {
            name: block[at : at + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .reshape(shape)
            for name, dtype, shape, at in self.arrays
        }


class _MakeBatch:
    """Step -> block and _Contents of one host's batch; runs in the workers.

    `reuse`: Grain copies the block of a process into shared memory before it asks for the
    next, so that one block will do. A fresh one costs a page fault for every 4 kB.
    """

    def __init__(self, plan, make_arrays, read, image, blank, part, reuse):
        assert 0 <= part[0] < part[1], part
        self.plan, self.make_arrays, self.read = plan, make_arrays, read
        self.image, self.blank, self.part = image, blank, part
        self.reuse, self.block = reuse, np.empty(0, np.uint8)

    def __call__(self, step: int) -> dict[str, Any]:
        picks = self.plan.picks(step)
        own = self._cut(picks)
        arrays = {
            name: self._cut(array) if name.rpartition("_")[2][0] in "BR" else array
            for name, array in self.make_arrays(step, picks).items()
        }
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        shapes[self.image] = self.blank.dtype, (len(own), *self.blank.shape)
        shapes["ok_B"] = np.dtype(np.float32), (len(own),)
        contents, size = _Contents([], []), 0
        for name, (dtype, shape) in shapes.items():
            contents.arrays.append((name, dtype, shape, size))
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        block = self.block if len(self.block) == size else np.empty(size, np.uint8)
        if self.reuse:
            self.block = block
        batch = contents.views(block)
        for name, array in arrays.items():
            batch[name][...] = array
        images, ok_B = batch[self.image], batch["ok_B"]
        ok_B[...] = 1
        for b, (source, _, example) in enumerate(own.tolist()):
            try:
                images[b] = self.read(source, example)
            except (InputError, DataError) as error:
                images[b], ok_B[b] = self.blank, 0
                contents.bad.append((source, example, str(error)[:300]))
        return {"block": block, "contents": contents}

    def _cut(self, array: np.ndarray) -> np.ndarray:
        k, n = self.part
        assert len(array) % n == 0, f"{len(array)} rows for {n} hosts"
        size = len(array) // n
        return array[k * size : (k + 1) * size]


class _Lost(Exception):
    """The workers do not go on."""


class _Ahead:
    """One attempt: Grain's iterator over the steps, drawn from by a thread."""

    def __init__(self, make: _MakeBatch, steps: range, workers: int, prefetch: int):
        for name in flags.FLAGS:
            if name.startswith(
                "grain_"
            ):  # else none may be asked for before all are read
                flags.FLAGS[name].present = True
        pids = Path(tempfile.mkdtemp(prefix="minigpt4-loader-"))
        dataset = grain.MapDataset.range(steps.start, steps.stop).map(make)
        if workers:
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            prefetched = dataset.to_iter_dataset(options).mp_prefetch(
                grain.MultiprocessingOptions(workers, prefetch),
                worker_init_fn=partial(loader_worker.introduce, str(pids)),
            )
        else:
            options = grain.ReadOptions(prefetch, prefetch)
            prefetched = dataset.to_iter_dataset(options)
        self._starting = workers
        self._out: queue.Queue = queue.Queue(1)
        over = threading.Event()
        args = (iter(prefetched), self._out, over)
        thread = threading.Thread(target=_draw, args=args, daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, thread, over, pids, self._out)
        self._kill = partial(_kill, pids)

    def get(self, limit_s: float) -> tuple[dict[str, np.ndarray], list]:
        """A batch and its bad examples."""
        if self._starting:  # processes of which each gives a batch in turn
            limit_s = max(limit_s, START_S)
        try:
            found = self._out.get(timeout=limit_s)
        except queue.Empty:
            raise _Lost(f"no batch in {limit_s:g} s") from None
        self._starting = max(0, self._starting - 1)
        if isinstance(found, Exception):
            if "terminated unexpectedly" in str(found):
                raise _Lost(f"a loader process ended ({_exit_code(found)})") from found
            raise found
        return found["contents"].views(found["block"]), found["contents"].bad

    def close(self, kill: bool) -> None:
        if kill and self._end.alive:
            self._kill()
        self._end()


def _draw(iterator, out: queue.Queue, over: threading.Event) -> None:
    """Put all that an iterator gives, or its exception, into `out` until it is over."""
    try:
        for found in iterator:
            if not _put(found, out, over):
                return
            del found  # shared memory; not to be held while the next one is waited for
    except Exception as error:  # told to the thread that waits
        _put(error, out, over)
    else:
        _put(RuntimeError("the loader ended before its last step"), out, over)
    finally:
        iterator.close()


def _put(found, out: queue.Queue, over: threading.Event) -> bool:
    while not over.is_set():
        with contextlib.suppress(queue.Full):
            out.put(found, timeout=0.2)
            return True
    return False


def _end(
    thread: threading.Thread, over: threading.Event, pids: Path, out: queue.Queue
) -> None:
    """End the workers, by killing those that do not go: they have nothing to save."""
    over.set()
    thread.join(2)
    if thread.is_alive():
        _kill(pids)
        thread.join(2)  # in vain if it waits for the rest of what a process was sending
    with contextlib.suppress(queue.Empty):
        out.get_nowait()  # shared memory, of which Grain could not let go at exit
    shutil.rmtree(pids, ignore_errors=True)


def _kill(pids: Path) -> None:
    for path in pids.iterdir():
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.name), signal.SIGKILL)


def _exit_code(error: Exception) -> str:
    """ "signal 9", say, of Grain's "... unexpectedly with exit code -9. ..."."""
    code = str(error).partition("exit code ")[2].partition(".")[0]
    if code == f"-{signal.SIGBUS.value}":
        return "bus error: /dev/shm is full"
    return f"signal {code[1:]}" if code.startswith("-") else f"exit code {code}"


def _without_the_program(name: str) -> dict:
    """What a new process is told; Grain's workers begin with loader_worker.py."""
    data = _preparation(name)
    if name.startswith("grain-process-prefetch"):
        data.pop("init_main_from_path", None)
        data["init_main_from_name"] = loader_worker.__name__
    return data


_preparation = multiprocessing.spawn.get_preparation_data
multiprocessing.spawn.get_preparation_data = _without_the_program
