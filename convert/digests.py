"""Digests of all that decides the demo's converted values, read as text.

The rules' digest imports nothing of them, so that every start can check it.
"""

import ast
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A change here is a new fingerprint: another directory, converted anew by every user.
FILES = (
    "demo_weights.py",
    "gguf_files.py",
    "llama.py",
    "onnx_files.py",
    "rules.py",
    "tensors.py",
    "tokenizers.py",
    "vit.py",
)
FUNCTIONS = {"minigpt4_jax/models/vit.py": ("resize_position_embedding", "_bicubic")}


def rules() -> str:
    """16 hex digits of the statements in FILES and FUNCTIONS."""
    digest = hashlib.sha256()
    for name in FILES:
        text = (ROOT / "convert" / name).read_text(encoding="utf-8")
        digest.update(f"{name}\n{statements(text)}\n".encode())
    for name, functions in FUNCTIONS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for function in functions:
            digest.update(f"{statements(source(text, function))}\n".encode())
    return digest.hexdigest()[:16]


def preset() -> str:
    """16 hex digits of the demo's sizes."""
    from minigpt4_jax.models.minigpt4 import DEMO  # here: this imports JAX

    values = json.dumps(DEMO.to_dict(), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def source(text: str, function: str) -> str:
    """The text of one function of a module."""
    (node,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    return ast.get_source_segment(text, node)


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
