"""Meta's LLaMA folders (`consolidated.NN.pth`, params.json) under Hugging Face's names.

A model-parallel shard holds a slice of most matrices; they are joined when read, and
the rows of q and k are put from interleaved rotary pairs into halves.
"""

import re
from pathlib import Path

import numpy as np

from convert import torch_files
from convert.sources import Source, json_file, number
from convert.tensors import Tensor
from minigpt4_jax.errors import CheckpointError

# Meta's name, Hugging Face's, axis along which shards are joined (None: all the same).
NAMES = (
    (r"tok_embeddings\.weight", "model.embed_tokens.weight", 1),
    (r"layers\.(\d+)\.attention\.wq\.weight", "self_attn.q_proj", 0),
    (r"layers\.(\d+)\.attention\.wk\.weight", "self_attn.k_proj", 0),
    (r"layers\.(\d+)\.attention\.wv\.weight", "self_attn.v_proj", 0),
    (r"layers\.(\d+)\.attention\.wo\.weight", "self_attn.o_proj", 1),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", "mlp.gate_proj", 0),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", "mlp.up_proj", 0),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", "mlp.down_proj", 1),
    (r"layers\.(\d+)\.attention_norm\.weight", "input_layernorm", None),
    (r"layers\.(\d+)\.ffn_norm\.weight", "post_attention_layernorm", None),
    (r"norm\.weight", "model.norm.weight", None),
    (r"output\.weight", "lm_head.weight", 0),
    (r"rope\.freqs", "model.rotary_emb.inv_freq", None),
)


def read(path: Path) -> Source:
    """A Meta folder as a source with Hugging Face's names and config."""
    files = sorted(path.glob("consolidated.[0-9][0-9].pth"))
    numbers = [int(file.name.split(".")[1]) for file in files]
    if not numbers:
        raise CheckpointError(
            f"{path}: want shards consolidated.00.pth and on; fetch them again"
        )
    if numbers != list(range(len(files))):
        raise CheckpointError(
            f"{path}: shards {numbers} are there, want 0 to {max(numbers)}; fetch the "
            "others"
        )
    if not (path / "params.json").exists():
        raise CheckpointError(f"{path}: params.json is absent; it says the sizes")
    params = json_file(path / "params.json")
    shards = [torch_files.read(file) for file in files]
    absent = set().union(*shards) - set.intersection(*map(set, shards))
    if absent:
        raise CheckpointError(
            f"{path}: {len(absent)} tensors are not in every shard ({min(absent)}, ...); "
            "are the shards of one model?"
        )
    config = _config(params, path / "params.json")
    turned = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    tensors = {}
    for name in shards[0]:
        theirs, axis = _name(name)
        rotary = next((n for part, n in turned.items() if part in theirs), None)
        parts = [shard[name] for shard in shards]
        _check_parts(path, name, parts, axis)
        tensors[theirs] = _joined(parts, axis, rotary)
    _check_width(path, tensors, config["hidden_size"], len(files))
    if gate := tensors.get("model.layers.0.mlp.gate_proj.weight"):
        config["intermediate_size"] = gate.shape[0]  # params.json leaves it open
    return Source(path, tensors, files, config)


def _check_parts(path: Path, name: str, parts: list[Tensor], axis: int | None) -> None:
    """Raise unless they differ in nothing but their length along the axis."""
    alike = {
        (part.dtype, *(n for i, n in enumerate(part.shape) if i != axis))
        for part in parts
    }
    if len(alike) > 1:
        shapes = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise CheckpointError(
            f"{path}: {name} cannot be joined from {shapes}; are the shards of one model?"
        )


def _check_width(path: Path, tensors: dict, dim: int, count: int) -> None:
    """Raise when the joined shards are not as wide as params.json says.

    Nothing else tells that the last shards are absent.
    """
    embed = tensors.get("model.embed_tokens.weight")
    if embed and embed.shape[-1] != dim:
        raise CheckpointError(
            f"{path}: dim is {dim} in params.json, but {count} shards join to "
            f"{embed.shape[-1]}; are all shards there?"
        )


def _name(name: str) -> tuple[str, int | None]:
    for pattern, theirs, axis in NAMES:
        if hit := re.fullmatch(pattern, name):
            if hit.re.groups:
                theirs = f"model.layers.{hit.group(1)}.{theirs}.weight"
            return theirs, axis
    return name, None  # no rule of the table knows it, and its error will list it


def _joined(parts: list[Tensor], axis: int | None, heads: int | None) -> Tensor:
    first = parts[0]
    shape = list(first.shape)
    if axis is not None:
        shape[axis] = sum(part.shape[axis] for part in parts)

    def values() -> np.ndarray:
        if axis is None or len(parts) == 1:
            array = np.asarray(first)
        else:
            array = np.concatenate([np.asarray(part) for part in parts], axis=axis)
        return array if heads is None else halves(array, heads)

    return Tensor(tuple(shape), first.dtype, values)


def halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (2i, 2i+1) of each head -> (i, i + K/2), as Hugging Face's rotary wants."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _config(params: dict, where: Path) -> dict:
    """What config.json would say."""
    heads = int(number(params, "n_heads", where))
    if (dim := int(number(params, "dim", where))) % (2 * heads):
        raise CheckpointError(
            f"{where}: dim {dim} cannot be split into {heads} heads of an even size"
        )
    if params.get("use_scaled_rope"):
        raise CheckpointError(
            f"{where} asks for scaled rotary angles; want a LLaMA without them"
        )

    def stated(key: str, default: float) -> float:
        there = params.get(key) is not None  # LLaMA 1 has neither
        return number(params, key, where) if there else default

    return {
        "model_type": "llama",
        "hidden_size": dim,
        "num_hidden_layers": int(number(params, "n_layers", where)),
        "num_attention_heads": heads,
        "num_key_value_heads": int(stated("n_kv_heads", heads)),
        "rms_norm_eps": float(number(params, "norm_eps", where)),
        "rope_theta": float(stated("rope_theta", 10_000.0)),
    }
