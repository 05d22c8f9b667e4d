"""A file or folder of published weights -> its tensors by name, none of them read.

What a path is follows from what lies there: a torch file, safetensors, GGUF, a Hugging
Face folder (index and shards), or Meta's folder of `consolidated.*.pth`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import torch_files
from convert.tensors import Tensor
from minigpt4_jax.errors import CheckpointError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass
class Source(Mapping):
    """Tensors by name, with what stands beside them.

    Attributes:
        path: what the user named.
        tensors: values are `Tensor`s.
        files: every file of weights that was opened.
        config: config.json, params.json, or a GGUF file's metadata; {} without one.
    """

    path: Path
    tensors: Mapping[str, Any]
    files: list[Path]
    config: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read(path: str | Path) -> Source:
    """The tensors at a path; raises CheckpointError when it is nothing we can read."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise CheckpointError(f"no file or folder at {path}; is the path right?")
    tensors = _file(path)
    return Source(path, tensors, [path], getattr(tensors, "metadata", {}))


def _file(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".gguf":
        from convert.gguf_files import GGUFFile  # here: gguf is needed for these alone

        return GGUFFile(path)
    return torch_files.read(path)


def _folder(path: Path) -> Source:
    if sorted(path.glob("consolidated.*.pth")):
        from convert.meta_files import read as read_meta  # it imports Source

        return read_meta(path)
    config = json_file(path / "config.json") if (path / "config.json").exists() else {}
    indexes = [path / name for name in INDEXES if (path / name).exists()]
    if indexes:
        # A download may have left out one kind of shards, but not their index.
        return _sharded(path, min(indexes, key=_lacks_shards), config)
    for name in SINGLES:
        if (path / name).exists():
            return Source(path, _file(path / name), [path / name], config)
    here = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path}: no weights that can be read; want {', '.join(INDEXES + SINGLES)} or "
        f"consolidated.00.pth, found {here}"
    )


def _lacks_shards(index: Path) -> bool:
    weight_map = json_file(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return not names or any(
        not isinstance(name, str) or not (index.parent / name).is_file()
        for name in names
    )


def _sharded(path: Path, index: Path, config: Mapping[str, Any]) -> Source:
    """The tensors that an index names, each from the shard it is said to be in.

    Always by the index: names of shards are not padded everywhere, and leftovers of
    other downloads lie beside them.
    """
    weight_map = json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; fetch it again")
    odd = [
        x for x in weight_map.values() if not isinstance(x, str) or Path(x).name != x
    ]
    if odd:
        raise CheckpointError(f"{index}: {odd[0]!r} is no name of a file beside it")
    files = [path / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{path}: {len(absent)} of {len(files)} shards are absent "
            f"({', '.join(absent)}); fetch them again"
        )
    tensors: dict[str, Any] = {}
    problems = []
    for file in files:
        for name, tensor in _file(file).items():
            if name in tensors:
                problems.append(f"{name} is in {file.name} and in another shard")
            tensors[name] = tensor
            if weight_map.get(name, file.name) != file.name:
                problems.append(f"{name} is in {file.name}, not in {weight_map[name]}")
    problems += [f"{name} is in no shard" for name in weight_map if name not in tensors]
    if problems:
        listed = "\n  ".join(problems[:20])
        raise CheckpointError(
            f"{index} and its shards differ in {len(problems)} places (shards of "
            f"another download?):\n  {listed}"
        )
    return Source(path, tensors, files, config)


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, each read from the mapped file when asked for."""
    try:
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or is truncated ({error}); fetch it again"
        ) from error
    tensors = {}
    for name, tensor in slices.items():
        if tensor.get_dtype() not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is {tensor.get_dtype()}; want one of {', '.join(DTYPES)}"
            )
        tensors[name] = Tensor(
            tuple(tensor.get_shape()),
            DTYPES[tensor.get_dtype()],
            lambda tensor=tensor: np.asarray(tensor[...]),
        )
    return tensors


def json_file(path: Path) -> dict[str, Any]:
    """A JSON object of somebody else's."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: want a JSON object")
    return values


def number(values: Mapping[str, Any], key: str, where: Path) -> Any:
    """A number that somebody else's JSON file at `where` must have."""
    value = values.get(key)
    if value is None:
        raise CheckpointError(f"{where}: it has no {key}; is it whole?")
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} is {value!r}; want a number above 0")
    return value
