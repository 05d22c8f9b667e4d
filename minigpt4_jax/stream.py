"""A loader's batches on their devices, one step ahead of the step that is computed."""

import time

from minigpt4_jax import sharding
from minigpt4_jax.data.loader import Loader
from minigpt4_jax.flops import Costs, Work


class Stream:
    """Steps of `accumulate` placed batches each, and what a meter counts of them.

    Attributes:
        position: state of the loader after the batches that were given out last.
    """

    def __init__(
        self, loader: Loader, mesh, accumulate: int, costs: Costs | None = None
    ):
        """Args: costs of what a step does; None: its work is not counted."""
        self._loader, self._batches = loader, iter(loader)
        self._mesh, self._accumulate, self._costs = mesh, accumulate, costs
        self._hosts = sharding.host_part(mesh)[1]
        self._next: tuple | None = None
        self.position = loader.get_state()

    def prepare(self) -> None:
        """Fetch and place the batches of the next step, unless that is done already or
        the last step was."""
        if self._next is not None:
            return
        began = time.monotonic()
        batches = []
        for _ in range(self._accumulate):
            batch = next(self._batches, None)
            if batch is None:
                return
            batches.append(batch)
        waited = time.monotonic() - began
        placed = tuple(sharding.place_batch(batch, self._mesh) for batch in batches)
        self._next = placed, batches, waited, self._loader.get_state()

    def step(self) -> tuple[tuple[dict, ...], dict]:
        """The next step's placed batches, and counts for `Meter.step`."""
        self.prepare()
        assert self._next is not None, "a step after the loader's end"
        placed, batches, waited, self.position = self._next
        self._next = None
        names = ("examples", "answer_tokens", "tokens", "flops")
        counts = dict.fromkeys(names, 0)
        for batch in batches:
            counts["examples"] += len(batch["ok_B"])
            if self._costs is not None:
                work = Work.of(batch)
                counts["answer_tokens"] += work.answers
                counts["tokens"] += work.tokens
                counts["flops"] += self._costs(work)
        # Other hosts' parts are as large, but for a few tokens.
        return placed, {k: n * self._hosts for k, n in counts.items()} | {
            "waited": waited
        }

    @property
    def bad(self) -> int:
        """Examples so far whose image was unreadable, in this process."""
        return sum(self.position["bad"].values())

    def close(self) -> None:
        self._loader.close()
