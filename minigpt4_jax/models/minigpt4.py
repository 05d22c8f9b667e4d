"""MiniGPT-4: ViT -> ln_vision -> Q-Former -> projector -> slots of a LLaMA prompt."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.errors import ConfigError, unknown
from minigpt4_jax.models import llama as llama_lib
from minigpt4_jax.models import qformer as qformer_lib
from minigpt4_jax.models import vit as vit_lib
from minigpt4_jax.models.layers import (
    BRANCHES,
    Capture,
    DTypes,
    LayerNorm,
    Linear,
    check_kinds,
)
from minigpt4_jax.models.llama import Cache, Llama, LlamaConfig
from minigpt4_jax.models.qformer import QFormer, QFormerConfig
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.models.vit import ViT, ViTConfig

TOWERS: dict[str, tuple[type, Mapping[str, Any]]] = {
    "vit": (ViTConfig, vit_lib.PRESETS),
    "qformer": (QFormerConfig, qformer_lib.PRESETS),
    "llama": (LlamaConfig, llama_lib.PRESETS),
}


@dataclasses.dataclass(frozen=True)
class MiniGPT4Config:
    """A whole model: its towers, and what text must look like for its decoder."""

    name: str
    vit: ViTConfig
    qformer: QFormerConfig | None  # None: strips of patches go to the projector
    llama: LlamaConfig
    template: str  # a name of data/prompts.py
    bos_id: int
    eos_ids: tuple[int, ...]
    patches_per_token: int = 4  # length of a strip, only without a Q-Former

    def __post_init__(self):
        check_kinds("preset", self)
        ids = (self.bos_id, *self.eos_ids)
        if not self.eos_ids or min(ids) < 0 or max(ids) >= self.llama.vocab_size:
            raise ConfigError(
                f"preset {self.name!r}: bos_id={self.bos_id}, eos_ids={self.eos_ids}; "
                f"want at least one end, and ids below {self.llama.vocab_size}"
            )
        if self.qformer is None:
            patches, length = self.vit.num_patches - 1, self.patches_per_token
            if length < 1 or patches % length:
                raise ConfigError(
                    f"preset {self.name!r}: strips of patches_per_token={length} do not "
                    f"divide the {patches} patches of the vit"
                )
        elif self.qformer.encoder_width != self.vit.width:
            raise ConfigError(
                f"preset {self.name!r}: qformer.encoder_width="
                f"{self.qformer.encoder_width} is not vit.width={self.vit.width}"
            )

    @property
    def num_slots(self) -> int:
        """Image embeddings of one image."""
        if self.qformer is not None:
            return self.qformer.num_queries
        return (self.vit.num_patches - 1) // self.patches_per_token

    @property
    def projector_width(self) -> int:
        """Input width of the projector."""
        if self.qformer is not None:
            return self.qformer.width
        return self.vit.width * self.patches_per_token

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "MiniGPT4Config":
        """The reverse of `to_dict`; a tower may be the name of its preset, as "eva_g".

        An unknown or absent key raises ConfigError.
        """
        values = dict(values)
        for key, (part, known) in TOWERS.items():
            value = values.get(key)
            if isinstance(value, str):
                if value not in known:
                    raise ConfigError(unknown(f"preset.{key}", value, known))
                values[key] = known[value]
            elif key in values and not (key == "qformer" and value is None):
                values[key] = _fill(part, value, f"preset.{key}")
        return _fill(cls, values, "preset")


def _fill(cls, values: object, where: str):
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: got {values!r}, want an object with its keys")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigError(unknown(f"key in {where}", name, known))
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING]
    absent = [name for name in required if name not in values]
    if absent:
        raise ConfigError(f"{where}: {', '.join(absent)} absent; add it to the JSON")
    lists_to_tuples = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
    }
    return cls(**lists_to_tuples)


MINIGPT4_VICUNA_7B = MiniGPT4Config(
    name="minigpt4_vicuna_7b",
    vit=vit_lib.EVA_G,
    qformer=qformer_lib.BLIP2,
    llama=llama_lib.VICUNA_7B,
    template="vicuna_v0",
    bos_id=1,
    eos_ids=(2,),
)
MINIGPT4_VICUNA_13B = dataclasses.replace(
    MINIGPT4_VICUNA_7B, name="minigpt4_vicuna_13b", llama=llama_lib.VICUNA_13B
)
MINIGPT4_LLAMA2_7B = dataclasses.replace(
    MINIGPT4_VICUNA_7B,
    name="minigpt4_llama2_7b",
    qformer=None,
    llama=llama_lib.LLAMA2_7B_CHAT,
    template="llama2",
)
DEMO = MiniGPT4Config(
    name="demo",
    vit=vit_lib.DINOV2_S,
    qformer=qformer_lib.DEMO,
    llama=llama_lib.SMOLLM2_135M,
    template="chatml",
    bos_id=1,
    eos_ids=(2,),
)
PRESETS = {
    preset.name: preset
    for preset in (MINIGPT4_VICUNA_7B, MINIGPT4_VICUNA_13B, MINIGPT4_LLAMA2_7B, DEMO)
}


def preset(name: str) -> MiniGPT4Config:
    """The preset of that name; an unknown one raises ConfigError with the nearest."""
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    return PRESETS[name]


class MiniGPT4(nnx.Module):
    """See, query, project, talk. A tower is replaced by passing another module.

    Args:
        vit: None: built from cfg, as the other towers. Else any module called as
            (pixels_BHWC, capture=None) that returns patches_BPE, E = cfg.vit.width.
        qformer: called as (patches_BPE, capture=None), returns queries_BQD, Q and D as
            in cfg.qformer.
        llama: called as (x_BTD, segments_BT, positions_BT, cache=None, capture=None),
            returns (hidden_BTD, cache); its methods embed(ids_BT), logits(hidden_BTD)
            and, to generate, new_cache(batch, places) are those of Llama.
    """

    def __init__(
        self,
        cfg: MiniGPT4Config,
        *,
        dtypes: DTypes = DTypes(),
        rngs: nnx.Rngs,
        vit: nnx.Module | None = None,
        qformer: nnx.Module | None = None,
        llama: nnx.Module | None = None,
    ):
        self.cfg = cfg
        trained = dataclasses.replace(dtypes, param="float32")
        self.vit = vit or ViT(cfg.vit, dtypes=dtypes, rngs=rngs)
        self.ln_vision = LayerNorm(cfg.vit.width, cfg.vit.ln_vision_eps, dtypes=dtypes)
        if qformer is None and cfg.qformer is not None:
            qformer = QFormer(cfg.qformer, dtypes=dtypes, rngs=rngs)
        self.qformer = qformer
        # About as long as a decoder's token embeddings, so that training need not first
        # shrink them. A trial with 7 times that length ended with queries all alike.
        self.projector = Linear(
            cfg.projector_width,
            cfg.llama.width,
            std=0.01,
            dtypes=trained,
            rngs=rngs,
        )
        self.llama: Any = llama or Llama(cfg.llama, dtypes=dtypes, rngs=rngs)

    def set_remat(self, blocks: bool) -> None:
        """Whether a gradient computes the inside of blocks twice instead of keeping it.

        Memory for a third more time; no value changes.
        """
        towers: tuple[Any, ...] = (self.vit, self.qformer, self.llama)
        for tower in towers:
            if tower is not None:
                tower.remat = blocks

    def set_gather(self, gather: Callable[[str, nnx.State], nnx.State]) -> None:
        """How a block of ViT or decoder gets its whole weights, where devices hold parts.

        Args:
            gather: (path of the stack, state of one block, without L) -> its whole state.
        """
        for name in ("vit", "llama"):
            tower: Any = getattr(self, name)
            tower.gather = functools.partial(gather, f"{name}/blocks")

    def quantise(self, how: Quantisation) -> None:
        """Store weights and cache as `how` says, in the model itself (not of a list)."""
        towers = {"vit": self.vit, "llama": self.llama}
        for tower, module in towers.items():
            for path, part in list(nnx.iter_modules(module)):
                name = "/".join(map(str, (tower, *path)))
                if isinstance(part, Linear | llama_lib.Embedding):
                    leaf, ins = "embedding", 0
                    if isinstance(part, Linear):
                        leaf, ins = "kernel", part.ins
                    kind = how.kind(f"{name}/{leaf}", ins)
                    if kind:
                        part.quantise(kind)
        self.llama.kv_int8 = how.kv == "int8"

    def encode_image(self, pixels_BHWC, capture: Capture | None = None) -> jax.Array:
        """Normalised pixels -> image_BQD, as wide as the decoder's embeddings."""
        return self.project(self.encode_patches(pixels_BHWC, capture), capture)

    def encode_patches(self, pixels_BHWC, capture: Capture | None = None) -> jax.Array:
        """Normalised pixels -> patches_BPE: all that is frozen in every recipe."""
        return self.ln_vision(self.vit(pixels_BHWC, capture))

    def encode_queries(self, patches_BPE, capture: Capture | None = None) -> jax.Array:
        """patches_BPE (class token first) -> queries_BQD, what the projector reads."""
        if self.qformer is not None:
            return self.qformer(patches_BPE, capture)
        return strips(patches_BPE, self.cfg.patches_per_token)

    def project(self, patches_BPE, capture: Capture | None = None) -> jax.Array:
        """patches_BPE (class token first) -> image_BQD."""
        return self.projector(self.encode_queries(patches_BPE, capture))

    def embed_prompt(self, ids_BT, slots_BT, image_BQD) -> jax.Array:
        """Token embeddings with the image embeddings in the slots.

        Args:
            ids_BT: token ids; any valid id at slots.
            slots_BT: bool; row b has as many True as image_BQD has rows of Q (fewer
                leave the rest unused, as in a row without an image).
        """
        text_BTD = self.llama.embed(ids_BT)
        return text_BTD if image_BQD is None else splice(text_BTD, image_BQD, slots_BT)

    def __call__(
        self,
        ids_BT,
        slots_BT=None,
        image_BQD=None,
        *,
        segments_BT=None,
        positions_BT=None,
        cache: Cache | None = None,
        capture: Capture | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Float32 logits_BTV, or (logits_BTV, cache) when a cache is given.

        Without segments and positions a row is one causal text.
        """
        if segments_BT is None:
            segments_BT = jnp.full(ids_BT.shape, BRANCHES, jnp.int32)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        x_BTD = self.embed_prompt(ids_BT, slots_BT, image_BQD)
        hidden_BTD, new_cache = self.llama(
            x_BTD, segments_BT, positions_BT, cache, capture
        )
        logits_BTV = self.llama.logits(hidden_BTD)
        return logits_BTV if cache is None else (logits_BTV, new_cache)

    def loss(self, batch: dict, image_BQD) -> tuple[jax.Array, jax.Array]:
        """Sum of the cross-entropies of the answer tokens that count, and their number.

        Logits are computed only where an answer token is predicted, which also lets
        several branches be predicted from the last position they share.

        Args:
            batch: ids_RT, segments_RT, positions_RT; slots_RT, see `fill_slots`;
                answer_ids_RA are the tokens to be predicted, answer_from_RA the
                positions T whose hidden state predicts them, loss_mask_RA which of them
                count, if the example example_RA they belong to is ok_B (1, or 0 for one
                that could not be read). Images are counted from `first_example`, where
                the batch is a part of a larger one and has it.
        """
        first = batch.get("first_example", 0)
        text_RTD = self.llama.embed(batch["ids_RT"])
        slots_RT = batch["slots_RT"] - first * image_BQD.shape[1]
        x_RTD = fill_slots(text_RTD, image_BQD, slots_RT)
        hidden_RTD, _ = self.llama(x_RTD, batch["segments_RT"], batch["positions_RT"])
        hidden_RAD = jnp.take_along_axis(
            hidden_RTD, batch["answer_from_RA"][..., None], axis=1
        )
        losses_RA = cross_entropy(self.llama.logits(hidden_RAD), batch["answer_ids_RA"])
        counts_RA = batch["loss_mask_RA"] * batch["ok_B"][batch["example_RA"] - first]
        return (losses_RA * counts_RA).sum(), counts_RA.sum()


def cross_entropy(logits_RAV, ids_RA):
    """-log softmax(logits)[id]; the logits must be float32."""
    picked_RAV = jax.nn.one_hot(ids_RA, logits_RAV.shape[-1], dtype=bool)
    picked_RA = jnp.where(picked_RAV, logits_RAV, 0).sum(-1)
    return jax.nn.logsumexp(logits_RAV, axis=-1) - picked_RA


def fill_slots(text_RTD, image_BQD, slots_RT):
    """Put the image embeddings of a batch into the slots of its rows.

    Args:
        text_RTD: token embeddings; values at slots are ignored.
        slots_RT: b * Q + q of the image embedding that stands here; -1 where text does.
    """
    image_ID = image_BQD.reshape(-1, image_BQD.shape[-1])
    text_RT = slots_RT < 0
    # Beyond the end, so that text neither reads an image embedding nor adds to its
    # gradient.
    index_RT = jnp.where(text_RT, len(image_ID), slots_RT)
    spread_RTD = jnp.take(image_ID, index_RT, axis=0, mode="fill", fill_value=0)
    return jnp.where(text_RT[..., None], text_RTD, spread_RTD.astype(text_RTD.dtype))


def splice(text_BTD, image_BQD, slots_BT):
    """Put image embeddings into the slots of a prompt.

    Args:
        text_BTD: token embeddings; values at slots are ignored.
        image_BQD: image embeddings in the order of the slots.
        slots_BT: bool, at most Q True in each row (checked on the host, data/tokens.py).

    Source: the reference joins ragged lists in `MiniGPTBase.prompt_wrap`; fixed slots
    give the same sequence with static shapes.
    """
    index_BT = jnp.clip(jnp.cumsum(slots_BT, axis=1) - 1, 0)
    spread_BTD = jnp.take_along_axis(image_BQD, index_BT[..., None], axis=1)
    return jnp.where(slots_BT[..., None], spread_BTD.astype(text_BTD.dtype), text_BTD)


def strips(patches_BPE, length: int):
    """Join `length` consecutive patches of a row into one vector; class token dropped.

    Source: MiniGPT-4 for Llama-2 and MiniGPT-v2; a 1 x 4 strip, not a 2 x 2 square.
    """
    b, p, e = patches_BPE.shape
    return patches_BPE[:, 1:].reshape(b, (p - 1) // length, length * e)
