"""Arrays in other float dtypes, and whether their values are numbers at all."""

import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another float dtype, by XLA: numpy takes far longer for 16 bits."""
    if array.dtype == dtype:
        return array
    if array.dtype.itemsize > 4:  # JAX would round float64 twice
        return array.astype(dtype)
    return np.asarray(jnp.asarray(array).astype(dtype))


def finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, told by the exponent's bits: all ones."""
    info = jnp.finfo(array.dtype)
    word = np.dtype(f"uint{info.bits}")
    mask = word.type((2**info.nexp - 1) << info.nmant)
    bits = array.reshape(-1).view(word)
    step = 1 << 22  # so that a few megabytes of masks are made, not gigabytes
    return all(
        (bits[i : i + step] & mask).max() != mask for i in range(0, bits.size, step)
    )


def widest(dtypes: Iterable[Any]) -> np.dtype:
    """The dtype that holds each of these exactly: norms may be stored in several."""
    return np.dtype(functools.reduce(jnp.promote_types, dtypes))
