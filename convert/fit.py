"""Which parts go together: the preset of a conversion, and mismatches in words."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.variants import BLIP2_STAGE_1, INSTRUCT, PARTS, V0_VOCABULARY, Part
from minigpt4_jax import checkpoint, locate
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.models.minigpt4 import PRESETS, MiniGPT4Config

logger = logging.getLogger(__name__)

TOWERS = ("vit", "qformer", "llama")
# Not told by a shape: what config.json says of them wins over the preset.
FROM_FILE = ("eps", "rope_theta", "max_positions")
FILES = {
    "minigpt4_vicuna_7b": "prerained_minigpt4_7b.pth (so spelt)",
    "minigpt4_vicuna_13b": "pretrained_minigpt4.pth",
    "minigpt4_llama2_7b": "pretrained_minigpt4_llama2_7b.pth",
}


def settle(preset: str, parts: Mapping[str, Part]) -> MiniGPT4Config:
    """The preset of that name or JSON file, completed by what the parts tell.

    A JSON file may leave out any size that a file of weights tells.

    Raises:
        CheckpointError: listing every way in which the parts do not fit it.
    """
    config = _complete(preset, parts)
    problems = mismatches(config, parts)
    if problems:
        raise CheckpointError(
            f"preset {config.name!r} cannot be made of these files:\n  "
            + "\n  ".join(problems)
        )
    found = parts["llama"].sizes
    ours = dataclasses.asdict(config.llama)
    differ = {k: found[k] for k in FROM_FILE if k in found and found[k] != ours[k]}
    if differ:
        logger.info("the decoder's config.json wins over the preset: %s", differ)
    llama = dataclasses.replace(config.llama, **differ)
    return dataclasses.replace(config, llama=llama)


def _complete(preset: str, parts: Mapping[str, Part]) -> MiniGPT4Config:
    path = Path(preset)
    if path.suffix != ".json" or not path.is_file():
        return checkpoint.read_preset(preset)
    values = locate.read_json(path)
    for tower in TOWERS:
        if isinstance(values.get(tower), dict) and tower in parts:
            values[tower] = {**parts[tower].sizes, **values[tower]}
    return MiniGPT4Config.from_dict(values)


def mismatches(config: MiniGPT4Config, parts: Mapping[str, Part]) -> list[str]:
    """What does not fit, each with what to do; [] when all fits."""
    problems = [note for part in parts.values() for note in part.notes]
    if "vit" in parts:
        problems += _vit(config, parts["vit"])
    if "qformer" in parts:
        if config.qformer is None:
            problems.append(
                f"{parts['qformer'].says}: {config.name} has none; leave --qformer out"
            )
        else:
            problems += _sizes("qformer", config.qformer, parts["qformer"])
    if "llama" in parts:
        problems += _llama(config, parts["llama"])
    if "projector" in parts:
        problems += _projector(config, parts["projector"])
    return problems


def _vit(config: MiniGPT4Config, part: Part) -> list[str]:
    got, want = part.sizes["image_size"], config.vit.image_size
    if got > want:
        return [
            f"{part.says}, under a preset of {want} px: that tower belongs to MiniGPT-v2;"
            f" give the one of {want} px, or a preset with image_size {got}"
        ]
    # A smaller one is resized, as the reference does for 448 px.
    return _sizes("vit", config.vit, part, leave=("image_size",))


def _llama(config: MiniGPT4Config, part: Part) -> list[str]:
    if part.delta:
        return [
            f"{part.says}, which is a difference and no model: give the LLaMA it belongs "
            "to as --llm, and this as --delta"
        ]
    want, got = config.llama.vocab_size, part.sizes["vocab_size"]
    same_width = part.sizes["width"] == config.llama.width
    if same_width and got == 32_000 and config.template == "vicuna_v0":
        return [
            f"{part.says}: {got} rows, want the {V0_VOCABULARY} of Vicuna v0. LLaMA needs "
            "the v0 delta (--delta); v1.1 answers another template, and projectors were "
            "not trained with it"
        ]
    if same_width and got == V0_VOCABULARY != want:
        return [
            f"{part.says}: {got} rows, want {want}; that one belongs to the presets "
            "minigpt4_vicuna_7b and minigpt4_vicuna_13b"
        ]
    return _sizes("llama", config.llama, part, leave=FROM_FILE)


def doubts(config: MiniGPT4Config, parts: Mapping[str, Part]) -> list[str]:
    """What no shape tells, where it matters."""
    return [*_other_qformer(parts), *_other_decoder(config, parts)]


def _other_qformer(parts: Mapping[str, Part]) -> list[str]:
    says = parts["qformer"].says if "qformer" in parts else ""
    if not says.endswith((INSTRUCT, BLIP2_STAGE_1)):
        return []
    return [
        f"{says}: good for training a projector; the published ones were trained on that "
        "of blip2_pretrained_flant5xxl.pth"
    ]


def _other_decoder(config: MiniGPT4Config, parts: Mapping[str, Part]) -> list[str]:
    if config.template != "llama2" or "llama" not in parts:
        return []
    if "Llama-2" in (says := parts["llama"].says):
        return [f"{says}: want the chat model; `convert doctor` on the result asks it"]
    return [
        f"{says}: want Llama-2 chat, whose first copies look the same; 2048 positions and "
        f"eps {parts['llama'].sizes['eps']:g} speak for LLaMA 1 or Vicuna v1.1"
    ]


def nearest(parts: Mapping[str, Part]) -> MiniGPT4Config:
    """The preset with the fewest mismatches; of several, the one of the decoder's width,
    since a decoder is what people have chosen."""
    width = parts["llama"].sizes["width"] if "llama" in parts else None

    def distance(config: MiniGPT4Config) -> tuple[int, bool]:
        return len(mismatches(config, parts)), config.llama.width != width

    return min(PRESETS.values(), key=distance)


def needed(config: MiniGPT4Config) -> list[str]:
    """The parts that a preset is made of."""
    return [part for part in PARTS if part != "qformer" or config.qformer is not None]


def _projector(config: MiniGPT4Config, part: Part) -> list[str]:
    got = part.sizes["projector_width"], part.sizes["width"]
    want = config.projector_width, config.llama.width
    if got == want:
        return []
    file = FILES.get(config.name)
    advice = f"; its own file is called {file}" if file else ""
    return [
        f"{part.says}, under {config.name}, which has {want[0]} -> {want[1]}{advice}"
    ]


def _sizes(tower: str, config: Any, part: Part, leave=()) -> list[str]:
    ours = dataclasses.asdict(config)
    differ = [
        f"{name} {got}, want {ours[name]}"
        for name, got in part.sizes.items()
        if name not in leave and name in ours and got != ours[name]
    ]
    return [f"{part.says}: {tower} has {'; '.join(differ)}"] if differ else []
