"""python -m convert model --preset NAME --vit F --qformer F --llm DIR --projector F --out DIR

Published files of any of the presets -> a directory that `Generator.load` and the
trainer take. Nothing is written before every name and shape fits; what is written is
streamed, tensor by tensor, and appears under its name when it is whole.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from convert import fit, hashes, parts, sources, variants, vicuna, vit
from convert.casting import cast, finite, widest
from convert.rounding import in_few_bits
from convert.rules import Fill, dropped, mixed, plan
from convert.sources import Source
from convert.tensors import Tensor
from minigpt4_jax import checkpoint, locate, storage
from minigpt4_jax.data.tokens import load_tokenizer
from minigpt4_jax.errors import CheckpointError, InputError
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.models.quantised import KINDS, Quantisation
from minigpt4_jax.storage import Streamed

logger = logging.getLogger(__name__)

KEEP = "keep"
DTYPES = (KEEP, "bfloat16", "float32")
# Small and trained in float32; a 16-bit copy of them saves nothing.
ALWAYS_FLOAT32 = r"projector/.*|(.*/)?(\w*norm\d?|ln_vision)/(scale|bias)"
POSITIONS = r"(visual_encoder\.)?pos_embed|"
POSITIONS += r"((vision_model|backbone)\.)?embeddings\.position_embeddings?"


def define_flags() -> None:
    """The flags of `convert model`."""
    flags.DEFINE_string("preset", None, "Name of a preset, or a JSON file of one.")
    flags.DEFINE_string("vit", None, "eva_vit_g.pth, or a BLIP-2 file or folder.")
    flags.DEFINE_string("qformer", None, "A BLIP-2 file of LAVIS, or its HF folder.")
    flags.DEFINE_string("llm", None, "LLaMA: HF folder, Meta's folder, or a .gguf.")
    flags.DEFINE_string("delta", None, "Vicuna's delta, to be added to --llm.")
    flags.DEFINE_string("projector", None, "A MiniGPT-4 checkpoint.")
    flags.DEFINE_bool("no_projector", False, "Frozen weights alone, to train one.")
    flags.DEFINE_string("out", None, "Directory to write; must not exist.")
    flags.DEFINE_enum("dtype", KEEP, DTYPES, "Of weights; keep: as in their files.")
    flags.DEFINE_enum("quantize", "", ["", *KINDS], "Store the decoder's weights so.")
    flags.DEFINE_enum("vision", "", ["", "int8"], "Store the ViT's weights so.")
    flags.DEFINE_bool("report", False, "Print which tensor became what; write nothing.")


def main(argv: list[str]) -> None:
    """Read the flags and convert."""
    args = flags.FLAGS
    if argv[1:]:
        raise InputError(f"convert model takes flags only, got {argv[1]!r}")
    given = {
        "vit": args.vit,
        "qformer": args.qformer,
        "llama": args.llm,
        "projector": args.projector,
    }
    if not args.preset or not (args.out or args.report):
        raise InputError("convert model needs --preset, and --out or --report")
    if args.projector and args.no_projector:
        raise InputError("give --projector or --no-projector, not both")
    made = prepare(
        args.preset,
        given,
        args.delta,
        args.dtype,
        no_projector=args.no_projector,
        quantisation=Quantisation(args.quantize, args.vision),
    )
    if args.report:
        print("\n".join(made.report()))
        return
    print(made.write(Path(args.out)))


@dataclasses.dataclass
class Conversion:
    """A model that is ready to be written: all of it fits, and nothing is read yet."""

    config: MiniGPT4Config
    fills: dict[str, tuple[str, Fill]]  # by path: the part it comes from, and how
    files: dict[str, Source]  # by part
    dtype: str
    folders: tuple[Path, ...]  # where a tokenizer may lie
    quantisation: Quantisation = Quantisation()

    def arrays(self) -> dict[str, Streamed]:
        """Every parameter by path; the projector only if its file was named."""
        made: dict[str, Streamed] = {}
        for path, shape in checkpoint.parameter_shapes(self.config).items():
            if path in self.fills:
                part, fill = self.fills[path]
                made[path] = stream(fill, self.files[part], self.dtype)
            elif path.startswith("ln_vision/"):
                value = np.full(shape, path.endswith("/scale"), np.float32)
                made[path] = Streamed(shape, value.dtype, lambda value=value: [value])
        return in_few_bits(made, self.config, self.quantisation)

    def write(self, out: Path) -> Path:
        """The directory, which must not exist; files are hashed and checked beside."""
        if out.exists():
            raise InputError(f"--out: {out} exists; name another, or remove it")
        arrays = self.arrays()
        tokenizer = self._tokenizer()
        storage.check_room(out, sum(array.nbytes for array in arrays.values()))
        files = (file for source in self.files.values() for file in source.files)
        with hashes.beside(files) as digests:
            storage.save_directory(
                out, arrays, self.config, tokenizer, lambda: self._manifest(digests())
            )
        return out

    def _tokenizer(self) -> dict[str, bytes]:
        """Its files by name, of which no id may lie beyond the decoder's rows."""
        files = vicuna.tokenizer_files(*self.folders)
        folder, config = files[0].parent, self.config
        ids = dict(bos_id=config.bos_id, eos_ids=config.eos_ids)
        size, rows = load_tokenizer(folder, **ids).size, config.llama.vocab_size
        if size > rows:
            raise CheckpointError(
                f"{folder}: its tokenizer has {size} pieces for the {rows} rows of the "
                "decoder; fetch the tokenizer that belongs to it"
            )
        return {file.name: file.read_bytes() for file in files}

    def report(self) -> list[str]:
        """A line for each parameter, and one for each tensor that is left out."""
        lines = []
        for path, array in self.arrays().items():
            start = f"{path} {list(array.shape)} {array.dtype} <- "
            if (floats := path.removesuffix("_scale")) != path and floats in self.fills:
                lines.append(f"{start}of {floats}, which is rounded")
                continue
            if path not in self.fills:
                lines.append(f"{start}nothing: ones and zeros, as the reference has it")
                continue
            part, fill = self.fills[path]
            first, count = fill.sources[0], len(fill.sources)
            more = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"{start}{part}: {first}{more} ({fill.layout.name})")
        for part, reasons in self._dropped().items():
            lines += [f"{part}: {n} left out: {why}" for n, why in reasons.items()]
        return lines

    def _dropped(self) -> dict[str, dict[str, str]]:
        return {
            part: dropped(parts.tables(part, source), source)
            for part, source in self.files.items()
        }

    def _manifest(self, digests: Mapping[Path, str]) -> dict[str, Any]:
        listed = [
            {
                "part": part,
                "file": file.name,
                "bytes": file.stat().st_size,
                "sha256": digests[file],
            }
            for part, source in self.files.items()
            for file in source.files
        ]
        rules: dict[str, Any] = {"format": locate.FORMAT, "dtype": self.dtype}
        how = dataclasses.asdict(self.quantisation)
        how = {name: kind for name, kind in how.items() if kind}
        rules |= {"quantised": how} if how else {}
        decides = [self.config.to_dict(), [s["sha256"] for s in listed], rules]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        versions = ("minigpt4-jax", "jax", "numpy", "safetensors", "torch")
        return {
            "fingerprint": digest.hexdigest()[:16],
            "sources": listed,
            "dtype": self.dtype,
            "quantised": how,
            "source_dtypes": {
                path: str(widest(self.files[part][name].dtype for name in fill.sources))
                for path, (part, fill) in self.fills.items()
            },
            "filled_by": {
                path.partition("/")[0]: part for path, (part, _) in self.fills.items()
            },
            "left_out": {
                part: dict(sorted(_counts(reasons).items()))
                for part, reasons in self._dropped().items()
            },
            "versions": {name: v for name in versions if (v := _version(name))},
        }


def prepare(
    preset: str,
    given: Mapping[str, str | Path | None],
    delta: str | Path | None = None,
    dtype: str = KEEP,
    *,
    no_projector: bool = False,
    quantisation: Quantisation = Quantisation(),
) -> Conversion:
    """Opens the files and checks that they make the preset; reads hardly a value.

    Args:
        given: a path for each of variants.PARTS; None for a Q-Former that is not there.
        no_projector: leave it out, for a training that begins with a random one.
        quantisation: what is rounded while it is written; `kv` is not of a file.

    Raises:
        CheckpointError: a file is damaged or another one than it should be; says which.
    """
    files = {part: sources.read(path) for part, path in given.items() if path}
    folders = [files["llama"].path] if "llama" in files else []
    if delta is not None and folders:
        files["llama"] = vicuna.added(files["llama"], sources.read(delta))
        folders.insert(0, files["llama"].path)
    found = {part: variants.find(source, part) for part, source in files.items()}
    config = fit.settle(preset, found)
    for doubt in fit.doubts(config, found):
        logger.warning("uncertain: %s", doubt)
    needed = [p for p in fit.needed(config) if not (no_projector and p == "projector")]
    absent = [variants.FLAGS[part] for part in needed if part not in files]
    if absent:
        raise InputError(f"preset {config.name!r} needs {', '.join(absent)} too")
    files["vit"] = _at_grid(files["vit"], config.vit.grid)

    shapes = checkpoint.parameter_shapes(config)
    fills: dict[str, tuple[str, Fill]] = {}
    # The reference's order of loading: what comes later wins.
    for part in needed:
        rooms = parts.rooms(part, files[part])
        wanted = {k: s for k, s in shapes.items() if k.partition("/")[0] in rooms}
        try:
            planned = plan(parts.tables(part, files[part]), files[part], wanted)
        except CheckpointError as error:
            raise CheckpointError(f"{files[part].path}: {error}") from error
        fills |= {fill.path: (part, fill) for fill in planned}
    left = {path.partition("/")[0] for path in shapes.keys() - fills.keys()}
    assert left <= {"ln_vision", "projector"}, (
        left
    )  # `plan` fills rooms whole, or raises
    return Conversion(config, fills, files, dtype, tuple(folders), quantisation)


def stream(fill: Fill, source: Source, dtype: str) -> Streamed:
    """A parameter as it is stored: cast, checked, one layer at a time."""
    kinds = [np.dtype(source[name].dtype) for name in fill.sources]
    for name, kind in zip(fill.sources, kinds):
        if not jnp.issubdtype(kind, jnp.floating):
            raise CheckpointError(f"{source.path}: {name} is {kind}; want floats")
    if re.fullmatch(ALWAYS_FLOAT32, fill.path):
        stored = np.dtype(np.float32)
    elif dtype != KEEP:
        stored = np.dtype(jnp.dtype(dtype))
    else:
        stored = kinds[0]
        for index, kind in enumerate(kinds):
            if kind != stored:
                raise mixed(fill.path, index, kind, stored)

    def pieces() -> Iterator[np.ndarray]:
        for name, piece in zip(fill.sources, fill.pieces(source)):
            piece = cast(piece, stored)
            if not finite(piece):
                raise CheckpointError(
                    f"{source.path}: {name} holds NaN or infinite values; the file is "
                    "damaged, or a training that diverged"
                )
            yield piece

    return Streamed(fill.shape, stored, pieces)


def _at_grid(source: Source, grid: int) -> Source:
    """The tower with its position embeddings resized, as the reference does for 448 px."""
    name = next(name for name in source if re.fullmatch(POSITIONS, name))
    stored = source[name]
    shape = (1, grid * grid + 1, stored.shape[2])
    if stored.shape == shape:
        return source
    logger.info("resizing %s from %s to %s", name, list(stored.shape), list(shape))

    def values() -> np.ndarray:
        return vit.resized(np.asarray(stored).astype(np.float32), grid)

    resized = Tensor(shape, np.dtype(np.float32), values)
    tensors = {**source.tensors, name: resized}
    return Source(source.path, tensors, source.files, source.config)


def _counts(reasons: Mapping[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
