"""Another vision tower in MiniGPT-4: a convolutional one, in twenty lines.

    python -m examples.replace_tower

Any module that maps pixels_BHWC to patches_BPE (a class token first, `cfg.vit.width`
wide) takes the ViT's place; Q-Former, projector, decoder, training step and generator
stay as they are.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax import Capture, MiniGPT4, MiniGPT4Config
from minigpt4_jax.models.minigpt4 import PRESETS


class ConvTower(nnx.Module):
    """Strided convolutions down to a grid of patches; their mean stands in for the class."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        widths = (3, width // 4, width // 2, width)
        self.layers = nnx.List(
            nnx.Conv(a, b, kernel_size=(3, 3), strides=4, rngs=rngs)
            for a, b in zip(widths, widths[1:])
        )

    def __call__(self, pixels_BHWC, capture: Capture | None = None):
        x_BYXD = pixels_BHWC
        for layer in self.layers:
            x_BYXD = jax.nn.gelu(layer(x_BYXD), approximate=False)
        x_BPD = x_BYXD.reshape(len(x_BYXD), -1, x_BYXD.shape[-1])
        return jnp.concatenate([x_BPD.mean(1, keepdims=True), x_BPD], axis=1)


def build(cfg: MiniGPT4Config, *, rngs: nnx.Rngs) -> MiniGPT4:
    """MiniGPT-4 of these sizes that sees through convolutions."""
    return MiniGPT4(cfg, rngs=rngs, vit=ConvTower(cfg.vit.width, rngs=rngs))


def main() -> None:
    # A shallow decoder: weights are random here, so depth would only cost time.
    demo = PRESETS["demo"]
    cfg = dataclasses.replace(demo, llama=dataclasses.replace(demo.llama, num_layers=2))
    model = build(cfg, rngs=nnx.Rngs(0))
    size = cfg.vit.image_size
    image_BQD = jax.jit(model.encode_image)(jnp.zeros((1, size, size, 3)))
    for part in ("vit", "qformer", "projector", "llama"):
        weights = jax.tree.leaves(nnx.state(getattr(model, part), nnx.Param))
        print(f"{part:10} {sum(math.prod(w.shape) for w in weights):12,} parameters")
    print(f"one image becomes {image_BQD.shape[1]} embeddings of {image_BQD.shape[2]}")


if __name__ == "__main__":
    main()
