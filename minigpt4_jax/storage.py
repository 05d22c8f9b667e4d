"""Weights onto disk: converted directories and trainables, each whole or not there.

Arrays by parameter path in, the files that checkpoint.py reads out. An array may be
`Streamed`: then no more than a piece of it is in memory.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.locate import FORMAT, INDEX, TRAINABLES
from minigpt4_jax.models.minigpt4 import MiniGPT4Config

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHARD_BYTES = 4 * 10**9
DTYPES = {  # numpy's names -> those of the safetensors format
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}


@dataclass(frozen=True)
class Streamed:
    """An array that is made while it is written.

    pieces: its consecutive parts along the first axis, contiguous, of its dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


Arrays = Mapping[str, np.ndarray | Streamed]


def save_directory(
    path: str | Path,
    arrays: Arrays,
    config: MiniGPT4Config,
    tokenizer_files: Mapping[str, bytes],
    manifest: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
) -> None:
    """Writes a converted directory that appears under its name only when it is whole.

    Args:
        path: must not exist; if another process made it meanwhile, that one stays.
        arrays: parameters by path, in the dtypes to be stored.
        manifest: what the caller knows of the sources, or a function that returns it
            when the weights are written; sizes and counts are added.
    """
    path = Path(path)
    need = _bytes(arrays)
    check_room(path, need)
    with whole(path) as folder:
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
            **(manifest() if callable(manifest) else manifest),
            "parameters": sum(array.size for array in arrays.values()),
            "dtypes": {name: str(array.dtype) for name, array in arrays.items()},
            "files": {f.name: f.stat().st_size for f in sorted(folder.glob("model-*"))},
        }
        _write(folder / "manifest.json", _json(written))


def check_room(
    path: Path, need: int, advice: str = "make room or name another place"
) -> None:
    """Raise CheckpointError unless `need` bytes fit beside `path`; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < need + 2**20:
        raise CheckpointError(
            f"{path}: needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {advice}"
        )


def save_trainables(workdir: str | Path, params: Mapping[str, Any]) -> None:
    """Writes a run's trainables by path; the file before stays until this one is whole."""
    arrays = {name: np.asarray(value) for name, value in params.items()}
    write_safetensors(Path(workdir) / TRAINABLES, arrays)


def write_safetensors(
    path: Path,
    arrays: Arrays,
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """One file that replaces the one before only when it is whole and on disk.

    The format is written here, since its library wants every array whole in memory.

    Args:
        arrays: their values are asked for in this order.
        metadata: strings for its header; default our format's number.
        advance: is told of bytes as they are written.
    """
    # Wide dtypes first, so that every array starts at a multiple of its width.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata or {"format": str(FORMAT)}}
    starts, end = {}, 0
    for name in order:
        starts[name] = start = end
        end += arrays[name].nbytes
        header[name] = {
            "dtype": DTYPES[str(arrays[name].dtype)],
            "shape": list(arrays[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first, written = file.tell(), dict.fromkeys(arrays, 0)
        every = ((n, piece) for n in arrays for piece in _pieces(arrays[n]))
        for name, piece in _ahead(every):
            assert piece.dtype == arrays[name].dtype, name
            file.seek(first + starts[name] + written[name])
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
            written[name] += piece.nbytes
            advance(piece.nbytes)
        assert all(written[name] == arrays[name].nbytes for name in arrays)
    replace(part, path)


def replace(part: Path, path: Path) -> None:
    """Renames a finished file, when it is on disk, to the name it is to have."""
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def _pieces(array: np.ndarray | Streamed) -> Iterable[np.ndarray]:
    return array.pieces() if isinstance(array, Streamed) else [array]


def _ahead(values: Iterator[T]) -> Iterator[T]:
    """The same values; the next is made while the caller deals with this one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, values, None)
        while (value := coming.result()) is not None:
            coming = pool.submit(next, values, None)
            yield value


def write_shards(
    folder: Path,
    arrays: Arrays,
    name: str,
    limit: int,
    metadata: Mapping[str, str] | None = None,
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
    total = dict(total=_bytes(arrays), unit="B", unit_scale=True, disable=None)
    with tqdm(desc="writing", **total) as bar:
        for number, paths in enumerate(shards, start=1):
            file = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
            one = {path: arrays[path] for path in paths}
            write_safetensors(folder / file, one, metadata, bar.update)
            weight_map |= dict.fromkeys(paths, file)
    return weight_map


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
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


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
