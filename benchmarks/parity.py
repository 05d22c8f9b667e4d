"""Our towers beside those of transformers: largest error over their largest value.

    python -m benchmarks.parity

float32 products on random weights of std 1/sqrt(width), every norm and bias random;
tests/parity.py says how, the tests hold each number under 2e-5. A block starts from
their input to it; `full width` is one block of the published size, a few tokens long.
"""

import dataclasses
import platform

import jax
import numpy as np
import torch
import transformers

from minigpt4_jax.models.layers import BRANCHES, unstack
from minigpt4_jax.models.llama import (
    SMOLLM2_135M,
    VICUNA_7B,
    LlamaConfig,
    rotary_angles,
)
from minigpt4_jax.models.qformer import BLIP2, QFormerConfig
from minigpt4_jax.models.vit import DINOV2_S, EVA_G, ViTConfig
from tests import parity

EVA = ViTConfig(
    image_size=40,
    patch_size=4,
    width=60,
    num_layers=6,
    num_heads=5,
    mlp_width=83,
    eps=1e-6,
    ln_vision_eps=1e-5,
)
DINO = dataclasses.replace(
    EVA, mlp_width=180, ln_vision_eps=1e-6, k_bias=True, layer_scale=True
)
QFORMER = QFormerConfig(
    num_queries=7,
    width=44,
    num_layers=6,
    num_heads=4,
    mlp_width=63,
    encoder_width=EVA.width,
)
LLAMA = LlamaConfig(
    vocab_size=211,
    width=54,
    num_layers=6,
    num_heads=6,
    num_kv_heads=6,
    head_size=14,
    mlp_width=91,
    eps=1e-6,
)
GROUPED = dataclasses.replace(
    LLAMA, num_kv_heads=2, rope_theta=100_000.0, tie_embeddings=True
)


def main() -> None:
    print(f"jax {jax.__version__} ({jax.default_backend()}), {platform.machine()};")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(f"{'tower':28} {'worst block':>12} {'whole':>10} {'full width':>11}")
    rows = (
        ("EVA ViT, ln_vision", vit, EVA, EVA_G),
        ("DINOv2", vit, DINO, DINOV2_S),
        ("Q-Former", qformer, QFORMER, BLIP2),
        ("LLaMA", llama, LLAMA, VICUNA_7B),
        ("LLaMA, grouped keys, tied", llama, GROUPED, SMOLLM2_135M),
    )
    for name, measure, cfg, preset in rows:
        block, whole = measure(cfg)
        full = measure(one_block(preset))[1]
        print(f"{name:28} {block:12.1e} {whole:10.1e} {full:11.1e}")


def one_block(preset):
    """The preset's width, with as few layers, pixels and words as make a model."""
    small = dict(
        ViTConfig=dict(num_layers=1, image_size=28),
        QFormerConfig=dict(num_layers=2),
        LlamaConfig=dict(num_layers=1, vocab_size=61),
    )
    return dataclasses.replace(preset, **small[type(preset).__name__])


def vit(cfg: ViTConfig) -> tuple[float, float]:
    """(worst block, whole) of the tower and the norm behind it."""
    ours, theirs = parity.vision(cfg)
    pixels_BHWC = parity.normal(1, 2, cfg.image_size, cfg.image_size, 3)
    seen = parity.record(parity.blocks_of(theirs))
    expected = theirs(parity.channels_first(pixels_BHWC)).last_hidden_state
    whole = parity.error(ours.ln_vision(ours.vit(pixels_BHWC)), expected)
    blocks = zip(unstack(ours.vit.blocks), seen)
    return max(parity.error(b(x.numpy()), y) for b, (x, y) in blocks), whole


def qformer(cfg: QFormerConfig) -> tuple[float, float]:
    """(worst block, whole); a block is a layer with its cross-attention."""
    ours, theirs = parity.queries(cfg)
    patches_BPE = parity.normal(1, 2, 101, cfg.encoder_width)
    seen = parity.record(parity.blocks_of(theirs))
    expected = theirs(torch.from_numpy(patches_BPE)).last_hidden_state
    whole = parity.error(ours(patches_BPE), expected)
    cross, errors = iter(unstack(ours.cross)), []
    for i, (layer, (x, y)) in enumerate(zip(unstack(ours.layers), seen)):
        out_BQD = layer.attend(x.numpy())
        if i % cfg.cross_attention_freq == 0:
            out_BQD, _ = next(cross)(out_BQD, patches_BPE, keep_map=False)
        errors.append(parity.error(layer.think(out_BQD), y))
    return max(errors), whole


def llama(cfg: LlamaConfig) -> tuple[float, float]:
    """(worst block, whole: the logits)."""
    ours, theirs = parity.decoder(cfg)
    ids_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 24))
    positions_BT = np.broadcast_to(np.arange(24), ids_BT.shape)
    seen = parity.record(parity.blocks_of(theirs))
    expected = theirs(torch.from_numpy(ids_BT)).logits
    segments_BT = np.full(ids_BT.shape, BRANCHES)
    hidden_BTD, _ = ours(ours.embed(ids_BT), segments_BT, positions_BT)
    whole = parity.error(ours.logits(hidden_BTD), expected)
    angles_BTK = rotary_angles(positions_BT, cfg)
    mask_BTS = np.tril(np.ones((24, 24), bool))[None]
    errors = [
        parity.error(block(x.numpy(), angles_BTK, mask_BTS)[0], y)
        for block, (x, y) in zip(unstack(ours.blocks), seen)
    ]
    return max(errors), whole


if __name__ == "__main__":
    main()
