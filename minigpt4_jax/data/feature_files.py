"""Frozen features on disk as arrays that a loader reads row by row; no jax.

features.py makes them. A file holds one data set, an example a row, in the order of its
index. bfloat16, which numpy cannot map, is stored as its bits.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minigpt4_jax.errors import InputError


class FeatureFiles:
    """Rows of several mapped files; picklable, so that loader processes can have it.

    Attributes:
        blank: zeros of a row's shape and dtype.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype):
        """Args: paths, one a source of the plan; dtype that the rows are of."""
        self.paths = list(paths)
        self.dtype = dtype
        self._open()
        self.blank = np.zeros(self._files[0].shape[1:], dtype)

    def __call__(self, source: int, example: int) -> np.ndarray:
        """Features of one example; raises InputError where its image was unreadable."""
        row = self._files[source][example].view(self.dtype)
        if np.isnan(row.flat[0]):  # features.py refuses all other NaNs
            raise InputError(
                f"{self.paths[source]}: the image of example {example} was unreadable "
                "when features were made"
            )
        return row

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "dtype": self.dtype, "blank": self.blank}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._open()

    def _open(self) -> None:
        self._files = [np.load(path, mmap_mode="r") for path in self.paths]
