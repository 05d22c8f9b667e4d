"""Weights from disk into a model: converted directories and trainables of a run.

What storage.py wrote is checked before a value is read. A converted directory holds
preset.json (what the model is), manifest.json (where it came from), model-*.safetensors
with an index (keys are our parameter paths) and tokenizer files. A work directory of
train.py holds trainables.safetensors, and names the converted directory with everything
else in its config.json.
"""

import contextlib
import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from minigpt4_jax import kept, sharding
from minigpt4_jax.errors import CheckpointError, ConfigError
from minigpt4_jax.locate import (
    FORMAT,
    INDEX,
    TRAINABLES,
    base_directory,
    check_format,
    is_checkpoint,
    read_json,
    resolve,
    trainable_files,
)
from minigpt4_jax.models import quantised
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config, preset
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.storage import save_directory, save_trainables

logger = logging.getLogger(__name__)

__all__ = [
    "base_directory",
    "check",
    "load_model",
    "load_trainables",
    "open_all",
    "open_files",
    "parameter_shapes",
    "read_arrays",
    "read_config",
    "read_preset",
    "resolve",
    "settle",
    "stored_quantisation",
    "save_directory",
    "save_trainables",
    "structure",
]


def load_model(
    path: str | Path,
    dtypes: DTypes = DTypes(),
    mesh: jax.sharding.Mesh | None = None,
    *,
    absent: Sequence[str] = (),
    seed: int = 0,
    quantisation: Quantisation = Quantisation(),
) -> MiniGPT4:
    """The model of a converted directory, or of a work directory with its trainables.

    Args:
        dtypes: weights are cast to `dtypes.param`; "file" keeps each as it is stored.
        mesh: places weights by sharding.py; a device then reads only its own part.
        absent: patterns of parameter paths that the files may lack; those are drawn
            from `seed` and listed in the log.
        quantisation: what is rounded while it is read, a layer of one tensor at a time,
            so that the float weights are never held; what is stored so needs no word.

    Raises:
        CheckpointError: listing every absent, unknown and mis-shaped parameter.
        ConfigError: `quantisation` is another one than that of the files.
    """
    path = Path(path)
    config = read_config(path)
    as_stored = dtypes.param == "file"
    built = replace(dtypes, param="float32") if as_stored else dtypes
    as_written, how = stored_quantisation(path), settle(path, quantisation)
    graphdef, params = structure(config, built, as_written)
    shapes = {k: v.shape for k, (_, v) in params.items()}
    with contextlib.ExitStack() as files:
        stored = open_all(path, files)
        drawn = check(path, stored, shapes, absent)
        values: dict[str, Any] = _draw(config, built, drawn, seed)
        if how != as_written:
            graphdef, params = structure(config, built, how)
        for name, tensor in stored.items():
            if f"{name}_scale" in params.keys() - stored.keys():
                like = params[name][1], params[f"{name}_scale"][1]
                for own, rounded in _rounded(name, tensor, *like).items():
                    values[own] = jax.device_put(
                        rounded, _sharding(own, rounded.shape, mesh)
                    )
                continue
            dtype = _dtype(tensor) if as_stored else params[name][1].dtype
            values[name] = _read(
                tensor, dtype, _sharding(name, tensor.get_shape(), mesh)
            )
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


def stored_quantisation(path: str | Path) -> Quantisation:
    """How a converted directory's weights are stored, or those under a training."""
    directory = base_directory(path)
    values = read_json(directory / "manifest.json").get("quantised", {})
    try:
        return Quantisation(**values)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{directory}/manifest.json: quantised is {values!r}; convert again"
        ) from error


def settle(path: str | Path, asked: Quantisation) -> Quantisation:
    """How a model will be held: as it is stored, and what is stored as floats as asked.

    Raises ConfigError where it is stored in few bits and asked for in others.
    """
    stored = stored_quantisation(path)
    for flag, name in (("quantize", "decoder"), ("vision", "vision")):
        want, have = getattr(asked, name), getattr(stored, name)
        if have and want not in ("", have):
            raise ConfigError(
                f"{flag}={want!r}: {base_directory(path)} is stored in {have}; leave "
                f"{flag} out, or convert its files again with another --{flag}"
            )
    return replace(
        asked,
        decoder=stored.decoder or asked.decoder,
        vision=stored.vision or asked.vision,
    )


def read_preset(name_or_path: str | Path) -> MiniGPT4Config:
    """A preset by its name, or of a JSON file (the keys of any preset.json).

    Raises:
        ConfigError: an unknown name (with the nearest), or sizes that cannot be.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        return preset(str(name_or_path))
    if not path.is_file():
        raise ConfigError(f"no preset file at {path}; give one, or a preset's name")
    try:
        return MiniGPT4Config.from_dict(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_trainables(model: MiniGPT4, path: str | Path) -> list[str]:
    """Overwrites parameters of the model with those stored at `path`; returns the paths.

    Args:
        path: a .safetensors file, a work directory or one of its checkpoints, a folder
            of connector files, or a converted directory (all of it). Dtypes stay the
            model's.
    """
    path = Path(path)
    variables = {
        "/".join(map(str, p)): variable
        for p, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    with contextlib.ExitStack() as files:
        if (path / INDEX).exists():
            stored = open_all(path, files)
        else:
            stored = open_trainables(path, files)
        shapes = {name: variables[name].shape for name in stored if name in variables}
        check(path, stored, shapes, ())
        for name, tensor in stored.items():
            old = variables[name][...]
            if (old.dtype.kind in "iu") != (_dtype(tensor).kind in "iu"):
                raise CheckpointError(
                    f"{path}: {name} is {_dtype(tensor)}, and in the model {old.dtype}; "
                    "load the model without quantize, or with that of the file"
                )
            variables[name][...] = _read(tensor, old.dtype, old.sharding)
    logger.info("%d parameters from %s", len(stored), path)
    return sorted(stored)


def read_arrays(
    path: str | Path, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Exactly these parameters as they are stored.

    Args:
        path: as of `load_trainables`; a converted directory may hold others besides.

    Raises:
        CheckpointError: listing every absent, unknown and mis-shaped one.
    """
    path = Path(path)
    with contextlib.ExitStack() as files:
        if (path / INDEX).exists():
            stored = open_all(path, files)
            stored = {name: stored[name] for name in wanted if name in stored}
        else:
            stored = open_trainables(path, files)
        check(path, stored, wanted, ())
        return {name: np.asarray(tensor[...]) for name, tensor in stored.items()}


def parameter_shapes(
    config: MiniGPT4Config, quantisation: Quantisation = Quantisation()
) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a preset by path, without making any."""
    return dict(_parameter_shapes(config, quantisation))


@functools.cache  # a plan asks for hundreds of meshes
def _parameter_shapes(
    config: MiniGPT4Config, quantisation: Quantisation
) -> dict[str, tuple[int, ...]]:
    _, params = structure(config, DTypes(), quantisation)
    return {name: tuple(param.shape) for name, (_, param) in params.items()}


def structure(config: MiniGPT4Config, dtypes: DTypes, quantisation: Quantisation):
    """A model's graph, and its abstract parameters with their paths, by joined path."""

    def make():
        model = MiniGPT4(config, dtypes=dtypes, rngs=nnx.Rngs(0))
        model.quantise(quantisation)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, {
        "/".join(map(str, path)): (path, param)
        for path, param in nnx.to_flat_state(state)
    }


# Reading.


def open_all(path: Path, files: contextlib.ExitStack) -> dict[str, Any]:
    """Unread tensors of a model by path; a work directory's own ones win."""
    directory = base_directory(path)
    sizes = read_json(directory / "manifest.json").get("files", {})
    if not isinstance(sizes, dict):
        raise CheckpointError(
            f"{directory}/manifest.json is damaged: files is {sizes!r}, want sizes by "
            "name; convert again"
        )
    for name, size in sizes.items():
        got = (directory / name).stat().st_size if (directory / name).exists() else None
        if got != size:
            state = "absent" if got is None else f"{got} bytes"
            raise CheckpointError(
                f"{directory} is damaged: {name} is {state}, want {size} bytes; delete "
                "the directory and convert again"
            )
    try:
        index = json.loads((directory / INDEX).read_text())
        names, found = index["weight_map"], index["metadata"].get("format", FORMAT)
        shards = [directory / name for name in sorted(set(names.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory}: {INDEX} is absent or damaged; convert again"
        ) from error
    check_format(directory / INDEX, found)
    stored = open_files(shards, files)
    if set(names) != set(stored):
        raise CheckpointError(
            f"{directory}: its index and its shards differ in "
            f"{sorted(set(names) ^ set(stored))}; convert again"
        )
    if directory != path:
        stored |= open_trainables(path, files)
    return stored


def open_trainables(path: Path, files: contextlib.ExitStack) -> dict[str, Any]:
    """Unread tensors of a connector, a work directory or one of its checkpoints."""
    if is_checkpoint(path):
        kept.check(path, [TRAINABLES])
    return open_files(trainable_files(path), files)


def open_files(paths: Iterable[Path], files: contextlib.ExitStack) -> dict[str, Any]:
    """Unread tensors of memory-mapped files, by name."""
    stored = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is absent or damaged ({error}); convert or train again"
            ) from error
        # A file without metadata is one that another program wrote: as format 1.
        found = (file.metadata() or {}).get("format", "1")
        check_format(path, int(found) if found.isdecimal() else found)
        stored |= {name: file.get_slice(name) for name in file.keys()}
    return stored


def check(
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
_DTYPES |= {"I8": "int8", "U8": "uint8"}


def _dtype(tensor: Any) -> np.dtype:
    stored = tensor.get_dtype()
    if stored not in _DTYPES:
        raise CheckpointError(f"weights of type {stored} cannot be loaded")
    return jnp.dtype(_DTYPES[stored])


def _sharding(name: str, shape: Sequence[int], mesh: jax.sharding.Mesh | None):
    return mesh and sharding.parameter_sharding(name, tuple(shape), mesh)


def _read(tensor: Any, dtype: Any, where: Any) -> jax.Array:
    """A tensor as a jax array; each device reads the part that it will hold.

    The cast is the device's: numpy takes ten times longer from and to 16 bits.
    """
    if where is None:
        # Not jnp.asarray: on a CPU it copies, and this takes the buffer as it is.
        stored = jax.device_put(np.asarray(tensor[...]))
    else:
        stored = jax.make_array_from_callback(
            tuple(tensor.get_shape()), where, lambda index: np.asarray(tensor[index])
        )
    return stored.astype(dtype)


def _rounded(name: str, tensor: Any, like: Any, scale: Any) -> dict[str, np.ndarray]:
    """A kernel or an embedding in few bits with its scale, by the names of both.

    Args:
        like, scale: shapes and dtypes that MiniGPT4.quantise gives them.
    """
    stacked = "/blocks/" in name
    layers = like.shape[0] if stacked else 1
    made = tuple(np.empty(x.shape, x.dtype) for x in (like, scale))
    for i in range(layers):
        layer = tensor[i : i + 1] if stacked else tensor[...]
        for whole, part in zip(made, quantised.rounded(name, layer, like, scale)):
            whole.reshape(layers, -1)[i] = np.ravel(part)
    return dict(zip((name, f"{name}_scale"), made))
