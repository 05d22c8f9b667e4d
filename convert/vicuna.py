"""python -m convert vicuna --base DIR --delta DIR --out DIR: base LLaMA + delta.

Writes the merged Hugging Face folder: safetensors shards, config.json, tokenizer files
of the delta. `convert model --llm BASE --delta DELTA` adds them on the way and needs no
such folder.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
from absl import flags

from convert import hashes, sources, torch_files, variants
from convert.casting import finite
from convert.sources import Source
from convert.tensors import Tensor
from minigpt4_jax import storage
from minigpt4_jax.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

PADDED = ("model.embed_tokens.weight", "lm_head.weight")
TOKENIZER = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SHARD_BYTES = 10**10


def define_flags() -> None:
    """The flags of `convert vicuna`."""
    flags.DEFINE_string("base", None, "LLaMA: a Hugging Face folder, or Meta's.")
    flags.DEFINE_string("delta", None, "Vicuna's delta: a Hugging Face folder.")
    flags.DEFINE_string("out", None, "Folder to write; must not exist.")


def main(argv: list[str]) -> None:
    """Read the flags and merge."""
    args = flags.FLAGS
    if argv[1:] or not (args.base and args.delta and args.out):
        raise InputError("convert vicuna needs --base, --delta and --out, and no more")
    print(merge(Path(args.base), Path(args.delta), Path(args.out)))


def merge(base: Path, delta: Path, out: Path) -> Path:
    """Writes base + delta as a Hugging Face folder; returns it."""
    if out.exists():
        raise InputError(f"--out: {out} exists; name another folder, or remove it")
    base, delta = base.expanduser(), delta.expanduser()
    total = added(sources.read(base), sources.read(delta))
    storage.check_room(out, sum(tensor.nbytes for tensor in total.values()))
    with hashes.beside(total.files) as digests, storage.whole(out) as folder:
        write_hugging_face(folder, total)
        for file in tokenizer_files(delta, base):
            shutil.copyfile(file, folder / file.name)
        for name in ("config.json", "generation_config.json"):
            if (delta / name).exists():
                shutil.copyfile(delta / name, folder / name)
        digests()  # a damaged file ends the merge before its folder has a name
    return out


def added(base: Source, delta: Source) -> Source:
    """base + delta in the delta's dtype, tensor by tensor, when it is read.

    v0's delta has a row more than LLaMA, for the pad token it adds: FastChat 0.1.10 sets
    that row of the base to zero, so the sum there is the delta.

    Raises:
        CheckpointError: when the two are not such a pair; says which is what.
    """
    parts = variants.find(base, "llama"), variants.find(delta, "llama")
    if not parts[1].delta:
        raise CheckpointError(
            f"{delta.path} is {parts[1].says}, not a delta; give it as --llm without "
            "--delta"
        )
    if parts[0].delta:
        raise CheckpointError(
            f"{base.path} is {parts[0].says} itself; want the LLaMA it is added to"
        )
    rows = parts[1].sizes["vocab_size"]
    if rows not in (v := parts[0].sizes["vocab_size"], v + 1):
        raise CheckpointError(
            f"{delta.path} has {rows} rows for the {v} of {base.path}; want {v} or "
            f"{v + 1}"
        )
    kept = {n: t for n, t in delta.items() if not n.endswith("rotary_emb.inv_freq")}
    theirs = {name for name in base if not name.endswith("rotary_emb.inv_freq")}
    for source, names in ((base, kept.keys() - theirs), (delta, theirs - kept.keys())):
        if names:
            raise CheckpointError(
                f"{source.path} lacks {len(names)} tensors of the other "
                f"({min(names)}, ...); base and delta must hold the same ones"
            )
    tensors = {name: _sum(name, base[name], tensor) for name, tensor in kept.items()}
    return Source(delta.path, tensors, [*base.files, *delta.files], delta.config)


def _sum(name: str, base: Tensor, delta: Tensor) -> Tensor:
    padded = (delta.shape[0] - 1, *delta.shape[1:])
    if base.shape != delta.shape and (name not in PADDED or base.shape != padded):
        raise CheckpointError(
            f"{name}: the base has {list(base.shape)}, its delta {list(delta.shape)}; "
            "are they of one size?"
        )

    def values() -> np.ndarray:
        start = np.asarray(base).astype(delta.dtype, copy=False)
        if base.shape != delta.shape:
            start = np.concatenate([start, np.zeros_like(start[:1])])
        total = torch_files.add(start, np.asarray(delta))
        if not finite(total):
            raise CheckpointError(
                f"{name}: base + delta has NaN or infinite values; one of the files is "
                "damaged, or they are no pair"
            )
        return total

    return Tensor(delta.shape, delta.dtype, values)


def write_hugging_face(folder: Path, tensors: Source) -> None:
    """Shards and their index under the names that transformers looks for."""
    streams = {
        name: storage.Streamed(t.shape, t.dtype, lambda t=t: [np.asarray(t)])
        for name, t in tensors.items()
    }
    weight_map = storage.write_shards(
        folder, streams, "model", SHARD_BYTES, {"format": "pt"}
    )
    total = sum(stream.nbytes for stream in streams.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / sources.INDEXES[0]).write_text(json.dumps(index, indent=1))


def tokenizer_files(*folders: Path) -> list[Path]:
    """The tokenizer of the first folder that has one; Meta's lies one folder up."""
    for folder in folders:
        for place in (folder, folder.parent):
            found = [place / name for name in TOKENIZER if (place / name).is_file()]
            if any(file.name in TOKENIZER[:2] for file in found):
                return found
    raise CheckpointError(
        f"{folders[0]}: no tokenizer.model and no tokenizer.json; fetch it with the "
        "weights"
    )
