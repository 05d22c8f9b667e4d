"""Torch peers of our towers with the same random weights: preset -> (ours, theirs).

The weights are drawn in torch, at a size where a wrong GELU or swapped heads are seen
(std 1/sqrt(width), every norm and bias random), and reach us through the converter.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from convert import llama as llama_rules
from convert import qformer as qformer_rules
from convert import rules
from convert import vit as vit_rules
from minigpt4_jax.models.layers import DTypes, LayerNorm
from minigpt4_jax.models.llama import Llama, LlamaConfig
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4_jax.models.qformer import QFormer, QFormerConfig
from minigpt4_jax.models.vit import ViT, ViTConfig

# On an accelerator the default rounds the factors of every product to 8 or 11 bits.
jax.config.update("jax_default_matmul_precision", "highest")

TOLERANCE = 2e-5
"""Of the largest absolute value of theirs: float32 sums of a few blocks, in any order."""


def error(ours, theirs) -> float:
    """Largest absolute difference over the largest absolute value of theirs."""
    ours, theirs = as_array(ours), as_array(theirs)
    assert ours.shape == theirs.shape, (
        f"shapes: ours {ours.shape}, theirs {theirs.shape}"
    )
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_close(ours, theirs, tolerance: float = TOLERANCE):
    """Raise unless the shapes are equal and `error` is below the tolerance."""
    found = error(ours, theirs)
    # Written so that a NaN fails.
    assert found < tolerance, f"error {found:.2e}, allowed {tolerance:.0e}"


def as_array(value) -> np.ndarray:
    """A float64 NumPy array of a torch or JAX tensor."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    return np.asarray(value, dtype=np.float64)


def randomize(module: torch.nn.Module, seed: int):
    """Fill every parameter with noise: std 1/sqrt(width), norms around 1, biases 0.3."""
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        summed = isinstance(owner, torch.nn.Linear | torch.nn.Conv2d)
        scales = type(owner).__name__.endswith(("LayerNorm", "RMSNorm", "LayerScale"))
        for name, parameter in owner.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                value = 0.3 * noise + (scales and name != "bias")
            else:
                width = parameter[0].numel() if summed else parameter.shape[-1]
                value = noise / width**0.5
            parameter.data.copy_(value)
    return module.eval().requires_grad_(False)


def quieten(module: torch.nn.Module, factor: float):
    """Scale all that is added to the residual stream, so that the eps of norms matters.

    At unit size a norm's eps of 1e-5 for 1e-6 is far below any tolerance.
    """
    added = r".*(embed|query_tokens|layernorm|LayerNorm|projection|o_proj|down_proj|fc2"
    for name, parameter in module.named_parameters():
        if re.match(added + r"|output\.dense|output_query)", name):
            parameter.data.mul_(factor)


# The towers of transformers, each with our config's sizes


def blip2_vision(cfg: ViTConfig, seed: int = 0) -> torch.nn.Module:
    """EVA ViT and `ln_vision`: transformers has one eps for both, the reference two."""
    model = transformers.Blip2VisionModel(
        transformers.Blip2VisionConfig(
            hidden_size=cfg.width,
            intermediate_size=cfg.mlp_width,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            image_size=cfg.image_size,
            patch_size=cfg.patch_size,
            layer_norm_eps=cfg.eps,
            attn_implementation="eager",
        )
    )
    model.post_layernorm = torch.nn.LayerNorm(cfg.width, eps=cfg.ln_vision_eps)
    randomize(model, seed)
    for layer in model.encoder.layers:
        layer.self_attn.qkv.bias.data[cfg.width : 2 * cfg.width] = 0
    return model


def dinov2(cfg: ViTConfig, seed: int = 0) -> torch.nn.Module:
    """DINOv2: with a key bias and LayerScale, its final norm in ln_vision's place."""
    ratio, rest = divmod(cfg.mlp_width, cfg.width)
    assert rest == 0 and cfg.eps == cfg.ln_vision_eps, (
        "transformers' config has no other"
    )
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=cfg.width,
            mlp_ratio=ratio,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            image_size=cfg.image_size,
            patch_size=cfg.patch_size,
            layer_norm_eps=cfg.eps,
            attn_implementation="eager",
        )
    )
    return randomize(model, seed)


class Queries(torch.nn.Module):
    """Blip2QFormerModel with its query tokens: patches -> queries."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.query_tokens = torch.nn.Parameter(
            torch.zeros(1, cfg.num_queries, cfg.width)
        )
        self.qformer = transformers.Blip2QFormerModel(
            transformers.Blip2QFormerConfig(
                hidden_size=cfg.width,
                num_hidden_layers=cfg.num_layers,
                num_attention_heads=cfg.num_heads,
                intermediate_size=cfg.mlp_width,
                encoder_hidden_size=cfg.encoder_width,
                cross_attention_frequency=cfg.cross_attention_freq,
                layer_norm_eps=cfg.eps,
                attn_implementation="eager",
            )
        )

    def forward(self, patches_BPE, **kwargs):
        return self.qformer(
            query_embeds=self.query_tokens.expand(len(patches_BPE), -1, -1),
            encoder_hidden_states=patches_BPE,
            **kwargs,
        )


def blip2_qformer(cfg: QFormerConfig, seed: int = 0) -> torch.nn.Module:
    """Q-Former with query tokens, query path only."""
    return randomize(Queries(cfg), seed)


def llama(cfg: LlamaConfig, seed: int = 0) -> torch.nn.Module:
    """LLaMA with any rope theta and any number of key/value heads."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.width,
            intermediate_size=cfg.mlp_width,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads,
            head_dim=cfg.head_size,
            max_position_embeddings=cfg.max_positions,
            rms_norm_eps=cfg.eps,
            tie_word_embeddings=cfg.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        )
    )
    return randomize(model, seed)


class Whole(torch.nn.Module):
    """The reference's data flow from torch peers; one row of a batch, no padding."""

    def __init__(self, cfg: MiniGPT4Config, seed: int = 0):
        super().__init__()
        self.strip = cfg.patches_per_token
        self.vision = vision_peer(cfg.vit, seed)
        if cfg.qformer is not None:
            self.queries = blip2_qformer(cfg.qformer, seed + 1)
        self.llama_proj = torch.nn.Linear(cfg.projector_width, cfg.llama.width)
        randomize(self.llama_proj, seed + 2)
        self.decoder = llama(cfg.llama, seed + 3)

    def encode_image(self, pixels_BHWC):
        patches_BPE = self.vision(channels_first(pixels_BHWC)).last_hidden_state
        if hasattr(self, "queries"):
            return self.llama_proj(self.queries(patches_BPE).last_hidden_state)
        b, p, e = patches_BPE.shape
        grouped = patches_BPE[:, 1:].reshape(b, (p - 1) // self.strip, self.strip * e)
        return self.llama_proj(grouped)

    def forward(self, before_ids, image_QD, after_ids):
        """Ids before the image, its embeddings, ids after it -> logits_TV."""
        embed = self.decoder.get_input_embeddings()
        before_TD, after_TD = (
            embed(torch.tensor(before_ids)),
            embed(torch.tensor(after_ids)),
        )
        x_TD = torch.cat([before_TD, image_QD, after_TD])
        return self.decoder(inputs_embeds=x_TD[None]).logits[0]


def channels_first(pixels_BHWC) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels_BHWC)).permute(0, 3, 1, 2)


# Ours with the same weights


def vision(cfg: ViTConfig, seed: int = 0, scale: float = 1.0):
    """(ours, theirs): nnx.Dict with `vit` and `ln_vision`, and its peer.

    Args:
        scale: of what is added to the residual stream (`quieten`).
    """
    theirs = vision_peer(cfg, seed)
    quieten(theirs, scale)

    def make():
        norm = LayerNorm(cfg.width, cfg.ln_vision_eps, dtypes=DTypes())
        return nnx.Dict(vit=ViT(cfg, rngs=nnx.Rngs(0)), ln_vision=norm)

    return convert(make, vision_table(cfg), theirs.state_dict()), theirs


def vision_peer(cfg: ViTConfig, seed: int = 0) -> torch.nn.Module:
    """LayerScale tells DINOv2 from EVA."""
    return dinov2(cfg, seed) if cfg.layer_scale else blip2_vision(cfg, seed)


def vision_table(cfg: ViTConfig):
    return vit_rules.DINOV2_HF if cfg.layer_scale else vit_rules.HF_BLIP2


def queries(cfg: QFormerConfig, seed: int = 0, scale: float = 1.0):
    """(ours, theirs)."""
    theirs = blip2_qformer(cfg, seed)
    quieten(theirs, scale)

    def make():
        return nnx.Dict(qformer=QFormer(cfg, rngs=nnx.Rngs(0)))

    return convert(make, qformer_rules.HF, theirs.state_dict()).qformer, theirs


def decoder(cfg: LlamaConfig, seed: int = 0, scale: float = 1.0):
    """(ours, theirs)."""
    theirs = llama(cfg, seed)
    quieten(theirs, scale)

    def make():
        return nnx.Dict(llama=Llama(cfg, rngs=nnx.Rngs(0)))

    return convert(make, llama_rules.HF, theirs.state_dict()).llama, theirs


def minigpt4(cfg: MiniGPT4Config, seed: int = 0) -> tuple[MiniGPT4, Whole]:
    """(ours, theirs)."""
    theirs = Whole(cfg, seed)
    tower = "backbone." if cfg.vit.layer_scale else "vision_model."
    source = {tower + k: v for k, v in theirs.vision.state_dict().items()}
    if cfg.qformer is not None:
        source |= theirs.queries.state_dict()
    source |= {f"llama_proj.{k}": v for k, v in theirs.llama_proj.state_dict().items()}
    source |= theirs.decoder.state_dict()
    table = vision_table(cfg.vit) + qformer_rules.HF + llama_rules.HF
    table += qformer_rules.PROJECTOR
    return convert(lambda: MiniGPT4(cfg, rngs=nnx.Rngs(0)), table, source), theirs


def convert(make: Callable, table: Iterable, source: Mapping[str, torch.Tensor]):
    """The module that `make` builds, every parameter filled by the converter's table."""
    module = nnx.eval_shape(make)
    flat = {"/".join(map(str, path)): p for path, p in parameters(module)}
    arrays = rules.apply(table, source, {k: p.shape for k, p in flat.items()})
    for path, parameter in flat.items():
        parameter.set_value(jnp.asarray(arrays[path]))
    return module


def parameters(module: nnx.Module) -> list:
    """(path, parameter) pairs; a parameter shares its value with the module."""
    found = nnx.iter_graph(module)
    return [(path, node) for path, node in found if isinstance(node, nnx.Param)]


def blocks_of(theirs: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a peer, in order."""
    encoder = getattr(theirs, "qformer", getattr(theirs, "model", theirs))
    encoder = getattr(encoder, "encoder", encoder)
    return list(encoder.layer if hasattr(encoder, "layer") else encoder.layers)


@nnx.jit
def call(module: nnx.Module, *args, **kwargs):
    """module(*args), compiled once for each configuration and shape of a test run."""
    return module(*args, **kwargs)


# What a computation does


def normal(seed: int, *shape: int) -> np.ndarray:
    """Unit normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def equations(function, *args) -> list:
    """All equations of a traced function, those inside scans and calls included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr))


def record(blocks: Iterable[torch.nn.Module]) -> list:
    """A list that fills with the (input, output) of each block as they run."""
    seen = []

    def hook(block, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x, output[0] if isinstance(output, tuple) else output))

    for block in blocks:
        block.register_forward_hook(hook, with_kwargs=True)
    return seen
