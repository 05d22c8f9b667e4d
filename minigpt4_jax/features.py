"""Frozen features on disk: what lies before the first trainable module, made once.

It never changes in a run and the transform of an image is deterministic, so an epoch
need not see the ViT again, nor the Q-Former where the projector alone is trained.
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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from minigpt4_jax import alive, checkpoint, sharding, storage
from minigpt4_jax.data.images import read_image, squash
from minigpt4_jax.data.sources import Examples
from minigpt4_jax.errors import ConfigError, DataError, InputError
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4_jax.models.vit import normalise

logger = logging.getLogger(__name__)

BATCH = 16
SAVE_EVERY = 20  # batches


def frozen_part(cfg: MiniGPT4Config, trainable: Iterable[str]) -> str:
    """What a batch needs of its images, given the trainable parameter paths.

    "queries" (Q-Former outputs) where nothing before the projector is trained,
    "patches" (of the ViT, after ln_vision) where the Q-Former is or there is none,
    "pixels" where the ViT is.
    """
    towers = {path.partition("/")[0] for path in trainable}
    if towers & {"vit", "ln_vision"}:
        return "pixels"
    return "patches" if "qformer" in towers or cfg.qformer is None else "queries"


def make(
    model: MiniGPT4,
    part: str,
    dtype: str,
    towers: str,
    examples: Examples,
    folder: Path,
    mesh: jax.sharding.Mesh,
) -> Path:
    """The file with `part` ("patches" or "queries") of all examples, made if absent.

    Its name is a hash of the frozen weights, the pixel rules and the data, so features
    of others are never read. An interrupted run goes on where it stopped. An image that
    cannot be decoded has NaN for its first value.

    Args:
        dtype: float32 as computed, or a half of the disk: float16, bfloat16 (rounded).
        towers: their `towers_digest`; one for all data sets, as it reads every weight.

    Raises:
        CheckpointError: no room.
        ConfigError: several processes would have to make it.
        DataError: features that are not finite in `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = _key(model.cfg, part, dtype, towers, examples.digest)
    done = folder / f"{part}-{key}.npy"
    with _alone(folder):
        if not done.exists():
            if jax.process_count() > 1:
                raise ConfigError(
                    f"config.cache: {done} is absent and several processes would have "
                    "to make it; start once on one process, or set cache.dtype=''"
                )
            _extract(model, part, np.dtype(getattr(jnp, dtype)), examples, done, mesh)
    return done


def _extract(
    model: MiniGPT4, part: str, dtype: np.dtype, examples: Examples, done: Path, mesh
) -> None:
    """Write features to `done`, through a file that an interruption leaves behind."""
    partial, count = done.with_suffix(".part"), done.with_suffix(".count")
    cfg = model.cfg
    if part == "queries":
        shape = (len(examples), cfg.num_slots, cfg.projector_width)
    else:
        shape = (len(examples), cfg.vit.num_patches, cfg.vit.width)
    start = _count(count) if partial.exists() else 0
    if not start:
        need = int(np.prod(shape)) * dtype.itemsize
        storage.check_room(
            done, need, "name another cache.folder, or set cache.dtype=''"
        )
    stored = np.dtype(np.uint16) if dtype.kind == "V" else dtype  # bfloat16: its bits
    out = np.lib.format.open_memmap(
        partial, "r+" if start else "w+", dtype=stored, shape=shape
    )
    parts = sharding.batch_parts(mesh)
    batch = -(-BATCH // parts) * parts
    bad = 0
    for i in tqdm(range(start, len(examples), batch), part, disable=None):
        rows = range(i, min(i + batch, len(examples)))
        images = [_image(model, examples, j) for j in rows]
        blank = np.zeros((cfg.vit.image_size,) * 2 + (3,), np.uint8)
        stack = [blank if image is None else image for image in images]
        stack += [blank] * (batch - len(stack))  # one compiled shape
        placed = sharding.place_batch({"pixels_BHWC": np.stack(stack)}, mesh)
        features = _encode(model, placed["pixels_BHWC"], part == "queries")
        with np.errstate(over="ignore"):  # refused below, by name
            values = np.asarray(features)[: len(rows)].astype(dtype)
        for j, (row, image) in enumerate(zip(values, images, strict=True)):
            _refuse_infinite(row, examples, rows[j])
            if image is None:
                row.flat[0], bad = np.nan, bad + 1
        out[rows.start : rows.stop] = values.view(stored)
        alive.sign()
        if (i // batch) % SAVE_EVERY == SAVE_EVERY - 1:
            out.flush()
            _write_count(count, rows.stop)
    out.flush()
    os.replace(partial, done)
    count.unlink(missing_ok=True)
    logger.info(
        "%s of %d photos, %d of them unreadable: %s", part, len(examples), bad, done
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process at the latest: runs share it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run that makes features in %s", folder)
            alive.lock(handle)
        yield
    finally:
        os.close(handle)


@nnx.jit(static_argnums=2)
def _encode(model: MiniGPT4, pixels_BHWC, to_queries: bool):
    patches_BPE = model.encode_patches(normalise(pixels_BHWC, model.cfg.vit))
    return model.qformer(patches_BPE) if to_queries else patches_BPE


def _image(model: MiniGPT4, examples: Examples, i: int) -> np.ndarray | None:
    try:
        return squash(read_image(examples.image(i)), model.cfg.vit)
    except InputError as error:
        logger.warning("%s: %s", examples.where(i), error)
        return None


def _refuse_infinite(row: np.ndarray, examples: Examples, i: int) -> None:
    if not np.isfinite(row).all():
        raise DataError(
            f"{examples.where(i)}: features are not finite in {row.dtype}; are the "
            "frozen weights whole and of this preset? Or set cache.dtype='float32'"
        )


def _count(path: Path) -> int:
    """How many examples an interrupted run is known to have finished."""
    return int(path.read_text()) if path.exists() else 0


def _write_count(path: Path, count: int) -> None:
    new = path.with_suffix(".count-new")
    new.write_text(str(count))
    os.replace(new, path)


def towers_digest(model: MiniGPT4, part: str) -> str:
    """Hash of the frozen weights that make `part`."""
    towers = ["vit", "ln_vision"]
    if part == "queries":
        towers.append("qformer")
    digest = hashlib.sha256()
    shapes = checkpoint.parameter_shapes(model.cfg)
    state = nnx.state(model)
    for tower in towers:
        for path, leaf in nnx.to_flat_state(state[tower]):
            name = "/".join(map(str, (tower, *path)))
            x = sharding.released(name, sharding.fetch(leaf[...]), shapes.get(name))
            digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def _key(cfg: MiniGPT4Config, part: str, dtype: str, towers: str, data: str) -> str:
    """Hash of all that the features depend on."""
    values = cfg.to_dict()
    own = [values["vit"], part == "queries" and values["qformer"]]
    facts = json.dumps([part, dtype, own, towers, data], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
