"""Vision transformer: pixels -> one vector a patch, class token first.

EVA ViT-g/14 of the reference (39 blocks, no final norm) and DINOv2 (key bias, LayerScale).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.layers import (
    MLP,
    Capture,
    DTypes,
    LayerNorm,
    Linear,
    apply_stack,
    attend,
    check_sizes,
    make_stack,
    stacked,
    wants,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT and the pixels it was trained on."""

    image_size: int  # pixels a side, after the resize
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    eps: float  # of the norms inside blocks
    ln_vision_eps: float  # of the norm on the last block's output
    k_bias: bool = False  # EVA has biases on q and v only
    layer_scale: bool = False
    resize: str = "bicubic"  # PIL's filter, to a square, aspect ratio not kept
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        check_sizes("vit", self, ("num_heads", "width"))
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"vit: image_size={self.image_size} is smaller than one patch of "
                f"patch_size={self.patch_size}"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"vit: std={self.std}; want numbers above 0")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Length of the output, class token included."""
        return self.grid**2 + 1

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


EVA_G = ViTConfig(
    image_size=224,
    patch_size=14,
    width=1408,
    num_layers=39,
    num_heads=16,
    mlp_width=6144,
    eps=1e-6,
    ln_vision_eps=1e-5,
)
DINOV2_S = ViTConfig(
    image_size=224,
    patch_size=14,
    width=384,
    num_layers=12,
    num_heads=6,
    mlp_width=1536,
    eps=1e-6,
    ln_vision_eps=1e-6,
    k_bias=True,
    layer_scale=True,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
PRESETS = {"eva_g": EVA_G, "dinov2_s": DINOV2_S}


class ViT(nnx.Module):
    """Patch embedding, class token, learned positions, pre-norm blocks; no final norm.

    Source: eva_vit.py; the norm that follows (`ln_vision`) belongs to MiniGPT4.
    """

    def __init__(self, cfg: ViTConfig, *, dtypes: DTypes = DTypes(), rngs: nnx.Rngs):
        self.cfg = cfg
        self.remat = False  # MiniGPT4.set_remat
        self.gather = None  # MiniGPT4.set_gather
        patch = (cfg.patch_size, cfg.patch_size, 3)
        self.patch = Linear(patch, cfg.width, dtypes=dtypes, rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        param = jnp.dtype(dtypes.param)
        self.class_token = nnx.Param(normal(rngs.params(), (cfg.width,), param))
        shape = (cfg.num_patches, cfg.width)
        self.position_embedding = nnx.Param(normal(rngs.params(), shape, param))
        self.blocks = make_stack(
            lambda rngs: Block(cfg, dtypes=dtypes, rngs=rngs), cfg.num_layers, rngs
        )

    def __call__(self, pixels_BHWC, capture: Capture | None = None):
        """Normalised pixels -> patches_BPD, the float32 residual stream at its end."""
        b, h, w, _ = pixels_BHWC.shape
        size = self.cfg.image_size
        if (h, w) != (size, size):
            raise ValueError(f"pixels: got {h} x {w}, want {size} x {size}")
        p, n = self.cfg.patch_size, self.cfg.grid
        x = pixels_BHWC[:, : n * p, : n * p].reshape(b, n, p, n, p, 3)
        x_BYXHWC = x.transpose(0, 1, 3, 2, 4, 5)
        x_BYXD = self.patch(x_BYXHWC).astype(jnp.float32)
        class_B1D = jnp.broadcast_to(
            self.class_token[...].astype(jnp.float32), (b, 1, self.cfg.width)
        )
        x_BPD = jnp.concatenate([class_B1D, x_BYXD.reshape(b, n * n, -1)], axis=1)
        # The residual stream stays float32: the reference's fp16 convolution is
        # concatenated with a float32 class token, which promotes all that follows.
        x_BPD = x_BPD + self.position_embedding[...].astype(jnp.float32)
        keep = wants(capture, "vit/hidden")

        def step(block, x_BPD, _):
            x_BPD = block(x_BPD)
            return x_BPD, x_BPD if keep else None

        how = dict(remat=self.remat, gather=self.gather)
        x_BPD, hidden = apply_stack(self.blocks, step, x_BPD, **how)
        if keep:
            capture.values["vit/hidden"] = stacked(hidden)
        return x_BPD


def normalise(image_BHWC, cfg: ViTConfig):
    """uint8 images of the size `cfg` wants -> the pixels that data/images.py makes.

    Looked up, so that they are equal to the bit: XLA multiplies by 1 / 255 instead of
    dividing by 255, which rounds otherwise.
    """
    value_V1 = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    mean_C, std_C = np.array(cfg.mean, np.float32), np.array(cfg.std, np.float32)
    pixel_VC = jnp.asarray((value_V1 - mean_C) / std_C)
    return pixel_VC[image_BHWC, jnp.arange(3)]


class Block(nnx.Module):
    """Pre-norm block: x + attn(norm1(x)), x + mlp(norm2(x)), each scaled if asked."""

    def __init__(self, cfg: ViTConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(cfg.width, cfg.eps, dtypes=dtypes)
        self.attn = Attention(cfg, dtypes=dtypes, rngs=rngs)
        self.norm2 = LayerNorm(cfg.width, cfg.eps, dtypes=dtypes)
        self.mlp = MLP(cfg.width, cfg.mlp_width, dtypes=dtypes, rngs=rngs)
        self.layer_scale = cfg.layer_scale
        if cfg.layer_scale:
            self.layer_scale1 = nnx.Param(jnp.ones(cfg.width, dtypes.param))
            self.layer_scale2 = nnx.Param(jnp.ones(cfg.width, dtypes.param))

    def __call__(self, x_BPD):
        attn_BPD = self.attn(self.norm1(x_BPD)).astype(jnp.float32)
        if self.layer_scale:
            attn_BPD = attn_BPD * self.layer_scale1[...].astype(jnp.float32)
        x_BPD = x_BPD + attn_BPD
        mlp_BPD = self.mlp(self.norm2(x_BPD)).astype(jnp.float32)
        if self.layer_scale:
            mlp_BPD = mlp_BPD * self.layer_scale2[...].astype(jnp.float32)
        return x_BPD + mlp_BPD


class Attention(nnx.Module):
    """Self-attention of a ViT block: biases on q and v, on k only in DINOv2."""

    def __init__(self, cfg: ViTConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        heads = (cfg.num_heads, cfg.head_size)
        new = dict(dtypes=dtypes, rngs=rngs)
        self.q = Linear(cfg.width, heads, **new)
        self.k = Linear(cfg.width, heads, use_bias=cfg.k_bias, **new)
        self.v = Linear(cfg.width, heads, **new)
        self.out = Linear(heads, cfg.width, **new)

    def __call__(self, x_BPD):
        return self.out(attend(self.q(x_BPD), self.k(x_BPD), self.v(x_BPD)))


def resize_position_embedding(embedding_PD, grid: int):
    """Position embeddings for another resolution: [P D] -> [grid * grid + 1, D].

    Torch's bicubic (a = -0.75, half-pixel centres, edges repeated, no antialias), the
    kernel of the reference's `interpolate_pos_embed`; `jax.image.resize` has another.
    """
    old = round((embedding_PD.shape[0] - 1) ** 0.5)
    if old * old + 1 != embedding_PD.shape[0]:
        raise ValueError(
            f"position embedding: {embedding_PD.shape[0]} rows, want n*n+1"
        )
    if old == grid:
        return embedding_PD
    weights = jnp.asarray(_bicubic(old, grid))
    grid_YXD = embedding_PD[1:].astype(jnp.float32).reshape(old, old, -1)
    # Two products in full precision: TPUs would round the taps to bfloat16.
    grid_YXD = jnp.einsum(
        "yY,xX,YXD->yxD", weights, weights, grid_YXD, precision="highest"
    )
    rows_PD = grid_YXD.reshape(grid * grid, -1).astype(embedding_PD.dtype)
    return jnp.concatenate([embedding_PD[:1], rows_PD])


def _bicubic(old: int, new: int):
    """[new, old] matrix of one-dimensional cubic convolution with a = -0.75."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centre - (base + tap))
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        np.add.at(
            matrix,
            (np.arange(new), np.clip(base + tap, 0, old - 1)),
            np.where(t <= 1, near, far),
        )
    return matrix.astype(np.float32)
