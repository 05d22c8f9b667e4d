"""Useful floating-point operations of a training step, by formula; what a device can do.

Useful is what the mathematics asks for: padding, positions that attention masks, logits
that no loss needs and values computed a second time are not counted, so that doing
without them makes a run look no worse.
"""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minigpt4_jax.checkpoint import parameter_shapes
from minigpt4_jax.models.minigpt4 import MiniGPT4Config

# Dense bfloat16 FLOP/s of one JAX device by the beginning of its `device_kind`, the
# longest that fits; from the makers' data sheets (NVIDIA's with sparsity, halved).
PEAKS = {
    "TPU v2": 22.5e12,  # a device is a core here and in v3, a chip from v4 on
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def peak(devices: Iterable[Any]) -> float | None:
    """FLOP/s in bfloat16 of all these JAX devices together; None if one is unknown."""
    found = [_peak(device.device_kind) for device in devices]
    return None if None in found else math.fsum(found)


def _peak(kind: str) -> float | None:
    # A whole word: an A1000 is no A100.
    names = [n for n in PEAKS if re.match(rf"{re.escape(n)}\b", kind)]
    return PEAKS[max(names, key=len)] if names else None


@dataclass(frozen=True)
class Work:
    """What the decoder has to do in a batch, padding left out."""

    images: int
    tokens: int
    pairs: int  # of a token and one it attends to, itself included
    answers: int  # tokens that are predicted

    @classmethod
    def of(cls, batch: dict) -> "Work":
        """Of a batch as MiniGPT4.loss wants it, in numpy arrays."""
        valid_RT = batch["segments_RT"] > 0
        # Positions are counted inside an example and along a branch, so a token's is
        # the number of those it sees before itself.
        pairs = ((batch["positions_RT"] + 1) * valid_RT).sum(dtype=np.int64)
        answers = (batch["loss_mask_RA"] > 0).sum()
        counts = len(batch["ok_B"]), valid_RT.sum(), pairs, answers
        return cls(*(int(n) for n in counts))


@dataclass(frozen=True)
class Costs:
    """FLOPs of a step for each unit of `Work`."""

    image: int
    token: int
    pair: int
    answer: int

    def __call__(self, work: Work) -> int:
        """FLOPs of a step, forward and backward."""
        return (
            self.image * work.images
            + self.token * work.tokens
            + self.pair * work.pairs
            + self.answer * work.answers
        )


TOWERS = (
    "vit",
    "ln_vision",
    "qformer",
    "projector",
    "llama",
)  # each reads those before


def costs(cfg: MiniGPT4Config, trainable: Collection[str], part: str) -> Costs:
    """What a step of `answer_loss` costs.

    A weight costs 2 a position: a multiplication and an addition. 2 more where what it
    reads depends on something trained, and 2 more where it is trained itself.

    Args:
        trainable: paths of parameters.
        part: what a batch has of its images: "pixels", "patches" or "queries".
    """
    trained = [tower for tower in TOWERS if any(_in(p, tower) for p in trainable)]
    done = {"pixels": (), "patches": TOWERS[:2], "queries": TOWERS[:3]}[part]

    def passes(*towers: str) -> int:
        """1 forward, and 1 backward if one of the towers is trained."""
        return 1 + any(tower in trained for tower in towers)

    shapes = parameter_shapes(cfg)
    flops = {"image": 0, "token": 0, "pair": 0, "answer": 0}
    for pattern, unit, positions, inputs in _weights(cfg):
        for path in shapes:
            if re.fullmatch(pattern, path) and not any(_in(path, t) for t in done):
                times = passes(*inputs) + (path in trainable)
                flops[unit] += 2 * times * positions * math.prod(shapes[path])
    for tower, unit, products, inputs in _attention(cfg):
        if tower not in done:
            # A product of two activations has two gradients.
            flops[unit] += products * (2 * passes(*inputs) - 1)
    return Costs(**flops)


def _in(path: str, tower: str) -> bool:
    return path.startswith(f"{tower}/")


def _weights(cfg: MiniGPT4Config):
    """(paths, unit, positions a unit, towers whose training its input depends on)."""
    patches, slots = cfg.vit.num_patches, cfg.num_slots
    head = "embed/embedding" if cfg.llama.tie_embeddings else "head/kernel"
    return (
        (r"vit/patch/kernel", "image", patches - 1, ()),
        (r"vit/blocks/.*/kernel", "image", patches, TOWERS[:1]),
        (r"qformer/cross/attn/[kv]/kernel", "image", patches, TOWERS[:2]),
        (r"qformer/cross/attn/(q|out)/kernel", "image", slots, TOWERS[:3]),
        (r"qformer/layers/.*/kernel", "image", slots, TOWERS[:3]),
        (r"projector/kernel", "image", slots, TOWERS[:3]),
        (r"llama/blocks/.*/kernel", "token", 1, TOWERS),
        (f"llama/{head}", "answer", 1, TOWERS),
    )


def _attention(cfg: MiniGPT4Config):
    """(tower, unit, FLOPs of scores and sums a unit, as in `_weights`)."""
    vit, qformer, llama = cfg.vit, cfg.qformer, cfg.llama
    patches, slots = vit.num_patches, cfg.num_slots
    width = llama.num_heads * llama.head_size
    yield "vit", "image", 4 * vit.num_layers * vit.width * patches**2, TOWERS[:1]
    if qformer is not None:
        own = 4 * qformer.num_layers * qformer.width * slots**2
        cross = 4 * qformer.num_cross * qformer.width * slots * patches
        yield "qformer", "image", own + cross, TOWERS[:3]
    yield "llama", "pair", 4 * llama.num_layers * width, TOWERS
