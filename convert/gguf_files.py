"""Tensors and numbers of a GGUF file, dequantised to float32 one at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from convert.tensors import Tensor
from minigpt4_jax.errors import CheckpointError


def _tensor(stored: Any) -> Tensor:
    shape = tuple(int(size) for size in reversed(stored.shape))

    def values() -> np.ndarray:
        array = dequantize(stored.data, stored.tensor_type)
        return array.reshape(shape).astype(np.float32, copy=False)

    return Tensor(shape, np.dtype(np.float32), values)


class GGUFFile(Mapping):
    """Tensors by name, in [out, in] order like torch; metadata under `.metadata`."""

    def __init__(self, path: Path):
        try:
            reader = GGUFReader(str(path))
        except (ValueError, IndexError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a readable GGUF file: {error}"
            ) from error
        self._tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
        self.metadata = _Metadata(reader)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Metadata(Mapping):
    """Metadata values by key, decoded when asked for (the vocabulary is long)."""

    def __init__(self, reader: GGUFReader):
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def llama_numbers(file: GGUFFile) -> dict[str, int | float]:
    """The decoder's sizes as the file states them, by the names of `LlamaConfig`."""
    metadata = file.metadata
    if metadata["general.architecture"] != "llama":
        raise CheckpointError(
            f"the GGUF file holds a {metadata['general.architecture']!r} model; only "
            "'llama' can be converted"
        )
    heads = metadata["llama.attention.head_count"]
    width = metadata["llama.embedding_length"]
    return {
        "vocab_size": file["token_embd.weight"].shape[0],
        "width": width,
        "num_layers": metadata["llama.block_count"],
        "num_heads": heads,
        "num_kv_heads": metadata["llama.attention.head_count_kv"],
        "head_size": metadata["llama.rope.dimension_count"],
        "mlp_width": metadata["llama.feed_forward_length"],
        # Written in float32: 1e-5 comes back as 9.999999747378752e-06.
        "eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "max_positions": metadata["llama.context_length"],
        "tie_embeddings": "output.weight" not in file,
    }
