"""Which rules read which part of a model, out of whatever file the part comes in.

A file may hold more than is asked of it (a whole BLIP-2, a training checkpoint); each
table names what it leaves out, and why.
"""

import re
from collections.abc import Iterable

from convert import llama, qformer, vit
from convert.rules import KEEP, Drop, Rule
from convert.sources import Source

Table = tuple[Rule | Drop, ...]

# `beside:KEY` is what stands next to a state dict in a torch file.
BESIDE = (
    Drop(r"beside:optimizer", "moments of the run that made the file"),
    Drop(r"beside:scaler", "loss scale of the run that made the file"),
    Drop(r"beside:config", "configuration of the run that made the file"),
    Drop(r"beside:(epoch|iter|iters|iteration|step)", "progress of that run"),
    Drop(r"beside:_metadata", "versions of torch's modules"),
)
_DECODER = Drop(
    r"(language_model|t5_model|opt_model|llm_model|lm_head)\..*",
    "BLIP-2's decoder; --llm names MiniGPT-4's",
)
_QFORMER = Drop(
    r"(query_tokens|Qformer\..*|qformer\..*|(t5|opt|llm)_proj\..*|"
    r"language_projection\..*|(vision|text|itm)_(proj|head)\..*|temp)",
    "not the vision tower; --qformer takes it",
)
_LN_VISION = Drop(
    r"(ln_vision|(vision_model\.)?post_layernorm)\.(weight|bias)",
    "the norm behind the tower; --qformer takes it, since BLIP-2 trained it",
)
_TOWER = Drop(
    r"(visual_encoder\..*|vision_model\.(embeddings|encoder)\..*)",
    "the vision tower; --vit takes it",
)
_FIRST_STAGE = Drop(
    r"(vision_proj|text_proj|itm_head)\.(weight|bias)|temp",
    "heads of BLIP-2's first stage, which compare images with texts",
)
_INSTRUCT = Drop(r"llm_proj\.(weight|bias)", "InstructBLIP's projector to Vicuna 1.1")
_HF_TEXT = (
    Drop(
        r"qformer\.embeddings\.(word_embeddings|position_embeddings)\.weight|"
        r"qformer\.embeddings\.position_ids",
        "MiniGPT-4 gives the Q-Former no text",
    ),
    Drop(
        r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.(dense|LayerNorm)\..*",
        "the text branch; MiniGPT-4 runs the query path alone",
    ),
    Rule(r"qformer\.embeddings\.layernorm\.weight", "qformer/norm/scale", KEEP),
    Rule(r"qformer\.embeddings\.layernorm\.bias", "qformer/norm/bias", KEEP),
    Rule(r"vision_model\.post_layernorm\.weight", "ln_vision/scale", KEEP),
    Rule(r"vision_model\.post_layernorm\.bias", "ln_vision/bias", KEEP),
)
_BUFFERS = (
    Drop(
        r"Qformer\.bert\.embeddings\.position_ids",
        "a buffer; queries have no positions",
    ),
    Drop(
        r"llama_model\..*rotary_emb\.inv_freq",
        "rotary angles are computed from rope_theta",
    ),
)


def tables(part: str, source: Source) -> Table:
    """The rules for a part ("vit", "qformer", "llama", "projector") of this source."""
    return {
        "vit": _vit_table,
        "qformer": _qformer_table,
        "llama": _llama_table,
        "projector": _projector_table,
    }[part](source)


def rooms(part: str, source: Source) -> tuple[str, ...]:
    """The first names of the parameters that a source fills as this part.

    A MiniGPT-4 checkpoint holds what its run trained: the projector, and whatever else
    was not frozen. Without a Q-Former nothing of BLIP-2 is read, so `ln_vision` stays
    ones and zeros there unless that checkpoint holds it.
    """
    if part == "vit":
        own_norm = any(
            re.fullmatch(r"(backbone\.)?layernorm\.weight", n) for n in source
        )
        return ("vit", "ln_vision") if own_norm else ("vit",)
    if part == "projector":
        more = {
            "vit": r"visual_encoder\..*",
            "ln_vision": r"ln_vision\..*",
            "qformer": r"Qformer\..*layer\..*|query_tokens",
        }
        found = (room for room, p in more.items() if _any(p, source))
        return ("projector", *found)
    return {"qformer": ("qformer", "ln_vision"), "llama": ("llama",)}[part]


def _vit_table(source: Source) -> Table:
    if _any(r"(visual_encoder\.)?cls_token", source):
        return (*BESIDE, _QFORMER, _LN_VISION, _DECODER, *vit.EVA)
    if _any(r"(vision_model\.)?embeddings\.class_embedding", source):
        return (*BESIDE, _QFORMER, _LN_VISION, _DECODER, *vit.HF_BLIP2)
    return (*BESIDE, *vit.DINOV2_HF)


def _qformer_table(source: Source) -> Table:
    if _any(r"(Qformer\.)?bert\..*", source):
        return (*BESIDE, _TOWER, _DECODER, _FIRST_STAGE, _INSTRUCT, *qformer.LAVIS)
    return (*BESIDE, _TOWER, _DECODER, *_HF_TEXT, *qformer.HF)


def _llama_table(source: Source) -> Table:
    return (*BESIDE, *(llama.GGUF if "token_embd.weight" in source else llama.HF))


def _projector_table(source: Source) -> Table:
    return (*BESIDE, *_BUFFERS, *qformer.PROJECTOR, *qformer.LAVIS, *vit.EVA)


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)
