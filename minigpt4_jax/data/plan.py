"""Which example stands where: (seed, index) -> source, epoch, example; nothing is kept.

Example g of a run is the same however many hosts, processes or examples a step there are,
and any step is found at once, so that resuming costs nothing.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from grain.experimental import index_shuffle

from minigpt4_jax.errors import DataError

SMALL = 1 << 16  # index_shuffle walks 65,536 places to find one of a few


@dataclass(frozen=True)
class Plan:
    """Sources mixed by example, each in epochs of its own.

    Of every sum(weights) examples in a row (weights without their common divisor) exactly
    weights[i] are of source i. A source shows every example exactly once in each epoch,
    in an order drawn from (seed, source, epoch).

    Args:
        sizes: examples of each source.
        weights: whole numbers from 1.
        batch_size: examples a step, over all hosts.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    seed: int
    batch_size: int

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[int], seed: int, batch_size: int
    ):
        assert len(sizes) == len(weights) > 0 and min(weights) > 0 and batch_size > 0
        if min(sizes) < 1:
            raise DataError(
                f"data sources of {', '.join(map(str, sizes))} examples; one has no "
                "example to train on"
            )
        divisor = math.gcd(*weights)
        object.__setattr__(self, "sizes", tuple(int(size) for size in sizes))
        object.__setattr__(self, "weights", tuple(w // divisor for w in weights))
        object.__setattr__(self, "seed", int(seed))
        object.__setattr__(self, "batch_size", int(batch_size))

    def picks(self, step: int) -> np.ndarray:
        """Source, epoch and example of each example of a step: int64 [B 3]."""
        return self.examples(step * self.batch_size, (step + 1) * self.batch_size)

    def examples(self, start: int, stop: int) -> np.ndarray:
        """The same for the examples start..stop of the whole run: int64 [stop-start 3]."""
        sources, uses = self._mixed(start, stop)
        picks = np.empty((stop - start, 3), np.int64)
        picks[:, 0] = sources
        for source, size in enumerate(self.sizes):
            own = np.flatnonzero(sources == source)
            epochs, places = np.divmod(uses[own], size)
            picks[own, 1] = epochs
            for epoch in np.unique(epochs):
                now = epochs == epoch
                shuffled = shuffle(size, (self.seed, source, int(epoch)), places[now])
                picks[own[now], 2] = shuffled
        return picks

    def _mixed(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each example, and how often that source was used before."""
        weights = np.array(self.weights)
        length = int(weights.sum())
        blocks = np.arange(start // length, -(-stop // length))
        places = np.arange(length, dtype=np.uint64)
        key = np.random.SeedSequence([self.seed]).generate_state(1, np.uint64)[0]
        # A hash of (seed, block, place) orders a block: a generator each would take
        # longer than all else.
        drawn = _hash(_hash(key + blocks.astype(np.uint64))[:, None] + places)
        of_place = np.repeat(np.arange(len(weights)), weights)
        sources = of_place[np.argsort(drawn, axis=1, kind="stable")]
        uses = np.empty_like(sources)
        for source, weight in enumerate(weights):
            own = sources == source
            uses[own] = (blocks[:, None] * weight + np.arange(weight)).ravel()
        cut = slice(start - blocks[0] * length, stop - blocks[0] * length)
        return sources.ravel()[cut], uses.ravel()[cut]


def shuffle(size: int, key: tuple[int, ...], places: np.ndarray) -> np.ndarray:
    """What stands at these places of a permutation of range(size) drawn from `key`."""
    if size <= SMALL:
        return _permutation(size, key)[places]
    seed = int(np.random.SeedSequence(list(key)).generate_state(1)[0])
    shuffled = [index_shuffle(place, size - 1, seed, 4) for place in places.tolist()]
    return np.array(shuffled, np.int64)


@functools.lru_cache(maxsize=64)
def _permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(list(key)).permutation(size)


def _hash(values: np.ndarray) -> np.ndarray:
    """Scrambled bits of each uint64 (the finish of splitmix64, Steele et al. 2014)."""
    assert values.dtype == np.uint64
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
