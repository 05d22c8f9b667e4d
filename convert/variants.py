"""What a file of weights is, from its tensors' names and shapes; no values but one norm's.

A part is one of "vit", "qformer", "llama", "projector"; a BLIP-2 file holds two of them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.sources import Source, number
from minigpt4_jax.errors import CheckpointError

PARTS = ("vit", "qformer", "llama", "projector")
FLAGS = {"vit": "--vit", "qformer": "--qformer", "llama": "--llm"}
FLAGS["projector"] = "--projector"
PUBLISHED = {  # (width of the decoder, input of the projector) -> preset
    (4096, 768): "minigpt4_vicuna_7b",
    (5120, 768): "minigpt4_vicuna_13b",
    (4096, 5632): "minigpt4_llama2_7b",
}
DECODERS = {4096: "7B", 5120: "13B", 6656: "30B", 8192: "65B or 70B"}
HF_DECODERS = {"t5": "FlanT5", "opt": "OPT"}
T5_SIZES = {2048: "-XL", 4096: "-XXL"}
OTHERS = ("OPT", "FlanT5-XL (")  # Q-Formers that no published projector knows
V0_VOCABULARY = 32_001  # LLaMA's 32,000 and the pad row that Vicuna v0 adds
INSTRUCT = "InstructBLIP"
BLIP2_STAGE_1 = "BLIP-2's first stage"
FIRST_STAGE = r"(vision_proj|text_proj|itm_head)\..*"  # heads that only it trains
# Norms of a trained decoder end near 1; a difference of two is far below.
DELTA_NORM = 0.2


@dataclass(frozen=True)
class Part:
    """One part that a source holds.

    Attributes:
        sizes: fields of the part's preset that the tensors (or config.json) tell.
        says: what it is, for people.
        delta: a difference of two decoders, not one itself.
        notes: why no preset can be made with it, each with what to do.
    """

    name: str
    sizes: Mapping[str, Any]
    says: str
    delta: bool = False
    notes: tuple[str, ...] = field(default=())


def identify(source: Source) -> list[Part]:
    """Every part found in a source; [] for something else."""
    finders = (_vit, _qformer, _llama, _projector)
    return [part for find in finders if (part := find(source)) is not None]


def find(source: Source, name: str) -> Part:
    """The part of that name; raises CheckpointError that says what is there instead."""
    parts = identify(source)
    found = next((part for part in parts if part.name == name), None)
    if found is None:
        held = " and ".join(part.says for part in parts) or some(source)
        advice = " or ".join(FLAGS[part.name] for part in parts)
        raise CheckpointError(
            f"{source.path}: want a {name}, found {held}"
            + (f", which {advice} takes" if advice else "")
        )
    return found


def some(source: Source) -> str:
    """The first names of a source that is none of ours."""
    return f"tensors like {', '.join(sorted(source)[:3])}"


def _vit(source: Source) -> Part | None:
    hit = _first(
        source,
        (
            r"((?:visual_encoder\.)?)cls_token",
            r"((?:vision_model\.)?)embeddings\.class_embedding",
            r"((?:backbone\.)?)embeddings\.cls_token",
        ),
    )
    if hit is None:
        return None
    kind, prefix = hit
    block, patch, positions, up = (
        ("blocks", "patch_embed.proj", "pos_embed", "mlp.fc1"),
        (
            "encoder.layers",
            "embeddings.patch_embedding",
            "embeddings.position_embedding",
            "mlp.fc1",
        ),
        (
            "encoder.layer",
            "embeddings.patch_embeddings.projection",
            "embeddings.position_embeddings",
            "mlp.fc1",
        ),
    )[kind]
    width, _, patch_size, _ = _shape(source, f"{prefix}{patch}.weight")
    grid = round((_shape(source, f"{prefix}{positions}")[1] - 1) ** 0.5)
    layers = _layers(
        source,
        rf"{re.escape(prefix + block)}\.(\d+)\.norm1\.weight|"
        rf"{re.escape(prefix + block)}\.(\d+)\.layer_norm1\.weight",
    )
    if kind == 0:
        layers = [layer for layer in layers if layer != 39]  # never built (vit.py)
    sizes = {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "num_layers": len(layers),
        "mlp_width": _shape(source, f"{prefix}{block}.0.{up}.weight")[0],
        "k_bias": kind == 2,
        "layer_scale": kind == 2,
    }
    name = "EVA ViT-g/14" if width == 1408 else f"a ViT of width {width}"
    return Part("vit", sizes, f"{name} at {grid * patch_size} px")


def _qformer(source: Source) -> Part | None:
    if "query_tokens" not in source:
        return None
    hit = _first(
        source,
        (
            r"((?:Qformer\.)?bert\.encoder\.layer\.)0\.attention\.self\.query\.weight",
            r"((?:qformer\.)?encoder\.layer\.)0\.attention\.attention\.query\.weight",
        ),
    )
    if hit is None:
        return None
    kind, layer = hit
    inner = ("self", "attention")[kind]
    start = re.escape(layer)
    layers = _layers(source, start + r"(\d+)\.intermediate_query\.dense\.weight")
    cross = _layers(source, start + rf"(\d+)\.crossattention\.{inner}\.query\.weight")
    key = _shape(source, f"{layer}0.crossattention.{inner}.key.weight")
    _, queries, width = _shape(source, "query_tokens")
    sizes = {
        "num_queries": queries,
        "width": width,
        "num_layers": len(layers),
        "mlp_width": _shape(source, f"{layer}0.intermediate_query.dense.weight")[0],
        "encoder_width": key[1],
        "cross_attention_freq": cross[1] - cross[0] if cross[1:] else len(layers),
    }
    decoder = _trained_for(source)
    says = f"a Q-Former of {len(layers)} layers and {queries} queries"
    if _instructed(source):
        says += f" out of {INSTRUCT}"
        decoder = ""
    elif any(re.fullmatch(FIRST_STAGE, name) for name in source):
        says += f" out of {BLIP2_STAGE_1}"
    else:
        says += f" out of BLIP-2 for {decoder}" if decoder else ""
    notes = ()
    if decoder.startswith(OTHERS):
        notes = (
            f"{says}: MiniGPT-4's projectors were trained on the one for FlanT5-XXL; "
            "give blip2_pretrained_flant5xxl.pth",
        )
    return Part("qformer", sizes, says, notes=notes)


def _instructed(source: Source) -> bool:
    """InstructBLIP's Q-Former reads the instruction too, so its words are there."""
    return (
        source.config.get("model_type") == "instructblip"
        or "qformer.embeddings.word_embeddings.weight" in source
        or "llm_proj.weight" in source
    )


def _trained_for(source: Source) -> str:
    """The decoder that a BLIP-2 Q-Former was trained for, by its old projector."""
    text = source.config.get("text_config") or {}
    kind = text.get("model_type", "") if isinstance(text, Mapping) else ""
    for name, decoder in (
        ("t5_proj.weight", "FlanT5"),
        ("opt_proj.weight", "OPT"),
        ("language_projection.weight", HF_DECODERS.get(kind, "another decoder")),
    ):
        if name in source:
            width = source[name].shape[0]
            size = T5_SIZES.get(width, "") if decoder == "FlanT5" else ""
            return f"{decoder}{size} (width {width})"
    return ""


def _llama(source: Source) -> Part | None:
    if "model.embed_tokens.weight" not in source and "token_embd.weight" not in source:
        return None
    sizes = llama_sizes(source)
    vocabulary, width = sizes["vocab_size"], sizes["width"]
    norm = next(n for n in ("model.norm.weight", "output_norm.weight") if n in source)
    largest = float(np.abs(np.asarray(source[norm]).astype(np.float32)).max())
    delta = largest < DELTA_NORM
    size = DECODERS.get(width, f"of width {width}")
    if vocabulary == V0_VOCABULARY:
        says = f"a Vicuna {size} v0 delta" if delta else f"Vicuna {size} v0"
    elif delta:
        says = f"a Vicuna {size} delta of v1.1 or later ({vocabulary} rows)"
    elif vocabulary == 32_000 and sizes.get("max_positions", 2048) >= 4096:
        says = f"Llama-2 {size} (base, chat and Vicuna v1.5 have the same shapes)"
    elif vocabulary == 32_000:
        says = f"LLaMA {size}, or Vicuna {size} v1.1, which has the same shapes"
    else:
        says = f"a LLaMA {size} with {vocabulary} rows"
    return Part("llama", sizes, says, delta=delta)


def llama_sizes(source: Source) -> dict[str, int | float | bool]:
    """Fields of `LlamaConfig` that tensors and config.json (or GGUF's metadata) tell."""
    if "token_embd.weight" in source:
        from convert.gguf_files import llama_numbers  # here: for GGUF files alone

        try:
            return llama_numbers(source.tensors)
        except KeyError as error:
            raise CheckpointError(
                f"{source.path}: its metadata has no {error.args[0]}; is it whole?"
            ) from error
    config = source.config
    embed = source["model.embed_tokens.weight"].shape
    if not config:
        raise CheckpointError(
            f"{source.path}: config.json is absent; it says the number of heads and eps"
        )
    scaling = config.get("rope_scaling") or {}
    rope = config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or rope.get("rope_type")
    if kind not in (None, "default"):
        raise CheckpointError(
            f"{source.path}: config.json asks for rotary scaling {kind!r}; want a LLaMA "
            "without it"
        )

    def stated(key: str) -> Any:
        return number(config, key, source.path / "config.json")

    heads = stated("num_attention_heads")
    found = {
        "vocab_size": embed[0],
        "width": embed[1],
        "num_layers": stated("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or embed[1] // heads,
        "mlp_width": stated("intermediate_size"),
        "eps": stated("rms_norm_eps"),
        "rope_theta": float(
            config.get("rope_theta") or rope.get("rope_theta") or 10_000.0
        ),
        "tie_embeddings": "lm_head.weight" not in source
        or bool(config.get("tie_word_embeddings", False)),
    }
    if config.get("max_position_embeddings"):
        found["max_positions"] = config["max_position_embeddings"]
    return found


def _projector(source: Source) -> Part | None:
    if "llama_proj.weight" not in source:
        return None
    out, into = _shape(source, "llama_proj.weight")
    preset = PUBLISHED.get((out, into))
    says = f"a projector {into} -> {out}" + (f" of {preset}" if preset else "")
    if not any("lora_" in name for name in source):
        return Part("projector", {"width": out, "projector_width": into}, says)
    says = f"a checkpoint of MiniGPT-v2: LoRA weights and a projector {into} -> {out}"
    notes = (
        f"{says}: MiniGPT-v2 is another model than any preset here; give MiniGPT-4's "
        "own checkpoint (for Llama-2: pretrained_minigpt4_llama2_7b.pth)",
    )
    sizes = {"width": out, "projector_width": into}
    return Part("projector", sizes, says, notes=notes)


def _first(source: Iterable[str], patterns: tuple[str, ...]) -> tuple[int, str] | None:
    """(index of the first pattern that a name matches, its group)."""
    for index, pattern in enumerate(patterns):
        for name in source:
            if hit := re.fullmatch(pattern, name):
                return index, hit.group(1)
    return None


def _layers(source: Iterable[str], pattern: str) -> list[int]:
    hits = (re.fullmatch(pattern, name) for name in source)
    return sorted(int(next(g for g in hit.groups() if g)) for hit in hits if hit)


def _shape(source: Source, name: str) -> tuple[int, ...]:
    if name not in source:
        raise CheckpointError(
            f"{source.path}: {name} is absent; is the file whole, and of the reference?"
        )
    return tuple(source[name].shape)
