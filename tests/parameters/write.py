"""Write the parameters of every preset: python -m tests.parameters.write

A path or shape that changes makes old checkpoints unreadable, so the lists are committed
and tests/test_minigpt4.py compares them with the models.
"""

import json
from pathlib import Path

from minigpt4_jax.checkpoint import parameter_shapes
from minigpt4_jax.models.minigpt4 import PRESETS

FOLDER = Path(__file__).parent


def listed(cfg) -> str:
    """A JSON object of path: shape, one parameter a line, sorted."""
    shapes = sorted(parameter_shapes(cfg).items())
    lines = [f"  {json.dumps(path)}: {list(shape)}" for path, shape in shapes]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    for name, cfg in PRESETS.items():
        (FOLDER / f"{name}.json").write_text(listed(cfg))
