"""Tensors and numbers of a GGUF file, dequantised one at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from convert.tensors import Tensor
from minigpt4_jax.errors import CheckpointError


def _tensor(stored: Any) -> Tensor:
    shape = tuple(int(size) for size in reversed(stored.shape))
    # Quantised values are exact in float32 alone; what is 16-bit stays so.
    half = stored.tensor_type == GGMLQuantizationType.F16
    dtype = np.dtype(np.float16 if half else np.float32)

    def values() -> np.ndarray:
        array = stored.data if half else dequantize(stored.data, stored.tensor_type)
        return array.reshape(shape).astype(dtype, copy=False)

    return Tensor(shape, dtype, values)


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
    scaling = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in file or (scaling != "none" and factor != 1.0):
        raise CheckpointError(
            "the GGUF file asks for scaled rotary angles; want a LLaMA without them"
        )
    heads = metadata["llama.attention.head_count"]
    width = metadata["llama.embedding_length"]
    return {
        "vocab_size": file["token_embd.weight"].shape[0],
        "width": width,
        "num_layers": metadata["llama.block_count"],
        "num_heads": heads,
        # Optional, with these defaults in llama.cpp: LLaMA 1 and 2 often lack them.
        "num_kv_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_size": metadata.get("llama.rope.dimension_count", width // heads),
        "mlp_width": metadata["llama.feed_forward_length"],
        # Written in float32: 1e-5 comes back as 9.999999747378752e-06.
        "eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata.get("llama.rope.freq_base", 10_000.0),
        "max_positions": metadata["llama.context_length"],
        "tie_embeddings": "output.weight" not in file,
    }
