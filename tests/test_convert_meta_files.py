"""Meta's folders that are incomplete, of two models, or not of a kind we read."""

import json
from pathlib import Path

import pytest
import torch

from convert import sources
from minigpt4_jax.errors import CheckpointError
from tests import parity, published

ODD = published.ODD


@pytest.fixture
def meta(tmp_path) -> Path:
    theirs = parity.Whole(ODD, seed=6)
    return published.meta(tmp_path / "7B", ODD.llama, theirs.decoder.state_dict(), 2)


def test_metas_folder_with_a_shard_missing_says_which(meta):
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"shards \[1\] are there, want 0 to 1"):
        sources.read(meta)


def test_metas_last_shard_is_missed_by_the_shapes(meta):
    """Nothing but the width of params.json tells how many shards there were."""
    (meta / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"dim is 32.*16.*shards"):
        sources.read(meta)


def test_metas_folder_needs_params_json(meta):
    (meta / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json is absent"):
        sources.read(meta)


@pytest.mark.parametrize("key", ["dim", "n_heads", "n_layers", "norm_eps"])
def test_a_key_that_params_json_lacks_is_named(key, meta):
    values = json.loads((meta / "params.json").read_text())
    del values[key]
    (meta / "params.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"params\.json.* {key}"):
        sources.read(meta)


def test_metas_shards_of_two_models_are_refused(meta):
    shard = torch.load(meta / "consolidated.01.pth")
    del shard["layers.1.ffn_norm.weight"]
    torch.save(shard, meta / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"not in every shard \(layers\.1\.ffn"):
        sources.read(meta)


def test_a_second_download_beside_metas_shards_is_no_shard(meta):
    (meta / "consolidated.00 (1).pth").write_bytes(b"")
    assert len(sources.read(meta).files) == 2


def test_metas_scaled_rotary_angles_are_refused(meta):
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True}))
    with pytest.raises(CheckpointError, match="scaled rotary"):
        sources.read(meta)


def edit(folder: Path, **changes) -> None:
    """Other values in params.json."""
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_heads": 5}, "dim 32 cannot be split into 5 heads"),
        ({"n_layers": float("inf")}, "n_layers is inf; want a number above 0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"n_kv_heads": "two"}, "n_kv_heads is 'two'"),
        ({"rope_theta": -1}, "rope_theta is -1"),
    ],
)
def test_a_number_of_params_json_that_cannot_be_is_named(changes, words, meta):
    edit(meta, **changes)
    with pytest.raises(CheckpointError, match=rf"params\.json.*{words}"):
        sources.read(meta)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("layers.0.attention.wq.weight", torch.ones(16, 40).half()),
        ("layers.0.attention.wq.weight", torch.ones(16, 32)),
        ("norm.weight", torch.ones(40).half()),
    ],
    ids=["shape", "dtype", "norm"],
)
def test_shards_that_cannot_be_joined_are_refused_before_any_is_read(
    name, tensor, meta
):
    shard = torch.load(meta / "consolidated.01.pth")
    shard[name] = tensor
    torch.save(shard, meta / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=rf"{name} cannot be joined from \["):
        sources.read(meta)


def test_a_folder_with_nothing_but_oddly_named_shards_is_refused(meta):
    for file in meta.glob("*.pth"):
        file.rename(meta / f"consolidated.old{file.name[-5]}.pth")
    with pytest.raises(CheckpointError, match=r"want shards consolidated\.00\.pth"):
        sources.read(meta)
