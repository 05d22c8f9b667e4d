"""Frozen features on disk: each photo's patches, computed once and trained from.

What lies before the first trainable module never changes in a run and the transform is
deterministic, so an epoch need not see the ViT again.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.sources import TarShards
from minigpt4_jax.models.minigpt4 import MiniGPT4

logger = logging.getLogger(__name__)


def patches(model: MiniGPT4, examples: TarShards, folder: Path, batch: int = 16):
    """Patches of all examples, float16 [examples P E] mapped from a file in `folder`.

    The file's name is a hash of the frozen weights, the pixel rules and the shards, so
    features of other weights or data are never read. An interrupted run goes on where
    it stopped. An image that cannot be decoded raises InputError.
    """
    key = _key(model, examples)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"patches-{key}.npy"
    if done.exists():
        return np.load(done, mmap_mode="r")
    part, count = folder / f"patches-{key}.part", folder / f"patches-{key}.count"
    shape = (len(examples), model.cfg.vit.num_patches, model.cfg.vit.width)
    start = int(count.read_text()) if count.exists() and part.exists() else 0
    out = np.lib.format.open_memmap(
        part, "r+" if start else "w+", dtype=np.float16, shape=shape
    )
    encode = nnx.jit(lambda model, pixels_BHWC: model.encode_patches(pixels_BHWC))
    for i in tqdm(range(start, len(examples), batch), "features", disable=None):
        rows = range(i, min(i + batch, len(examples)))
        pixels = [
            preprocess(read_image(examples[j].image), model.cfg.vit) for j in rows
        ]
        pixels += [pixels[-1]] * (batch - len(pixels))  # one compiled shape
        features_BPE = encode(model, jnp.asarray(np.stack(pixels)))
        out[rows.start : rows.stop] = np.asarray(features_BPE)[: len(rows)]
        if (i // batch) % 20 == 19:
            out.flush()
            count.write_text(str(rows.stop))
    out.flush()
    os.replace(part, done)
    count.unlink(missing_ok=True)
    logger.info("features of %d photos: %s", len(examples), done)
    return np.load(done, mmap_mode="r")


def _key(model: MiniGPT4, examples: TarShards) -> str:
    """Hash of all that the features depend on."""
    digest = hashlib.sha256()
    digest.update(json.dumps(model.cfg.to_dict()["vit"], sort_keys=True).encode())
    for part in (model.vit, model.ln_vision):
        for leaf in jax.tree.leaves(nnx.state(part)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
    for path in examples.paths:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
    digest.update("\n".join(examples.keys).encode())
    return digest.hexdigest()[:16]
