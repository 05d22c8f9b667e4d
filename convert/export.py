"""python -m convert export --checkpoint DIR|WORKDIR [--out FILE.pth] [--llm OUTDIR]

What was converted or trained here -> files that the reference's PyTorch code loads: a
checkpoint for its `model.ckpt`, a Hugging Face folder of the decoder for its
`llama_model`, or both. The rules of the conversion, backwards.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from convert import llama, qformer, sources, torch_files, vicuna, vit
from convert.reverse import origins, sisters
from convert.sources import Source
from minigpt4_jax import checkpoint, locate, storage
from minigpt4_jax.errors import CheckpointError, InputError
from minigpt4_jax.models.llama import LlamaConfig
from minigpt4_jax.models.minigpt4 import MiniGPT4Config

logger = logging.getLogger(__name__)

CHECKPOINT = (*qformer.PROJECTOR, *qformer.LAVIS, *vit.EVA)


def define_flags() -> None:
    """The flags of `convert export`."""
    flags.DEFINE_string("checkpoint", None, "A converted directory, or a training run.")
    flags.DEFINE_string("out", None, "FILE.pth to write; must not exist.")
    flags.DEFINE_string("llm", None, "Folder for the decoder; must not exist.")


def main(argv: list[str]) -> None:
    """Read the flags and export."""
    args = flags.FLAGS
    if argv[1:] or not args.checkpoint or not (args.out or args.llm):
        raise InputError(
            "convert export needs --checkpoint, and --out or --llm or both; no more"
        )
    out, llm = (Path(name) if name else None for name in (args.out, args.llm))
    for path in export(args.checkpoint, out, llm):
        print(path)


def export(name: str | Path, out: Path | None, llm: Path | None = None) -> list[Path]:
    """Writes the reference's checkpoint, its decoder's folder, or both; returns them.

    Raises:
        InputError: one of them exists, or would lack a decoder that was trained.
        CheckpointError: the model is none that the reference has names for.
    """
    for flag, path in (("--out", out), ("--llm", llm)):
        if path is not None and path.exists():
            raise InputError(f"{flag}: {path} exists; name another, or remove it")
    path = checkpoint.resolve(name)
    with contextlib.ExitStack() as files:
        model = open_model(path, files)
        decoder = sorted(p for p in model.trained if p.startswith("llama/"))
        if decoder and llm is None:
            raise InputError(
                f"{path} trained {decoder[0]}, and the reference's checkpoint holds no "
                "decoder; add --llm OUTDIR for it"
            )
        # Names before values: a model that the reference lacks is refused at once.
        saved = model.tensors(CHECKPOINT, model.saved() if out else ())
        if llm is not None:
            all_of_it = [p for p in model.shapes if p.startswith("llama/")]
            write_decoder(model, model.tensors(llama.HF, all_of_it), llm)
        if out is not None:
            write_checkpoint(model, saved, out)
    return [path for path in (out, llm) if path is not None]


@dataclass(frozen=True)
class Stored:
    """A model on disk, unread.

    Attributes:
        path: the converted directory or work directory.
        arrays: safetensors slices by path; a run's own in place of its model's.
        trained: paths that the run trained; empty for a converted directory.
        manifest: of the converted directory.
    """

    path: Path
    config: MiniGPT4Config
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Any]
    trained: frozenset[str]
    manifest: Mapping[str, Any]

    def saved(self) -> set[str]:
        """What the reference would have saved: the projector, and all that was trained.

        Also what a converted checkpoint held besides its projector.
        """
        filled = {"projector": "projector", **self.manifest.get("filled_by", {})}
        rooms = tuple(f"{r}/" for r, part in filled.items() if part == "projector")
        held = {path for path in self.shapes if path.startswith(rooms)}
        return held | {p for p in self.trained if not p.startswith("llama/")}

    def tensors(self, rules: tuple, paths: Iterable[str]) -> Source:
        """The tensors that these parameters came from, unread; says what was cast."""
        wanted = {p: self.shapes[p] for p in sisters(rules, paths) if p in self.shapes}
        if few := [path for path in wanted if f"{path}_scale" in self.arrays]:
            raise CheckpointError(
                f"{self.path}: {min(few)} and {len(few) - 1} more are stored in few "
                "bits, which are not the values of their files; convert those without "
                "--quantize and --vision, and export that"
            )
        freq = self.config.qformer.cross_attention_freq if self.config.qformer else 1
        made = origins(rules, wanted, {"qformer/cross/": freq})
        dtypes = {path: self.dtype(path) for path in wanted}
        self._say_cast(wanted)
        tensors = {origin.name: origin.tensor(self.arrays, dtypes) for origin in made}
        return Source(self.path, tensors, [])

    def dtype(self, path: str) -> np.dtype:
        """Its source's, where that holds the stored values exactly; else as stored."""
        stored, source = self._dtypes(path)
        if path.startswith("projector/"):
            return np.dtype(np.float32)
        return source if np.can_cast(source, stored, "safe") else stored

    def _dtypes(self, path: str) -> tuple[np.dtype, np.dtype]:
        """As stored, and of the published file; the same for what was trained here."""
        stored = sources.DTYPES[self.arrays[path].get_dtype()]
        name = self.manifest.get("source_dtypes", {}).get(path)
        known = name is not None and path not in self.trained
        return stored, np.dtype(name) if known else stored

    def _say_cast(self, paths: Iterable[str]) -> None:
        both = {path: self._dtypes(path) for path in paths}
        cast = [p for p, (s, old) in both.items() if not np.can_cast(old, s, "safe")]
        if cast:
            stored, source = both[cast[0]]
            logger.warning(
                "%s was converted with --dtype %s: %d parameters (%s, ...) are %s, their "
                "source was %s, so values are not those of the source; --dtype keep "
                "keeps them",
                *(self.path, self.manifest.get("dtype"), len(cast), min(cast)),
                *(stored, source),
            )


def open_model(path: Path, files: contextlib.ExitStack) -> Stored:
    """The model of a converted directory or a training run; its files stay open."""
    base = checkpoint.base_directory(path)
    config = checkpoint.read_config(path)
    arrays = checkpoint.open_all(path, files)
    trained: frozenset[str] = frozenset()
    if base != path:
        own = locate.trainable_files(path)
        trained = frozenset(checkpoint.open_files(own, files))
    shapes = checkpoint.parameter_shapes(config, checkpoint.stored_quantisation(path))
    checkpoint.check(path, arrays, shapes, ())
    manifest = locate.read_json(base / "manifest.json")
    return Stored(path, config, shapes, arrays, trained, manifest)


def write_checkpoint(model: Stored, tensors: Source, out: Path) -> None:
    """The reference's checkpoint, which its non-strict `load_state_dict` takes.

    Without an optimizer's state: it starts a run there, it does not resume one.
    """
    storage.check_room(out, sum(tensor.nbytes for tensor in tensors.values()))
    run = {}
    if model.trained:
        run = locate.read_json(model.path / "config.json").get("config", {})
    values = {
        "model": {name: np.asarray(tensor) for name, tensor in tensors.items()},
        "config": {"model": _plain(model.config.to_dict()), "run": run},
        "epoch": 0,  # our runs count steps
    }
    part = out.with_name(f".{out.name}.part")
    try:
        torch_files.save(part, values)
        storage.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    logger.info("%s: %s", out, ", ".join(sorted(tensors)[:4]))


def write_decoder(model: Stored, tensors: Source, out: Path) -> None:
    """A Hugging Face folder, made tensor by tensor, there when it is whole."""
    base = checkpoint.base_directory(model.path)
    tokenizer = vicuna.tokenizer_files(base)
    config = llama_config(model.config)
    config["torch_dtype"] = str(tensors["model.embed_tokens.weight"].dtype)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    storage.check_room(out, sum(tensor.nbytes for tensor in tensors.values()))
    with storage.whole(out) as folder:
        vicuna.write_hugging_face(folder, tensors)
        for file in tokenizer:
            shutil.copyfile(file, folder / file.name)
        for name, values in (("config", config), ("generation_config", ids)):
            text = json.dumps(values, indent=1) + "\n"
            (folder / f"{name}.json").write_text(text)


def llama_config(config: MiniGPT4Config) -> dict[str, Any]:
    """config.json of a Hugging Face LLaMA."""
    llm: LlamaConfig = config.llama
    ends = config.eos_ids
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_width,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_size,
        "rms_norm_eps": llm.eps,
        "rope_theta": llm.rope_theta,
        "max_position_embeddings": llm.max_positions,
        "vocab_size": llm.vocab_size,
        "tie_word_embeddings": llm.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
    }


def _plain(values: dict) -> dict:
    """With lists for tuples, as every reader of a pickle or JSON takes them."""
    return json.loads(json.dumps(values))
