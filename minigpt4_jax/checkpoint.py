"""Weights on disk: converted directories, trainables of a training run, the demo model.

A converted directory holds preset.json (what the model is), manifest.json (where it came
from), model-*.safetensors with an index (keys are our parameter paths) and tokenizer
files. A work directory of train.py holds trainables.safetensors, and names the converted
directory with everything else in its config.json.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minigpt4_jax import sharding
from minigpt4_jax.errors import CheckpointError, ConfigError
from minigpt4_jax.locate import (
    FORMAT,
    INDEX,
    TRAINABLES,
    base_directory,
    read_json,
    resolve,
    trainable_files,
)
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 * 10**9

__all__ = [
    "base_directory",
    "load_model",
    "load_trainables",
    "parameter_shapes",
    "read_arrays",
    "read_config",
    "resolve",
    "save_directory",
    "save_trainables",
    "write_safetensors",
    "write_shards",
]


def load_model(
    path: str | Path,
    dtypes: DTypes = DTypes(),
    mesh: jax.sharding.Mesh | None = None,
    *,
    absent: Sequence[str] = (),
    preset: str | None = None,
    seed: int = 0,
) -> MiniGPT4:
    """The model of a converted directory, or of a work directory with its trainables.

    Args:
        dtypes: weights are cast to `dtypes.param`; "file" keeps each as it is stored.
        mesh: places weights by sharding.py; a device then reads only its own part.
        absent: patterns of parameter paths that the files may lack; those are drawn
            from `seed` and listed in the log.
        preset: the name the model must have, if the caller cares.

    Raises:
        CheckpointError: listing every absent, unknown and mis-shaped parameter.
    """
    path = Path(path)
    config = read_config(path)
    if preset is not None and config.name != preset:
        raise CheckpointError(
            f"{path} holds {config.name!r}, want {preset!r}; give the directory of that "
            "preset, or leave the preset out"
        )
    as_stored = dtypes.param == "file"
    built = replace(dtypes, param="float32") if as_stored else dtypes
    graphdef, wanted = nnx.split(
        nnx.eval_shape(lambda: MiniGPT4(config, dtypes=built, rngs=nnx.Rngs(0)))
    )
    params = {"/".join(map(str, p)): (p, v) for p, v in nnx.to_flat_state(wanted)}
    with contextlib.ExitStack() as files:
        stored = _open_all(path, files)
        drawn = _check(
            path, stored, {k: v.shape for k, (_, v) in params.items()}, absent
        )
        values = _draw(config, built, drawn, seed)
        for name, tensor in stored.items():
            dtype = _dtype(tensor) if as_stored else params[name][1].dtype
            values[name] = _read(tensor, dtype, _sharding(name, tensor, mesh))
    if drawn:
        logger.info("not in %s, drawn at random:\n  %s", path, "\n  ".join(drawn))
    flat = [(p, variable.replace(values[k])) for k, (p, variable) in params.items()]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    if mesh is not None:
        sharding.place(model, mesh)  # what was drawn; the rest stays where it is
    return model


def read_config(path: str | Path) -> MiniGPT4Config:
    """The preset of a converted directory, or of the one a work directory belongs to."""
    directory = base_directory(path)
    values = read_json(directory / "preset.json")
    try:
        return MiniGPT4Config.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{directory}/preset.json: {error}") from error


# Trainables.


def save_trainables(workdir: str | Path, params: Mapping[str, Any]) -> None:
    """Writes a run's trainables by path; the file before stays until this one is whole."""
    arrays = {name: np.asarray(value) for name, value in params.items()}
    write_safetensors(Path(workdir) / TRAINABLES, arrays)


def load_trainables(model: MiniGPT4, path: str | Path) -> list[str]:
    """Overwrites parameters of the model with those stored at `path`; returns the paths.

    Args:
        path: a .safetensors file, a work directory, a folder of connector files, or a
            converted directory (all of it). Dtypes stay the model's.
    """
    path = Path(path)
    variables = {
        "/".join(map(str, p)): variable
        for p, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    with contextlib.ExitStack() as files:
        if (path / INDEX).exists():
            stored = _open_all(path, files)
        else:
            stored = _open(trainable_files(path), files)
        shapes = {name: variables[name].shape for name in stored if name in variables}
        _check(path, stored, shapes, ())
        for name, tensor in stored.items():
            old = variables[name][...]
            variables[name][...] = _read(tensor, old.dtype, old.sharding)
    logger.info("%d parameters from %s", len(stored), path)
    return sorted(stored)


def read_arrays(
    path: str | Path, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Exactly these parameters as stored in a connector or work directory."""
    with contextlib.ExitStack() as files:
        stored = _open(trainable_files(Path(path)), files)
        _check(Path(path), stored, wanted, ())
        return {name: np.asarray(tensor[...]) for name, tensor in stored.items()}


def parameter_shapes(config: MiniGPT4Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a preset by path, without making any."""
    model = nnx.eval_shape(lambda: MiniGPT4(config, rngs=nnx.Rngs(0)))
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): tuple(leaf.shape) for path, leaf in leaves}


# Writing.


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
        index = {"metadata": {"total_size": need}, "weight_map": weight_map}
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


# Reading.


def _open_all(path: Path, files: contextlib.ExitStack) -> dict[str, Any]:
    """Unread tensors of a model by path; a work directory's own ones win."""
    directory = base_directory(path)
    sizes = read_json(directory / "manifest.json").get("files", {})
    for name, size in sizes.items():
        got = (directory / name).stat().st_size if (directory / name).exists() else None
        if got != size:
            state = "absent" if got is None else f"{got} bytes"
            raise CheckpointError(
                f"{directory} is damaged: {name} is {state}, want {size} bytes; delete "
                "the directory and convert again"
            )
    try:
        names = json.loads((directory / INDEX).read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory}: {INDEX} is absent or damaged; convert again"
        ) from error
    shards = [directory / name for name in sorted(set(names.values()))]
    stored = _open(shards, files)
    if set(names) != set(stored):
        raise CheckpointError(
            f"{directory}: its index and its shards differ in "
            f"{sorted(set(names) ^ set(stored))}; convert again"
        )
    if directory != path:
        stored |= _open(trainable_files(path), files)
    return stored


def _open(paths: Iterable[Path], files: contextlib.ExitStack) -> dict[str, Any]:
    """Unread tensors of memory-mapped files, by name."""
    stored = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is absent or damaged ({error}); convert or train again"
            ) from error
        stored |= {name: file.get_slice(name) for name in file.keys()}
    return stored


def _check(
    path: Path,
    stored: Mapping[str, Any],
    wanted: Mapping[str, tuple[int, ...]],
    absent: Sequence[str],
) -> list[str]:
    """Names that must be drawn, when nothing else is wrong; else one error with all."""
    lacking = [name for name in wanted if name not in stored]
    drawn = [n for n in lacking if any(re.fullmatch(p, n) for p in absent)]
    problems = [f"{name}: absent" for name in lacking if name not in drawn]
    for name, tensor in stored.items():
        got = list(tensor.get_shape())
        if name not in wanted:
            problems.append(f"{name} {got}: the model has no such parameter")
        elif got != list(wanted[name]):
            problems.append(f"{name}: got {got}, want {list(wanted[name])}")
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{path} does not fit its preset, {len(problems)} problems (weights of "
            f"another model? convert again):\n  {listed}"
        )
    return drawn


def _draw(
    config: MiniGPT4Config, dtypes: DTypes, names: Sequence[str], seed: int
) -> dict[str, jax.Array]:
    """Fresh values of some parameters; jit drops the work for all others."""
    if not names:
        return {}

    def make():
        model = MiniGPT4(config, dtypes=dtypes, rngs=nnx.Rngs(seed))
        flat = {
            "/".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model))
        }
        return {name: flat[name][...] for name in names}

    return jax.jit(make)()


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _dtype(tensor: Any) -> np.dtype:
    stored = tensor.get_dtype()
    if stored not in _DTYPES:
        raise CheckpointError(f"weights of type {stored} cannot be loaded")
    return jnp.dtype(_DTYPES[stored])


def _sharding(name: str, tensor: Any, mesh: jax.sharding.Mesh | None):
    if mesh is None:
        return None
    return sharding.parameter_sharding(name, tuple(tensor.get_shape()), mesh)


def _read(tensor: Any, dtype: Any, where: Any) -> jax.Array:
    """A tensor as a jax array; each device reads the part that it will hold."""
    shape = tuple(tensor.get_shape())
    if where is None:
        # Not jnp.asarray: on a CPU it copies, and this takes the buffer as it is.
        return jax.device_put(np.asarray(tensor[...]).astype(dtype, copy=False))

    def part(index):
        return np.asarray(tensor[index]).astype(dtype, copy=False)

    return jax.make_array_from_callback(shape, where, part)
