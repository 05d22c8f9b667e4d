"""Folders and files of weights that are incomplete, damaged or no pair.

Each fault is one CheckpointError that names the file and says what to do.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from convert import sources, variants, vicuna
from convert.sources import Source
from convert.tensors import Tensor
from minigpt4_jax.errors import CheckpointError, InputError
from tests import parity, published

ODD = published.ODD


# Folders of shards.


def folder(path: Path, kind: str = "safetensors") -> Path:
    state = {
        "model.embed_tokens.weight": torch.ones(9, 4),
        "lm_head.weight": torch.ones(9, 4),
    }
    return published.hugging_face(path, ODD.llama, state, kind=kind)


def index_of(path: Path) -> tuple[Path, dict]:
    (index,) = path.glob("*.index.json")
    return index, json.loads(index.read_text())


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_missing_shards_are_listed(kind, tmp_path):
    path = folder(tmp_path / "llm", kind)
    gone = next(path.glob(f"*-2.{kind}"))
    gone.unlink()
    with pytest.raises(
        CheckpointError, match=rf"1 of 2 shards are absent \({gone.name}"
    ):
        sources.read(path)


def test_an_index_that_names_absent_tensors_is_refused(tmp_path):
    path = folder(tmp_path / "llm")
    index, values = index_of(path)
    values["weight_map"]["model.norm.weight"] = "model-1.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in no shard"):
        sources.read(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    path = folder(tmp_path / "llm")
    for file in path.glob("*.safetensors"):
        held = safetensors.numpy.load_file(file)
        held["lm_head.weight"] = np.ones((9, 4), np.float16)
        safetensors.numpy.save_file(held, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in .*another shard"):
        sources.read(path)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path):
    path = folder(tmp_path / "llm")
    index, values = index_of(path)
    file = values["weight_map"]["lm_head.weight"]
    other = {"model-1.safetensors", "model-2.safetensors"} - {file}
    values["weight_map"]["lm_head.weight"] = other.pop()
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight is in {file}, not in"):
        sources.read(path)


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[]", "{", ""]
)
def test_an_index_without_weight_map_is_refused(text, tmp_path):
    path = folder(tmp_path / "llm")
    index, _ = index_of(path)
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"weight_map|JSON"):
        sources.read(path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/x.bin", 3, None])
def test_an_index_names_files_of_its_own_folder_only(file, tmp_path):
    path = folder(tmp_path / "llm")
    next(path.glob("*-1.safetensors")).rename(tmp_path / "secret.safetensors")
    index, values = index_of(path)
    values["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no name of a file"):
        sources.read(path)


@pytest.mark.parametrize("left", [4, 60, -1])
def test_a_truncated_safetensors_file_is_named(left, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones((30, 20), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*fetch it again"):
        sources.read(path)


def test_an_unknown_dtype_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=r"a is F8_E4M3; want one of"):
        sources.read(path)


def test_a_folder_without_weights_says_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights .*found config\.json"):
        sources.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"no file or folder at"):
        sources.read(tmp_path / "nowhere")


# Numbers that stand beside weights.


@pytest.mark.parametrize(
    "key", ["num_attention_heads", "intermediate_size", "rms_norm_eps"]
)
def test_a_key_that_config_json_lacks_is_named(key, tmp_path):
    path = folder(tmp_path / "llm")
    values = json.loads((path / "config.json").read_text())
    del values[key]
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"config\.json.* {key}"):
        variants.llama_sizes(sources.read(path))


def test_a_number_of_config_json_that_is_none_is_named(tmp_path):
    path = folder(tmp_path / "llm")
    values = json.loads((path / "config.json").read_text())
    values["num_attention_heads"] = "many"
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"num_attention_heads is 'many'"):
        variants.llama_sizes(sources.read(path))


# Deltas.


def llama(rows: int, norm: float, width: int = 32, layers: int = 2) -> Source:
    """A decoder of shapes, whose last norm is all the values it has."""
    shapes = {
        "model.embed_tokens.weight": (rows, width),
        "lm_head.weight": (rows, width),
    }
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (width, width)
    made = {name: lazy(shape) for name, shape in shapes.items()}
    made["model.norm.weight"] = lazy((width,), norm)
    config = published.llama_config(ODD.llama) | {"num_hidden_layers": layers}
    return Source(Path(f"llama_{rows}_{norm}"), made, [], config)


def lazy(shape: tuple[int, ...], value: float = 0.0) -> Tensor:
    dtype = np.dtype(np.float16)
    return Tensor(shape, dtype, lambda: np.full(shape, value, dtype))


def test_pairs_that_are_no_base_and_delta_are_refused_in_words():
    base, delta, whole = llama(97, 1.0), llama(98, 0.01), llama(98, 1.01)
    assert vicuna.added(base, delta)["lm_head.weight"].shape == (98, 32)
    cases = {
        "not a delta": (base, whole),
        "itself; want the LLaMA": (delta, delta),
        "99 rows for the 97": (base, llama(99, 0.01)),
        "96 rows for the 97": (base, llama(96, 0.01)),
        "llama_97_1.0 lacks 1 tensors": (base, llama(98, 0.01, layers=3)),
        "llama_98_0.01 lacks 1 tensors": (base, llama(98, 0.01, layers=1)),
        "are they of one size": (base, llama(98, 0.01, width=24)),
    }
    for words, pair in cases.items():
        with pytest.raises(CheckpointError, match=words):
            vicuna.added(*pair)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Folders of a tiny LLaMA and of a delta."""
    state = parity.Whole(ODD, seed=1).decoder.state_dict()
    small = {name: 0.01 * tensor for name, tensor in state.items()}
    base = published.hugging_face(tmp_path / "base", ODD.llama, state)
    return base, published.hugging_face(tmp_path / "delta", ODD.llama, small, shards=1)


def test_a_sum_that_is_no_number_ends_the_merge(pair, tmp_path):
    base, delta = pair
    values = torch.load(delta / "pytorch_model.bin")
    values["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.inf
    torch.save(values, delta / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: base \+ delta has NaN"
    ):
        vicuna.merge(base, delta, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def test_a_damaged_base_ends_the_merge(pair, tmp_path):
    base, delta = pair
    flip_a_byte(base / "pytorch_model-1.bin")
    with pytest.raises(CheckpointError, match="has checksum"):
        vicuna.merge(base, delta, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def flip_a_byte(path: Path) -> None:
    """Change a value inside the largest record of a torch file."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[record.header_offset + 30 + len(record.filename) + record.file_size // 2] ^= 1
    path.write_bytes(data)


def test_an_index_whose_shards_were_left_out_gives_way_to_the_other(tmp_path):
    state = parity.Whole(ODD, seed=1).decoder.state_dict()
    folder = published.hugging_face(tmp_path / "llm", ODD.llama, state)
    orphan = {"weight_map": {name: "model-1.safetensors" for name in state}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(orphan))
    assert {file.suffix for file in sources.read(folder).files} == {".bin"}


def test_a_merged_folder_is_not_written_over(tmp_path):
    with pytest.raises(InputError, match="exists"):
        vicuna.merge(tmp_path, tmp_path, tmp_path)


# GGUF.


def gguf_file(path: Path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.ones((9, 4), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    return path


def test_a_damaged_gguf_file_is_named(tmp_path):
    path = gguf_file(tmp_path / "a.gguf")
    assert set(sources.read(path)) == {"token_embd.weight", "output_norm.weight"}
    data = path.read_bytes()
    for left in range(1, len(data) - 40, 7):
        path.write_bytes(data[:left])
        with pytest.raises(CheckpointError, match=r"a\.gguf is not a readable GGUF"):
            sources.read(path)


def test_a_gguf_file_without_its_numbers_says_which_is_absent(tmp_path):
    source = sources.read(gguf_file(tmp_path / "a.gguf"))
    with pytest.raises(CheckpointError, match=r"no llama\.attention\.head_count;"):
        variants.llama_sizes(source)
