"""Streamed floats -> the same in few bits, with their scales; a layer in memory at a time.

As `Generator.load(quantize=...)` rounds what was stored as floats, to the bit.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from minigpt4_jax import checkpoint
from minigpt4_jax.models import quantised
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.storage import Streamed


def in_few_bits(
    arrays: Mapping[str, Streamed], config: MiniGPT4Config, how: Quantisation
) -> dict[str, Streamed]:
    """All parameters by path, those that `how` names as whole numbers and scales."""
    _, params = checkpoint.structure(config, DTypes(), how)
    made: dict[str, Streamed] = {}
    for path, floats in arrays.items():
        if f"{path}_scale" in params:
            made |= _rounded(path, floats, params[path][1], params[f"{path}_scale"][1])
        else:
            made[path] = floats
    return made


def _rounded(path: str, floats: Streamed, like, scale) -> dict[str, Streamed]:
    """One parameter; its scales are made with its whole numbers, and kept till asked for.

    storage.write_shards asks for a path and then for path_scale, so that each layer is
    read and rounded once.
    """
    kept: list[np.ndarray] = []

    def whole() -> Iterator[np.ndarray]:
        kept.clear()
        for piece in floats.pieces():
            numbers, scales = quantised.rounded(path, piece, like, scale)
            kept.append(np.asarray(scales))
            yield np.asarray(numbers)

    def scales() -> Iterator[np.ndarray]:
        if not kept:
            for _ in whole():
                pass
        yield from kept
        kept.clear()

    return {
        path: Streamed(tuple(like.shape), np.dtype(like.dtype), whole),
        f"{path}_scale": Streamed(tuple(scale.shape), np.dtype(scale.dtype), scales),
    }
