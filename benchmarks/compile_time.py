"""Seconds to trace and compile training and prefill, by depth of all three towers.

    python -m benchmarks.compile_time

Blocks are stacked, so the time does not grow with the number of layers; `list` is the
decoder as the generator may hold it (`layers.unstack`), for comparison. Width hardly
matters to a compiler, so the towers are narrow.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.models.layers import unstack
from minigpt4_jax.models.minigpt4 import PRESETS, MiniGPT4

DEPTHS = (4, 32)


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"{'program':16}" + "".join(f"{depth:>5} layers" for depth in DEPTHS))
    for name, program, listed in (
        ("training", training, False),
        ("prefill", prefill, False),
        ("prefill, list", prefill, True),
    ):
        seconds = [compile_seconds(model(depth, listed), program) for depth in DEPTHS]
        print(f"{name:16}" + "".join(f"{s:10.1f} s" for s in seconds))


def model(depth: int, listed: bool) -> MiniGPT4:
    """EVA, Q-Former and LLaMA as MiniGPT-4 has them, `depth` layers each, narrow."""
    preset = PRESETS["minigpt4_vicuna_7b"]
    narrow = dict(num_layers=depth, width=64, num_heads=4, mlp_width=96)
    cfg = dataclasses.replace(
        preset,
        vit=dataclasses.replace(preset.vit, image_size=56, **narrow),
        qformer=dataclasses.replace(preset.qformer, encoder_width=64, **narrow),
        llama=dataclasses.replace(
            preset.llama, vocab_size=128, num_kv_heads=4, head_size=16, **narrow
        ),
    )
    built = MiniGPT4(cfg, rngs=nnx.Rngs(0))
    if listed:
        built.llama.blocks = unstack(built.llama.blocks)
    return built


def training(model: MiniGPT4, pixels_BHWC, ids_BT, slots_BT):
    """The gradient of every weight."""
    graphdef, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graphdef, state)
        logits_BTV = model(ids_BT, slots_BT, model.encode_image(pixels_BHWC))
        return jax.nn.logsumexp(logits_BTV, axis=-1).mean()

    return jax.grad(loss)(state)


def prefill(model: MiniGPT4, pixels_BHWC, ids_BT, slots_BT):
    """Logits of a prompt with an image, and the filled cache."""
    cache = model.llama.new_cache(*ids_BT.shape)
    return model(ids_BT, slots_BT, model.encode_image(pixels_BHWC), cache=cache)


def compile_seconds(model: MiniGPT4, program) -> float:
    graphdef, state = nnx.split(model)
    pixels_BHWC = jnp.zeros((1, 56, 56, 3))
    slots_BT = np.arange(48)[None] < model.cfg.num_slots
    ids_BT = np.zeros((1, 48), np.int32)

    def run(state, pixels_BHWC, ids_BT, slots_BT):
        return program(nnx.merge(graphdef, state), pixels_BHWC, ids_BT, slots_BT)

    start = time.perf_counter()
    jax.jit(run).lower(state, pixels_BHWC, ids_BT, slots_BT).compile()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
