"""Q-Former: patches -> a fixed number of queries (the query path of BLIP-2's BERT)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.models.layers import (
    MLP,
    Capture,
    DTypes,
    LayerNorm,
    Linear,
    attend,
    attention_map,
    check_sizes,
    layer,
    make_stack,
    scan_blocks,
    wants,
)

# BERT's: branches begin small beside the residual stream, which tells queries apart.
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; `encoder_width` is the ViT's."""

    num_queries: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    encoder_width: int
    cross_attention_freq: int = 2  # layers 0, freq, 2 * freq, ... look at the patches
    eps: float = 1e-12

    def __post_init__(self):
        check_sizes("qformer", self, ("num_heads", "width"))

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def num_cross(self) -> int:
        """Layers with cross-attention."""
        return math.ceil(self.num_layers / self.cross_attention_freq)


BLIP2 = QFormerConfig(
    num_queries=32,
    width=768,
    num_layers=12,
    num_heads=12,
    mlp_width=3072,
    encoder_width=1408,
)
DEMO = QFormerConfig(
    num_queries=32,
    width=384,
    num_layers=4,
    num_heads=6,
    mlp_width=1536,
    encoder_width=384,
    cross_attention_freq=1,
)
PRESETS = {"blip2": BLIP2, "demo": DEMO}


class QFormer(nnx.Module):
    """Learned queries, normalised, through post-norm blocks; no position embedding.

    Dropout does not exist here: the reference keeps the module in eval mode in training.
    Source: Qformer.py of the reference; the text path is not used by MiniGPT-4.
    """

    def __init__(
        self, cfg: QFormerConfig, *, dtypes: DTypes = DTypes(), rngs: nnx.Rngs
    ):
        self.cfg = cfg
        self.remat = False  # MiniGPT4.set_remat
        self.dtypes = dtypes
        new = dict(dtypes=dtypes)
        # Normalised at once, so their size is free: at 0.02, BERT's, a few dozen steps of
        # Adam in one direction outweigh what tells them apart, and they become one query.
        normal = nnx.initializers.normal(1.0)
        shape = (cfg.num_queries, cfg.width)
        param = jnp.dtype(dtypes.param)
        self.query_tokens = nnx.Param(normal(rngs.params(), shape, param))
        self.norm = LayerNorm(cfg.width, cfg.eps, **new)
        self.layers = make_stack(
            lambda rngs: SelfBlock(cfg, rngs=rngs, **new), cfg.num_layers, rngs
        )
        self.cross = make_stack(
            lambda rngs: CrossBlock(cfg, rngs=rngs, **new), cfg.num_cross, rngs
        )

    def __call__(self, patches_BPE, capture: Capture | None = None):
        """patches_BPE (class token included) -> queries_BQD."""
        cfg = self.cfg
        freq = cfg.cross_attention_freq
        whole = cfg.num_layers // freq
        layers = nnx.split(self.layers)
        cross = nnx.split(self.cross)
        keep_hidden = wants(capture, "qformer/hidden")
        keep_map = wants(capture, "qformer/cross_attention")

        def group(x_BQD, states):
            """One layer that looks at the patches, then those that do not."""
            layer_states, cross_state = states
            hidden = []
            for i in range(jax.tree.leaves(layer_states)[0].shape[0]):
                block = nnx.merge(layers[0], layer(layer_states, i))
                x_BQD = block.attend(x_BQD)
                if i == 0:
                    look = nnx.merge(cross[0], cross_state)
                    x_BQD, map_BNQP = look(x_BQD, patches_BPE, keep_map)
                x_BQD = block.think(x_BQD)
                hidden.append(x_BQD)
            return x_BQD, (jnp.stack(hidden) if keep_hidden else None, map_BNQP)

        b = patches_BPE.shape[0]
        x_QD = self.norm(self.query_tokens[...])
        x_BQD = jnp.broadcast_to(x_QD, (b, *x_QD.shape))
        grouped = jax.tree.map(
            lambda w: w[: whole * freq].reshape(whole, freq, *w.shape[1:]), layers[1]
        )
        first = jax.tree.map(lambda w: w[:whole], cross[1])
        x_BQD, (hidden, maps) = scan_blocks(
            group, x_BQD, (grouped, first), remat=self.remat
        )
        if keep_hidden:
            hidden = hidden.reshape(-1, *x_BQD.shape)
        if cfg.num_layers % freq:  # an unfinished last group
            rest = jax.tree.map(lambda w: w[whole * freq :], layers[1])
            last = layer(cross[1], -1)
            x_BQD, (more, map_BNQP) = group(x_BQD, (rest, last))
            if keep_hidden:
                hidden = jnp.concatenate([hidden, more])
            if keep_map:
                maps = jnp.concatenate([maps, map_BNQP[None]])
        if keep_hidden:
            capture.values["qformer/hidden"] = hidden
        if keep_map:
            capture.values["qformer/cross_attention"] = maps
        return x_BQD.astype(self.dtypes.output)


class SelfBlock(nnx.Module):
    """Self-attention over the queries (`attend`) and their MLP (`think`), post-norm."""

    def __init__(self, cfg: QFormerConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        self.attn = Attention(cfg, cfg.width, dtypes=dtypes, rngs=rngs)
        self.attn_norm = LayerNorm(cfg.width, cfg.eps, dtypes=dtypes)
        self.mlp = MLP(cfg.width, cfg.mlp_width, std=INIT_STD, dtypes=dtypes, rngs=rngs)
        self.mlp_norm = LayerNorm(cfg.width, cfg.eps, dtypes=dtypes)

    def attend(self, x_BQD):
        out_BQD, _ = self.attn(x_BQD, x_BQD)
        return self.attn_norm(x_BQD + out_BQD)

    def think(self, x_BQD):
        return self.mlp_norm(x_BQD + self.mlp(x_BQD))


class CrossBlock(nnx.Module):
    """Queries look at the patches, post-norm."""

    def __init__(self, cfg: QFormerConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        self.attn = Attention(cfg, cfg.encoder_width, dtypes=dtypes, rngs=rngs)
        self.attn_norm = LayerNorm(cfg.width, cfg.eps, dtypes=dtypes)

    def __call__(self, x_BQD, patches_BPE, keep_map: bool):
        out_BQD, map_BNQP = self.attn(x_BQD, patches_BPE, keep_map)
        return self.attn_norm(x_BQD + out_BQD), map_BNQP


class Attention(nnx.Module):
    """BERT attention with biases; keys and values may come from another width."""

    def __init__(
        self, cfg: QFormerConfig, key_width: int, *, dtypes: DTypes, rngs: nnx.Rngs
    ):
        heads = (cfg.num_heads, cfg.head_size)
        new = dict(std=INIT_STD, dtypes=dtypes, rngs=rngs)
        self.q = Linear(cfg.width, heads, **new)
        self.k = Linear(key_width, heads, **new)
        self.v = Linear(key_width, heads, **new)
        self.out = Linear(heads, cfg.width, **new)

    def __call__(self, x_BQD, y_BSE, keep_map: bool = False):
        q_BQNK, k_BSNK = self.q(x_BQD), self.k(y_BSE)
        out_BQNK = attend(q_BQNK, k_BSNK, self.v(y_BSE))
        maps = attention_map(q_BQNK, k_BSNK) if keep_map else None
        return self.out(out_BQNK), maps
