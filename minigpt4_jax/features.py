"""Frozen features on disk: each photo's patches, computed once and trained from.

What lies before the first trainable module never changes in a run and the transform is
deterministic, so an epoch need not see the ViT again.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from minigpt4_jax import sharding
from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.sources import TarShards
from minigpt4_jax.errors import ConfigError, DataError, InputError
from minigpt4_jax.models.minigpt4 import MiniGPT4

logger = logging.getLogger(__name__)

BATCH = 16
SAVE_EVERY = 20  # batches


def check_frozen(paths: Iterable[str]) -> None:
    """Raise ConfigError when what makes the patches is among the trainable `paths`."""
    found = [path for path in paths if path.startswith(("vit/", "ln_vision/"))]
    if found:
        raise ConfigError(
            f"config.trainable: got {found[0]}; training reads features that the ViT "
            "made once, so vit and ln_vision have to stay frozen"
        )


def patches(
    model: MiniGPT4, examples: TarShards, folder: Path, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """Patches of all examples, float16 [examples P E] mapped from a file in `folder`.

    The file's name is a hash of the frozen weights, the pixel rules and the shards, so
    features of other weights or data are never read. An interrupted run goes on where
    it stopped.

    Raises:
        DataError: an image cannot be decoded, or its features are not finite in float16.
    """
    key = _key(model, examples)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"patches-{key}.npy"
    with _alone(folder):
        if not done.exists():
            _extract(model, examples, done, mesh)
    return np.load(done, mmap_mode="r")


def _extract(model: MiniGPT4, examples: TarShards, done: Path, mesh) -> None:
    """Write the patches to `done`, through a file that an interruption leaves behind."""
    part, count = done.with_suffix(".part"), done.with_suffix(".count")
    shape = (len(examples), model.cfg.vit.num_patches, model.cfg.vit.width)
    start = _count(count) if part.exists() else 0
    out = np.lib.format.open_memmap(
        part, "r+" if start else "w+", dtype=np.float16, shape=shape
    )
    parts = sharding.batch_parts(mesh)
    batch = -(-BATCH // parts) * parts
    for i in tqdm(range(start, len(examples), batch), "features", disable=None):
        rows = range(i, min(i + batch, len(examples)))
        pixels = [_pixels(model, examples, j) for j in rows]
        pixels += [pixels[-1]] * (batch - len(pixels))  # one compiled shape
        placed = sharding.place_batch({"pixels_BHWC": np.stack(pixels)}, mesh)
        features_BPE = np.asarray(_encode(model, placed["pixels_BHWC"]))[: len(rows)]
        with np.errstate(over="ignore"):  # refused below, by name
            out[rows.start : rows.stop] = features_BPE
        _refuse_infinite(out, examples, rows)
        if (i // batch) % SAVE_EVERY == SAVE_EVERY - 1:
            out.flush()
            _write_count(count, rows.stop)
    out.flush()
    os.replace(part, done)
    count.unlink(missing_ok=True)
    logger.info("features of %d photos: %s", len(examples), done)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process at the latest: runs share it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run that makes features in %s", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@nnx.jit
def _encode(model: MiniGPT4, pixels_BHWC):
    return model.encode_patches(pixels_BHWC)


def _pixels(model: MiniGPT4, examples: TarShards, i: int) -> np.ndarray:
    try:
        return preprocess(read_image(examples[i].image), model.cfg.vit)
    except InputError as error:
        raise DataError(f"photo {examples.keys[i]}: {error}") from error


def _refuse_infinite(out, examples: TarShards, rows: range) -> None:
    for i in rows:
        if not np.isfinite(out[i]).all():
            raise DataError(
                f"photo {examples.keys[i]}: features are not finite in float16; are the "
                "frozen weights whole and of this preset?"
            )


def _count(path: Path) -> int:
    """How many examples an interrupted run is known to have finished."""
    return int(path.read_text()) if path.exists() else 0


def _write_count(path: Path, count: int) -> None:
    new = path.with_suffix(".count-new")
    new.write_text(str(count))
    os.replace(new, path)


def _key(model: MiniGPT4, examples: TarShards) -> str:
    """Hash of all that the features depend on."""
    digest = hashlib.sha256()
    digest.update(json.dumps(model.cfg.to_dict()["vit"], sort_keys=True).encode())
    for part in (model.vit, model.ln_vision):
        for leaf in jax.tree.leaves(nnx.state(part)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
    for path in examples.paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update("\n".join(examples.keys).encode())
    return digest.hexdigest()[:16]
