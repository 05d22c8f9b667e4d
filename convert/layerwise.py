"""Prompts through a loaded model, layer after layer -> log-probabilities.

On a CPU one program of all layers would hold a float32 copy of every bfloat16 weight at
once: 30 GB for 7B. Here it is a copy of one layer.
"""

from functools import partial

import jax
import jax.numpy as jnp

from minigpt4_jax.models.layers import BRANCHES, attention_mask, layer
from minigpt4_jax.models.llama import rotary_angles
from minigpt4_jax.models.minigpt4 import MiniGPT4


def log_probs(model: MiniGPT4, ids_BT, slots_BT, pixels_BHWC):
    """Of each next token, log_probs_BTV; a row is one causal text.

    Args:
        pixels_BHWC: one image for each of the last rows; the others have no slots.
    """
    llama = model.llama
    image_BQD = _encode(model, pixels_BHWC)
    without = ids_BT.shape[0] - image_BQD.shape[0]
    image_BQD = jnp.pad(image_BQD, [(without, 0), (0, 0), (0, 0)])
    x_BTD = model.embed_prompt(ids_BT, slots_BT, image_BQD)
    for i in range(llama.cfg.num_layers):
        x_BTD = _block(llama.blocks, i, x_BTD, llama.cfg)
    return jax.nn.log_softmax(llama.logits(llama.norm(x_BTD)))


@jax.jit
def _encode(model, pixels_BHWC):
    return model.encode_image(pixels_BHWC)


@partial(jax.jit, static_argnames="cfg")
def _block(blocks, i, x_BTD, cfg):
    segments_BT = jnp.full(x_BTD.shape[:2], BRANCHES, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    mask_BTT = attention_mask(segments_BT, positions_BT, segments_BT, positions_BT)
    return layer(blocks, i)(x_BTD, rotary_angles(positions_BT, cfg), mask_BTT)[0]
