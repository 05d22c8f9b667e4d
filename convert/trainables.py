"""python -m convert trainables FILE.pth --checkpoint DIR --out FILE.safetensors

What a checkpoint of the reference trained (its projector, and what else was not frozen)
-> the same parameters by our paths, for `--config.init`. Nothing is added: a part that
the file lacks is not in the result, and what is left out is logged with its reason.
"""

import logging
from collections import Counter
from pathlib import Path

from absl import flags

from convert import fit, parts, rules, sources, variants
from convert.model import KEEP, stream
from convert.sources import Source
from minigpt4_jax import checkpoint, storage
from minigpt4_jax.errors import CheckpointError, InputError
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.storage import Streamed

logger = logging.getLogger(__name__)

OWN = "llama_proj."


def define_flags() -> None:
    """The flags of `convert trainables`."""
    flags.DEFINE_string("checkpoint", None, "The model: a folder of `convert model`.")
    flags.DEFINE_string("out", None, "FILE.safetensors to write; must not exist.")


def main(argv: list[str]) -> None:
    """Read the flags and convert."""
    args = flags.FLAGS
    if len(argv) != 2 or not args.checkpoint or not args.out:
        raise InputError(
            "convert trainables needs one FILE.pth, --checkpoint and --out, and no more"
        )
    print(convert(Path(argv[1]), args.checkpoint, Path(args.out)))


def convert(path: Path, model: str | Path, out: Path) -> Path:
    """Writes the parameters of a reference's checkpoint for a converted model; `out`.

    Args:
        model: the converted directory (or its name) whose preset they have to fit.

    Raises:
        CheckpointError: the file is damaged, wants to run code, or is of another model;
            or lists every tensor that is unknown, misshapen or not all there.
    """
    if out.exists():
        raise InputError(f"--out: {out} exists; name another, or remove it")
    source = sources.read(path)
    arrays = parameters(source, checkpoint.read_config(checkpoint.resolve(model)))
    storage.check_room(out, sum(array.nbytes for array in arrays.values()))
    try:
        storage.write_safetensors(out, arrays)
    finally:
        out.with_name(f".{out.name}.part").unlink(missing_ok=True)
    for name, array in arrays.items():
        logger.info("%s %s %s", name, list(array.shape), array.dtype)
    return out


def parameters(source: Source, config: MiniGPT4Config) -> dict[str, Streamed]:
    """What the file holds, by path, unread; says what it leaves out."""
    check_variant(source, config)
    table = parts.tables("projector", source)
    held = rules.filled(table, source)
    shapes = checkpoint.parameter_shapes(config)
    wanted = {path: shape for path, shape in shapes.items() if path in held}
    try:
        fills = rules.plan(table, source, wanted)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    for reason, count in Counter(rules.dropped(table, source).values()).items():
        logger.info("%d left out: %s", count, reason)
    return {fill.path: stream(fill, source, KEEP) for fill in fills}


def check_variant(source: Source, config: MiniGPT4Config) -> None:
    """Raise CheckpointError, in one sentence, for a file of another model."""
    if "llama_proj.weight" not in source:
        raise CheckpointError(
            f"{source.path}: no llama_proj.weight in it, found {variants.some(source)}; "
            "want a checkpoint of MiniGPT-4, or of `convert export`"
        )
    if len(source["llama_proj.weight"].shape) != 2:
        return  # no projector of any model; `plan` says what is wanted
    # By these alone: of the rest there need not be enough to tell what it is.
    own = {n: t for n, t in source.items() if n.startswith(OWN) or "lora_" in n}
    part = variants.find(Source(source.path, own, source.files), "projector")
    if problems := fit.mismatches(config, {"projector": part}):
        raise CheckpointError(f"{source.path}: {'; '.join(problems)}")
