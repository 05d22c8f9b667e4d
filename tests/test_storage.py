"""Files that appear whole or not at all, with no more than their place and modes need."""

import json
import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from minigpt4_jax import checkpoint, locate, storage
from minigpt4_jax.errors import CheckpointError
from tests import tiny


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = checkpoint.parameter_shapes(tiny.CONFIG)
    return {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}


def save(path, arrays):
    files = {"tokenizer.json": tiny.tokenizer_json().encode()}
    storage.save_directory(path, arrays, tiny.CONFIG, files, {"sources": []})
    return path


@pytest.fixture
def directory(arrays, tmp_path):
    return save(tmp_path / "model", arrays)


def stored(directory) -> dict[str, np.ndarray]:
    files = map(load_file, directory.glob("*.safetensors"))
    return {name: array for file in files for name, array in file.items()}


def test_large_models_are_split_into_shards(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 20_000)
    path = save(tmp_path / "m", arrays)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name.startswith("model-00001-of-0")
    loaded = stored(path)
    assert all(np.array_equal(loaded[k], v) for k, v in arrays.items())


def test_a_killed_write_leaves_nothing_that_loads(arrays, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "model", arrays)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_processes_are_removed(arrays, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    old = tmp_path / f".model.part-{host}-{dead.pid}"
    alive = tmp_path / f".model.part-{host}-{os.getppid()}"
    for folder in (old, alive):
        folder.mkdir()
    save(tmp_path / "model", arrays)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, "model"])


def test_a_directory_that_another_process_made_meanwhile_stays(directory, arrays):
    before = (directory / "manifest.json").stat().st_mtime_ns
    save(directory, {k: v + 1 for k, v in arrays.items()})
    assert (directory / "manifest.json").stat().st_mtime_ns == before
    np.testing.assert_array_equal(
        stored(directory)["ln_vision/bias"], arrays["ln_vision/bias"]
    )


def test_no_room_on_the_disk_is_said_before_writing(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(
        storage.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})
    )
    with pytest.raises(CheckpointError, match="make room"):
        save(tmp_path / "model", arrays)
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_public_as_the_umask_says(directory):
    modes = {f.name: f.stat().st_mode & 0o777 for f in directory.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_saved_trainables_replace_the_file_whole(tmp_path, monkeypatch):
    storage.save_trainables(tmp_path, {"a": jnp.zeros(3)})

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.save_trainables(tmp_path, {"a": jnp.ones(3)})
    np.testing.assert_array_equal(
        load_file(tmp_path / "trainables.safetensors")["a"], np.zeros(3)
    )


def test_every_file_says_its_format(directory, tmp_path):
    storage.save_trainables(tmp_path, {"a": jnp.zeros(3)})
    for file in (tmp_path / locate.TRAINABLES, *directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": str(locate.FORMAT)}
    for name in ("preset.json", "manifest.json"):
        assert '"format": 1,' in (directory / name).read_text()
    index = json.loads((directory / locate.INDEX).read_text())
    assert index["metadata"]["format"] == locate.FORMAT
