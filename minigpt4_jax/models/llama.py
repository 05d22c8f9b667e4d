"""LLaMA-family decoder: embeddings in, hidden states and logits out, with a KV cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models import quantised
from minigpt4_jax.models.layers import (
    Capture,
    DTypes,
    Linear,
    RMSNorm,
    apply_stack,
    attend,
    attention_mask,
    check_sizes,
    linear,
    make_stack,
    stacked,
    wants,
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_width: int
    eps: float
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    tie_embeddings: bool = False

    def __post_init__(self):
        check_sizes("llama", self, ("num_kv_heads", "num_heads"))
        if self.head_size % 2:
            raise ConfigError(
                f"llama: head_size={self.head_size} is odd, but rotary angles turn pairs"
            )


VICUNA_7B = LlamaConfig(
    vocab_size=32_001,  # 32,000 and the pad row of Vicuna v0
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    mlp_width=11_008,
    eps=1e-6,
)
VICUNA_13B = dataclasses.replace(
    VICUNA_7B,
    width=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
    mlp_width=13_824,
)
LLAMA2_7B_CHAT = dataclasses.replace(
    VICUNA_7B, vocab_size=32_000, eps=1e-5, max_positions=4096
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152,
    width=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    mlp_width=1536,
    eps=1e-5,
    rope_theta=100_000.0,
    max_positions=8192,
    tie_embeddings=True,
)
PRESETS = {
    "vicuna_7b": VICUNA_7B,
    "vicuna_13b": VICUNA_13B,
    "llama2_7b_chat": LLAMA2_7B_CHAT,
    "smollm2_135m": SMOLLM2_135M,
}


KV = jax.Array | quantised.Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of what was read, in S places a row; places fill from 0.

    k, v: [L B S G K], or a tuple over layers of [B S G K] when blocks are a list; each
        an array or, in eight bits, an Int8.
    segments_BS, positions_BS: what `attention_mask` needs; segment 0 is an empty place.
    length_B: places used, so the next token of row b goes to length_B[b].
    """

    k: KV | tuple[KV, ...]
    v: KV | tuple[KV, ...]
    segments_BS: jax.Array
    positions_BS: jax.Array
    length_B: jax.Array


class Llama(nnx.Module):
    """RMSNorm, rotary attention with grouped keys, gated MLP; no bias anywhere."""

    def __init__(self, cfg: LlamaConfig, *, dtypes: DTypes = DTypes(), rngs: nnx.Rngs):
        self.cfg = cfg
        self.remat = False  # MiniGPT4.set_remat
        self.gather = None  # MiniGPT4.set_gather
        self.kv_int8 = False  # MiniGPT4.quantise
        self.dtypes = dtypes
        self.embed = Embedding(cfg, dtypes=dtypes, rngs=rngs)
        self.blocks = make_stack(
            lambda rngs: Block(cfg, dtypes=dtypes, rngs=rngs), cfg.num_layers, rngs
        )
        self.norm = RMSNorm(cfg.width, cfg.eps, dtypes=dtypes)
        if not cfg.tie_embeddings:
            self.head = Linear(
                cfg.width, cfg.vocab_size, use_bias=False, dtypes=dtypes, rngs=rngs
            )

    def new_cache(self, batch: int, places: int) -> Cache:
        """An empty cache for `places` tokens in each of `batch` rows."""
        cfg = self.cfg
        shape = (batch, places, cfg.num_kv_heads, cfg.head_size)

        def empty(*shape):
            zeros = jnp.zeros(shape, jnp.dtype(self.dtypes.compute))
            return quantised.Int8.of(zeros) if self.kv_int8 else zeros

        if isinstance(self.blocks, nnx.List):
            # A list comprehension each: two names for one buffer cannot be donated.
            k = tuple(empty(*shape) for _ in range(cfg.num_layers))
            v = tuple(empty(*shape) for _ in range(cfg.num_layers))
        else:
            k = empty(cfg.num_layers, *shape)
            v = empty(cfg.num_layers, *shape)
        return Cache(
            k=k,
            v=v,
            segments_BS=jnp.zeros((batch, places), jnp.int32),
            positions_BS=jnp.zeros((batch, places), jnp.int32),
            length_B=jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self,
        x_BTD,
        segments_BT,
        positions_BT,
        cache: Cache | None = None,
        capture: Capture | None = None,
    ):
        """Embeddings -> (normalised hidden states, cache with these tokens or None).

        Args:
            segments_BT, positions_BT: see `attention_mask`; padding is segment 0 and
                must stand behind a row's tokens (its cache places are used again).
            cache: keys of earlier tokens; T more must fit, which is not checked here.
        """
        angles_BTK = rotary_angles(positions_BT, self.cfg)
        listed = isinstance(self.blocks, nnx.List)
        if cache is None:
            mask_BTS = attention_mask(
                segments_BT, positions_BT, segments_BT, positions_BT
            )
            length_B = kv = None
        else:
            length_B = cache.length_B
            kv = list(zip(cache.k, cache.v)) if listed else (cache.k, cache.v)
            segments_BS = write(cache.segments_BS, segments_BT, length_B)
            positions_BS = write(cache.positions_BS, positions_BT, length_B)
            mask_BTS = attention_mask(
                segments_BT, positions_BT, segments_BS, positions_BS
            )
        keep = wants(capture, "llama/hidden")
        x_BTD = x_BTD.astype(self.dtypes.output)

        def step(block, x_BTD, kv):
            x_BTD, kv = block(x_BTD, angles_BTK, mask_BTS, kv, length_B)
            return x_BTD, (kv, x_BTD if keep else None)

        how = dict(remat=self.remat, gather=self.gather)
        x_BTD, ys = apply_stack(self.blocks, step, x_BTD, kv, **how)
        kvs, hidden = zip(*ys) if listed else ys
        if keep:
            capture.values["llama/hidden"] = stacked(hidden)
        if cache is not None:
            k, v = zip(*kvs) if listed else kvs
            used_B = (segments_BT > 0).sum(axis=1, dtype=jnp.int32)
            cache = Cache(k, v, segments_BS, positions_BS, length_B + used_B)
        return self.norm(x_BTD), cache

    def logits(self, hidden_BTD):
        """Hidden states, any leading dimensions -> float32 logits over the vocabulary."""
        # Not rounded on the way: bfloat16 has one value for each eighth above 16, which
        # makes ties of a greedy choice.
        if not self.cfg.tie_embeddings:
            return self.head(hidden_BTD, jnp.float32)
        return self.embed.logits(hidden_BTD)


class Embedding(nnx.Module):
    """Token ids -> vectors."""

    def __init__(self, cfg: LlamaConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        self.dtypes = dtypes
        shape = (cfg.vocab_size, cfg.width)
        embedding = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(embedding.astype(dtypes.param))
        self.quantised = False

    def quantise(self, kind: str) -> None:
        """Store it as int8, a scale for each token."""
        assert kind == "int8"
        values_DV, scale_V = quantised.int8(self.embedding[...].T)
        self.embedding = nnx.Param(values_DV.T)
        self.embedding_scale = nnx.Param(scale_V)
        self.quantised = True

    def __call__(self, ids_BT):
        x_BTD = self.embedding[...][ids_BT]
        if self.quantised:
            x_BTD = x_BTD * self.embedding_scale[...][ids_BT][..., None]
        return x_BTD.astype(self.dtypes.output)

    def logits(self, hidden_BTD):
        """Products with all embeddings, where they are the head too."""

        def multiply(hidden_BTD, rows_VD, scale_V=None):
            how = dict(dtypes=self.dtypes, out_dtype=jnp.float32, scale=scale_V)
            return linear(hidden_BTD, rows_VD.T, **how)

        if not self.quantised:
            return multiply(hidden_BTD, self.embedding[...])
        both = self.embedding[...], self.embedding_scale[...]
        return quantised.product_of_rows(multiply, hidden_BTD, *both)


class Block(nnx.Module):
    """x + attn(norm(x)), x + mlp(norm(x))."""

    def __init__(self, cfg: LlamaConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        new = dict(dtypes=dtypes)
        self.attn_norm = RMSNorm(cfg.width, cfg.eps, **new)
        self.attn = Attention(cfg, rngs=rngs, **new)
        self.mlp_norm = RMSNorm(cfg.width, cfg.eps, **new)
        self.mlp = GatedMLP(cfg, rngs=rngs, **new)

    def __call__(self, x_BTD, angles_BTK, mask_BTS, kv=None, length_B=None):
        normed_BTD = settled(self.attn_norm(x_BTD))
        out_BTD, kv = self.attn(normed_BTD, angles_BTK, mask_BTS, kv, length_B)
        x_BTD = x_BTD + out_BTD.astype(x_BTD.dtype)
        return x_BTD + self.mlp(settled(self.mlp_norm(x_BTD))).astype(x_BTD.dtype), kv


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; N / G query heads share a key head."""

    def __init__(self, cfg: LlamaConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        new = dict(use_bias=False, dtypes=dtypes, rngs=rngs)
        heads = (cfg.num_heads, cfg.head_size)
        kv_heads = (cfg.num_kv_heads, cfg.head_size)
        self.q = Linear(cfg.width, heads, **new)
        self.k = Linear(cfg.width, kv_heads, **new)
        self.v = Linear(cfg.width, kv_heads, **new)
        self.out = Linear(heads, cfg.width, **new)

    def __call__(self, x_BTD, angles_BTK, mask_BTS, kv=None, length_B=None):
        q_BTNK = rotate(self.q(x_BTD), angles_BTK)
        k_BSGK = rotate(self.k(x_BTD), angles_BTK)
        v_BSGK = self.v(x_BTD)
        if kv is not None:
            k_BSGK = write(kv[0], k_BSGK, length_B)
            v_BSGK = write(kv[1], v_BSGK, length_B)
            kv = (k_BSGK, v_BSGK)
            if isinstance(k_BSGK, quantised.Int8):
                k_BSGK, v_BSGK = (x.floats(q_BTNK.dtype) for x in kv)
        return self.out(attend(q_BTNK, k_BSGK, v_BSGK, mask_BTS)), kv


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: LlamaConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        new = dict(use_bias=False, dtypes=dtypes, rngs=rngs)
        self.gate = Linear(cfg.width, cfg.mlp_width, **new)
        self.up = Linear(cfg.width, cfg.mlp_width, **new)
        self.down = Linear(cfg.mlp_width, cfg.width, **new)

    def __call__(self, x_BTD):
        return self.down(gated(self.gate(x_BTD), self.up(x_BTD)))


@jax.custom_vjp
def gated(gate_BTF, up_BTF):
    """silu(gate) * up."""
    return jax.nn.silu(gate_BTF) * up_BTF


def _gated_forward(gate_BTF, up_BTF):
    return gated(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _gated_backward(kept, cotangent_BTF):
    _, backward = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *kept)
    # Else a TPU's compiler computes both again for each tile of the products that read
    # them, which costs more than writing them once.
    return jax.lax.optimization_barrier(backward(cotangent_BTF))


gated.defvjp(_gated_forward, _gated_backward)


@jax.custom_vjp
def settled(x_BTD):
    """x_BTD, whose cotangent is summed up before anything else reads it."""
    return x_BTD


settled.defvjp(
    lambda x_BTD: (x_BTD, None),
    lambda _, cotangent_BTD: (jax.lax.optimization_barrier(cotangent_BTD),),
)


def rotary_angles(positions_BT, cfg: LlamaConfig):
    """Angles of each position, float32 [B T K/2]: bfloat16 would round 257 to 256."""
    half = jnp.arange(cfg.head_size // 2, dtype=jnp.float32)
    freq_K = cfg.rope_theta ** (-2.0 * half / cfg.head_size)
    return positions_BT.astype(jnp.float32)[..., None] * freq_K


def rotate(x_BTNK, angles_BTK):
    """Rotary embedding in Hugging Face's order: feature i turns with i + K/2."""
    cos, sin = jnp.cos(angles_BTK)[:, :, None], jnp.sin(angles_BTK)[:, :, None]
    turned = x_BTNK.astype(jnp.float32) * jnp.concatenate([cos, cos], -1)
    turned += quarter_turned(x_BTNK) * jnp.concatenate([sin, sin], -1)
    return turned.astype(x_BTNK.dtype)


def quarter_turned(x_BTNK):
    """(-x[K/2:], x[:K/2]) of each head, in float32."""
    if x_BTNK.dtype != jnp.bfloat16:
        return halves_moved(x_BTNK)
    # Of halves of heads a TPU fills half of its lanes.
    how = dict(tpu=turned_by_product, default=halves_moved)
    return jax.lax.platform_dependent(x_BTNK, **how)


def halves_moved(x_BTNK):
    """`quarter_turned`, as it is said."""
    first, second = jnp.split(x_BTNK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def turned_by_product(x_BTNK):
    """`quarter_turned` as a product whose sums have one term each, so it is exact."""
    one = jnp.ones(x_BTNK.shape[-1] // 2, x_BTNK.dtype)
    turn_KM = jnp.diag(one, len(one)) - jnp.diag(one, -len(one))
    how = dict(preferred_element_type=jnp.float32)
    return jnp.einsum("BTNK,KM->BTNM", x_BTNK, turn_KM, **how)


def write(cache_BS, new_BT, length_B):
    """Put T new entries into each row's places length_B ... length_B + T - 1."""
    if isinstance(cache_BS, quantised.Int8):
        new = quantised.Int8.of(new_BT)
        return jax.tree.map(lambda old, new: write(old, new, length_B), cache_BS, new)

    def row(cache_S, new_T, length):
        start = (length, *[0] * (cache_S.ndim - 1))
        return jax.lax.dynamic_update_slice(cache_S, new_T.astype(cache_S.dtype), start)

    return jax.vmap(row)(cache_BS, new_BT, length_B)
