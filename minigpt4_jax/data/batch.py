"""One host's part of a step: picks -> arrays and images, laid out in one block of memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minigpt4_jax.data.plan import Plan
from minigpt4_jax.errors import DataError, InputError

ALIGNED = 64  # bytes; where arrays begin, so that JAX need not copy them on a CPU

MakeArrays = Callable[[int, np.ndarray], dict[str, np.ndarray]]
Read = Callable[[int, int], np.ndarray]
Bad = tuple[int, int, str]  # source, example, reason


@dataclass(frozen=True)
class Contents:
    """What lies where in a block, and which examples are bad."""

    arrays: list[tuple[str, np.dtype, tuple[int, ...], int]]  # name, ..., shape, offset
    bad: list[Bad]

    def views(self, block: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: block[at : at + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .reshape(shape)
            for name, dtype, shape, at in self.arrays
        }


class MakeBatch:
    """Makes batches of one host; Loader says what of (data/loader.py)."""

    def __init__(
        self,
        plan: Plan,
        make_arrays: MakeArrays,
        read: Read,
        image: str,
        blank: np.ndarray,
        part: tuple[int, int],
    ):
        assert 0 <= part[0] < part[1] and plan.batch_size % part[1] == 0, part
        self.plan, self.make_arrays, self.read = plan, make_arrays, read
        self.image, self.blank, self.part = image, blank, part

    def __call__(
        self, step: int, take: Callable[[int], tuple[Any, np.ndarray]]
    ) -> tuple[Any, Contents]:
        """The block of a step's batch and its contents.

        Args:
            take: bytes -> how a block of that size is called, and the block.
        """
        picks = self.plan.picks(step)
        arrays = self.make_arrays(step, picks)
        own = self._cut(picks[arrays.pop("order_B", slice(None))])
        arrays = {
            name: self._cut(array) if name.rpartition("_")[2][0] in "BR" else array
            for name, array in arrays.items()
        }
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        shapes[self.image] = self.blank.dtype, (len(own), *self.blank.shape)
        shapes["ok_B"] = np.dtype(np.float32), (len(own),)
        contents, size = Contents([], []), 0
        for name, (dtype, shape) in shapes.items():
            contents.arrays.append((name, dtype, shape, size))
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        called, block = take(size)
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
        return called, contents

    def _cut(self, array: np.ndarray) -> np.ndarray:
        k, n = self.part
        assert len(array) % n == 0, f"{len(array)} rows for {n} hosts"
        size = len(array) // n
        return array[k * size : (k + 1) * size]
