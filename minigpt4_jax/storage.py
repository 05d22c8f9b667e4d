"""Weights onto disk: converted directories and trainables, each whole or not there.

Arrays by parameter path in, the files that checkpoint.py reads out.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.locate import FORMAT, INDEX, TRAINABLES
from minigpt4_jax.models.minigpt4 import MiniGPT4Config

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 * 10**9


def save_directory(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    config: MiniGPT4Config,
    tokenizer_files: Mapping[str, bytes],
    manifest: Mapping[str, Any],
) -> None:
    """Writes a converted directory that appears under its name only when it is whole.

    Args:
        path: must not exist; if another process made it meanwhile, that one stays.
        arrays: parameters by path, in the dtypes to be stored.
        manifest: what the caller knows of the sources; sizes and counts are added.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    need, free = _bytes(arrays), shutil.disk_usage(path.parent).free
    if free < need + 2**20:
        raise CheckpointError(
            f"{path}: needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make "
            "room or name another place"
        )
    with _whole(path) as folder:
        weight_map = write_shards(folder, arrays, "model", SHARD_BYTES)
        about = {"format": FORMAT, "total_size": need}
        index = {"metadata": about, "weight_map": weight_map}
        preset = {"format": FORMAT, **config.to_dict()}
        for name, values in ((INDEX, index), ("preset.json", preset)):
            _write(folder / name, _json(values))
        for name, data in tokenizer_files.items():
            _write(folder / name, data)
        written = {
            "format": FORMAT,
            **manifest,
            "parameters": sum(array.size for array in arrays.values()),
            "dtypes": {name: str(array.dtype) for name, array in arrays.items()},
            "files": {f.name: f.stat().st_size for f in sorted(folder.glob("model-*"))},
        }
        _write(folder / "manifest.json", _json(written))


def save_trainables(workdir: str | Path, params: Mapping[str, Any]) -> None:
    """Writes a run's trainables by path; the file before stays until this one is whole."""
    arrays = {name: np.asarray(value) for name, value in params.items()}
    write_safetensors(Path(workdir) / TRAINABLES, arrays)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One file that replaces the one before only when it is whole and on disk."""
    part = path.with_name(f".{path.name}.part")
    part.touch()
    mode = part.stat().st_mode
    save_file(dict(arrays), part, metadata={"format": str(FORMAT)})
    part.chmod(mode)  # safetensors makes files private; the umask decides
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def write_shards(
    folder: Path, arrays: Mapping[str, np.ndarray], name: str, limit: int
) -> dict[str, str]:
    """Files `name-00001-of-0000N.safetensors` of about `limit` bytes; file by path."""
    shards: list[list[str]] = []
    size = 0
    for path in sorted(arrays):
        if not shards or size + arrays[path].nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(path)
        size += arrays[path].nbytes
    weight_map = {}
    for number, paths in enumerate(shards, start=1):
        file = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {path: arrays[path] for path in paths})
        weight_map |= dict.fromkeys(paths, file)
    return weight_map


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is renamed to it at the end, or removed."""
    ours = f"{socket.gethostname()}-{os.getpid()}"
    _remove_leftovers(path)
    folder = path.with_name(f".{path.name}.part-{ours}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        _sync(folder)
        try:
            os.rename(folder, path)
        except OSError:
            if not (path / "manifest.json").exists():
                raise
            logger.info("%s was made by another process meanwhile", path)
        _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Unfinished folders of processes of this machine that are no more."""
    if os.name == "nt":
        return  # there, asking whether a process lives would end it
    prefix = f".{path.name}.part-{socket.gethostname()}-"
    for old in path.parent.glob(f"{prefix}*"):
        try:
            os.kill(int(old.name.removeprefix(prefix)), 0)
        except ProcessLookupError:
            shutil.rmtree(old, ignore_errors=True)
        except (ValueError, OSError):
            continue


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _bytes(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())
