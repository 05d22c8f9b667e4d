"""python -m convert doctor FILE|DIR...: what each is, what fits with what, what is wrong.

Files of weights are told by names and shapes; several of them are looked at as parts of
one model. A converted directory, or a work directory of a training, is tested (selftest).
The exit code is 4 when anything is wrong, else 0.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags

from convert import fit, selftest, sources, variants, vicuna
from convert.sources import Source
from convert.variants import Part
from minigpt4_jax import checkpoint, locate
from minigpt4_jax.errors import CheckpointError, InputError
from minigpt4_jax.models.minigpt4 import PRESETS


def define_flags() -> None:
    """The flags of `convert doctor`."""
    flags.DEFINE_string(
        "preset", None, "What the files should make: a preset's name, or a JSON file."
    )


def main(argv: list[str]) -> int:
    """Look at every path; returns the exit code."""
    if not argv[1:]:
        raise InputError("convert doctor needs files or folders to look at")
    found = examine(map(Path, argv[1:]), flags.FLAGS.preset)
    return CheckpointError.exit_code if found.problems else 0


@dataclass
class Findings:
    """What was said, and which of it is wrong; said on stdout as it is found."""

    problems: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def wrong(self, problem: str) -> None:
        self.problems.append(problem)
        self.say(f"  wrong: {problem}")


@dataclass(frozen=True)
class Held:
    """A part, and the source that it was found in."""

    part: Part
    source: Source


def examine(paths: Iterable[Path], preset: str | None = None) -> Findings:
    """Says what the paths are, whether they fit, and how a converted one behaves.

    Args:
        preset: what the files should make; None: the one that they come nearest to.
    """
    found, held = Findings(), []
    for path in paths:
        if _is_ours(path):
            directory(path, found)
        else:
            held += weights(path, found)
    if held:
        together(held, preset, found)
    if found.problems:
        found.say(f"{len(found.problems)} wrong")
    return found


def _is_ours(path: Path) -> bool:
    """A converted directory, or a work directory of a training."""
    trained = (path / locate.TRAINABLES).exists() and (path / "config.json").exists()
    return (path / "preset.json").exists() or trained


def weights(path: Path, found: Findings) -> list[Held]:
    """Says which parts a file or folder holds."""
    try:
        source = sources.read(path)
        parts = variants.identify(source)
    except CheckpointError as error:
        found.say(f"{path}: cannot be used")
        found.wrong(str(error))
        return []
    if not parts:
        found.say(f"{path}: nothing that a preset is made of")
        found.wrong(f"{path} holds {variants.some(source)}; is it the right file?")
    else:
        found.say(f"{path}: {' and '.join(part.says for part in parts)}")
    return [Held(part, source) for part in parts]


def together(held: list[Held], preset: str | None, found: Findings) -> None:
    """Says which preset the parts make, or every mismatch."""
    chosen = _one_of_each(held, found)
    if not chosen:
        return
    parts = {name: one.part for name, one in chosen.items()}
    config = checkpoint.read_preset(preset) if preset else fit.nearest(parts)
    found.say(f"as {config.name}:")
    problems = fit.mismatches(config, parts)
    for problem in problems:
        found.wrong(problem)
    for doubt in fit.doubts(config, parts):
        found.say(f"  uncertain: {doubt}")
    absent = [variants.FLAGS[part] for part in fit.needed(config) if part not in parts]
    if problems:
        return
    if absent:
        found.say(f"  fits; {', '.join(absent)} would complete it")
    elif not found.problems:
        found.say(f"  complete: {_command(config.name, held, chosen)}")


def _one_of_each(held: list[Held], found: Findings) -> dict[str, Held]:
    """The parts by name: a base and its delta become one, contradictions are said."""
    held = _added(held, found)
    chosen: dict[str, Held] = {}
    for one in held:
        first = chosen.setdefault(one.part.name, one)
        if first.part.sizes != one.part.sizes:
            found.wrong(
                f"two of {variants.FLAGS[one.part.name]}: {first.source.path} is "
                f"{first.part.says}, {one.source.path} is {one.part.says}; give one"
            )
    return chosen


def _added(held: list[Held], found: Findings) -> list[Held]:
    """The parts, with a LLaMA and a delta replaced by their sum where they are a pair."""
    bases = [x for x in held if x.part.name == "llama" and not x.part.delta]
    deltas = [x for x in held if x.part.name == "llama" and x.part.delta]
    if len(bases) != 1 or len(deltas) != 1:
        return held
    others = [one for one in held if one.part.name != "llama"]
    try:
        total = vicuna.added(bases[0].source, deltas[0].source)
        part = variants.find(total, "llama")
    except CheckpointError as error:
        found.wrong(str(error))
        return others
    found.say(f"{bases[0].source.path} + {deltas[0].source.path}: {part.says}")
    return [*others, Held(part, total)]


def _command(preset: str, held: list[Held], chosen: dict[str, Held]) -> str:
    """What converts them."""
    words = ["python -m convert model", f"--preset {preset}"]
    for one in held:
        if one.part.name == "llama":
            flag = "--delta" if one.part.delta else "--llm"
        elif chosen[one.part.name] is one:
            flag = variants.FLAGS[one.part.name]
        else:
            continue
        words.append(f"{flag} {one.source.path}")
    return " ".join([*words, "--out DIR"])


def directory(path: Path, found: Findings) -> None:
    """Says which preset a converted directory is, and tests it."""
    try:
        config = checkpoint.read_config(path)
    except CheckpointError as error:
        found.say(f"{path}: cannot be used")
        found.wrong(str(error))
        return
    kind = "a converted directory"
    if checkpoint.base_directory(path) != path:
        kind = f"a training of {checkpoint.base_directory(path)}"
    known = "as published" if PRESETS.get(config.name) == config else "of its own sizes"
    how = checkpoint.stored_quantisation(path)
    few = {"decoder": how.decoder, "ViT": how.vision}
    few = "".join(f", its {name} in {bits}" for name, bits in few.items() if bits)
    found.say(f"{path}: {kind}, preset {config.name} {known}{few}")
    if config.template == "vicuna_v0" and config.llama.vocab_size == 32_000:
        found.wrong(
            "its decoder has 32000 rows, as LLaMA and Vicuna v1.1 have, under the "
            "template of v0, whose weights have 32001; convert it from Vicuna v0"
        )
    if not _has_projector(path):
        found.say("  frozen towers alone, to train a projector: nothing to ask yet")
        return
    for result in selftest.run(path):
        if result.state == selftest.FAILED:
            found.wrong(f"{result.name}: {result.says}")
        else:
            found.say(f"  {result.state}: {result.name}: {result.says}")


def _has_projector(path: Path) -> bool:
    """False where `convert model --no-projector` left it out; True when in doubt."""
    try:
        with contextlib.ExitStack() as files:
            return "projector/kernel" in checkpoint.open_all(path, files)
    except CheckpointError:
        return True  # the tests say what is wrong
