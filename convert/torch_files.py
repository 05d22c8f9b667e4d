"""Files of `torch.save` -> tensors by name; nothing in a file is ever executed.

The only module outside tests and benchmarks that imports torch. A file holds numbers,
text, lists and tensors; one that wants more (a pickle can name any function) is refused
by torch's own restricted reader, which needs torch 2.6: older ones could be tricked.
"""

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.tensors import Tensor
from minigpt4_jax.errors import CheckpointError

OLDEST = (2, 6)
WRAPPERS = ("model", "state_dict", "module")  # keys under which training code nests
# Old files cannot be mapped: all of one is in memory while it is converted.
LARGEST_UNMAPPED = 4 * 10**9


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name, memory-mapped where the format allows it.

    A state dict under "model", "state_dict" or "module" loses that prefix; whatever
    stands beside it (an optimizer, a config) is listed as `beside:KEY`, of shape (), so
    that a rule has to name it.

    Raises:
        CheckpointError: not such a file, truncated, a file that wants to run code, or
            one that holds no tensors.
    """
    loaded = _load(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, want a state dict"
        )
    inner = next((k for k in WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
    tensors = {}
    if inner is not None:
        tensors = {f"beside:{key}": _nothing() for key in loaded if key != inner}
        loaded = loaded[inner]
    for name, tensor in _flatten(loaded, path):
        if name in tensors:
            raise CheckpointError(f"{path}: {name} is in it twice; which one counts?")
        tensors[name] = tensor
    if all(name.startswith("beside:") for name in tensors):
        raise CheckpointError(f"{path}: no tensors in it; is this a checkpoint?")
    return tensors


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in their dtype, rounded as FastChat's merge is (numpy takes 12 times longer)."""
    return _as_numpy(as_torch(a) + as_torch(b))


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Write what the reference's `torch.load` reads: arrays become tensors, nested too."""
    import torch

    def tensors(value):
        if isinstance(value, Mapping):
            return {key: tensors(inner) for key, inner in value.items()}
        return as_torch(value) if isinstance(value, np.ndarray) else value

    torch.save(tensors(values), path)


def as_torch(array: np.ndarray) -> Any:
    """The tensor of an array; torch knows bfloat16, numpy only by ml_dtypes."""
    import torch

    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _load(path: Path) -> Any:
    torch = _torch()
    zipped = zipfile.is_zipfile(path)
    _check_size(path, zipped)
    if zipped:
        _check_stored(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages that torch itself still uses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle may end in any of them
        wants = next((x for x in str(error).splitlines() if "GLOBAL" in x), None)
        if isinstance(error, pickle.UnpicklingError) and wants is not None:
            raise CheckpointError(
                f"{path} was refused and nothing in it was run: it is more than weights "
                f"({wants.strip()}). Get it from its authors' own page, or have them "
                "save its state dict alone"
            ) from error
        first = str(error).split(". ")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is no torch file, or is damaged or truncated ({first}); fetch it "
            "again"
        ) from error


def _torch():
    """The torch module, if it is there and its restricted reader can be trusted."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "reading .pth and .bin files needs torch: `pip install -e '.[convert]'`"
        ) from error
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST:
        raise CheckpointError(
            f"torch {torch.__version__} reads pickles less safely than "
            f"{'.'.join(map(str, OLDEST))}; `pip install -U torch`"
        )
    return torch


def _check_size(path: Path, zipped: bool) -> None:
    size = path.stat().st_size
    if not zipped and size > LARGEST_UNMAPPED:
        raise CheckpointError(
            f"{path}: {size / 1e9:.1f} GB, not a zip file. It is truncated, or in torch's "
            "old format, which cannot be mapped: load it and `torch.save` it once with a "
            "torch of today"
        )


def _check_stored(path: Path) -> None:
    """Raise for a zip file that is compressed: torch would map what is packed in it as
    weights, and say nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [
                info.filename
                for info in archive.infolist()
                if info.compress_type != zipfile.ZIP_STORED
            ]
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again") from error
    if packed:
        raise CheckpointError(
            f"{path}: a compressed zip file ({packed[0]}), which torch does not write; "
            "unpack what it holds, or fetch the original"
        )


def _flatten(values: Mapping, path: Path, prefix: str = "") -> Iterator:
    """(name, Tensor) of each tensor of a nested dict; other leaves are `beside:` too."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, path, f"{name}.")
        elif hasattr(value, "untyped_storage"):
            yield name, _tensor(name, value, path)
        else:
            yield f"beside:{name}", _nothing()


def _tensor(name: str, value: Any, path: Path) -> Tensor:
    import torch

    known = {
        torch.float64: np.float64,
        torch.float32: np.float32,
        torch.float16: np.float16,
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.int64: np.int64,
        torch.int32: np.int32,
        torch.int16: np.int16,
        torch.uint8: np.uint8,
        torch.int8: np.int8,
        torch.bool: np.bool_,
    }
    if value.dtype not in known or value.layout != torch.strided or value.is_meta:
        kind = "without values" if value.is_meta else value.layout
        raise CheckpointError(
            f"{path}: {name} is {value.dtype} ({kind}); want dense floats"
        )
    dtype = np.dtype(known[value.dtype])

    return Tensor(tuple(value.shape), dtype, lambda: _as_numpy(value.detach()))


def _as_numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _nothing() -> Tensor:
    return Tensor((), np.dtype(np.float32), lambda: np.zeros((), np.float32))
