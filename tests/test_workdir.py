"""What a run leaves on disk fits the run, also when it was cut short."""

import json

import numpy as np
import pytest

from minigpt4_jax import locate
from minigpt4_jax.errors import CheckpointError, ConfigError
from minigpt4_jax.workdir import WorkDir
from tests.training import config, write_frozen


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    return write_frozen(tmp_path_factory.mktemp("models") / "frozen")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def state(value: float) -> dict:
    return {
        "params": {"projector/bias": np.full(3, value, np.float32)},
        "count": np.array(int(value), np.int32),
    }


def test_config_json_says_what_the_run_is(frozen, path):
    cfg = config(frozen)
    WorkDir(path, cfg, frozen).close()
    run = json.loads((path / "config.json").read_text())
    assert run["format"] == locate.FORMAT and run["checkpoint"] == str(frozen)
    assert run["config"] == json.loads(json.dumps(cfg.to_dict()))
    weights = "model-00001-of-00001.safetensors"
    assert run["frozen"][weights] == locate.sha256(frozen / weights)
    assert "tokenizer.json" in run["frozen"]
    assert {"minigpt4_jax", "jax", "flax", "optax"} <= set(run["versions"])
    assert locate.base_directory(path) == frozen  # checkpoint.py finds the model


def test_a_run_with_other_knobs_is_refused_and_they_are_named(frozen, path):
    WorkDir(path, config(frozen, seed=9), frozen).close()  # nothing was saved
    run = WorkDir(path, config(frozen), frozen)
    run.save(1, state(1))
    run.close()
    with pytest.raises(ConfigError) as error:
        WorkDir(path, config(frozen, seed=4, optim__b1=0.5), frozen)
    assert "optim.b1: 0.9, now 0.5\n  seed: 3, now 4" in str(error.value)
    WorkDir(path, config(frozen, optim__total_steps=9, log_every=7), frozen).close()


def test_other_frozen_weights_at_the_same_place_are_refused(tmp_path, path):
    moved = write_frozen(tmp_path / "frozen")
    cfg = config(moved)
    run = WorkDir(path, cfg, moved)
    run.save(1, state(1))
    run.close()
    moved.rename(tmp_path / "old")
    write_frozen(tmp_path / "frozen", seed=1)
    with pytest.raises(ConfigError, match="model-00001-of-00001.safetensors of"):
        WorkDir(path, cfg, moved)


def test_a_run_of_a_newer_format_is_not_resumed(frozen, path):
    cfg = config(frozen)
    run = WorkDir(path, cfg, frozen)
    run.save(1, state(1))
    run.close()
    file = path / "config.json"
    newer = json.dumps(json.loads(file.read_text()) | {"format": 2})
    file.write_text(newer)
    with pytest.raises(CheckpointError, match="config.json: got format 2.*update"):
        WorkDir(path, cfg, frozen)
    assert file.read_text() == newer


def test_a_state_comes_back_as_it_was_saved(frozen, path):
    cfg = config(frozen)
    run = WorkDir(path, cfg, frozen)
    assert run.step == 0
    assert run.restore(state(0)) is not None
    for step in (2, 5, 7):
        run.save(step, state(step))
    run.save(7, state(99))  # it is there already
    run.close()
    run = WorkDir(path, cfg, frozen)
    assert run.step == 7
    found = run.restore(state(0))
    np.testing.assert_array_equal(found["params"]["projector/bias"], [7, 7, 7])
    assert found["count"] == 7
    run.close()
    kept = [f.name for f in (path / "checkpoints").iterdir() if f.name.isdigit()]
    assert sorted(kept) == ["5", "7"]


def test_a_run_past_the_end_of_its_config_is_refused(frozen, path):
    run = WorkDir(path, config(frozen), frozen)
    run.save(8, state(8))
    run.close()
    with pytest.raises(ConfigError, match="at step 8, want at most .*total_steps=6"):
        WorkDir(path, config(frozen, optim__total_steps=6), frozen)


def test_a_damaged_checkpoint_is_named_with_the_way_on(frozen, path):
    run = WorkDir(path, config(frozen), frozen)
    run.save(3, state(3))
    run.save(6, state(6))
    run.close()
    for file in (path / "checkpoints" / "6").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    run = WorkDir(path, config(frozen), frozen)
    with pytest.raises(CheckpointError, match=r"checkpoints/6 .*delete it to go on"):
        run.restore(state(0))
    run.close()


def test_lines_after_the_checkpoint_are_dropped_since_their_steps_come_again(
    frozen, path
):
    run = WorkDir(path, config(frozen), frozen)
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
        run.log_samples(step, {"00007": "eine Straße\u2028mit Hund"})
        if step == 2:
            run.save(step, state(step))
    run.close()
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    run = WorkDir(path, config(frozen), frozen)
    run.restore(state(0))
    run.close()
    metrics = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in metrics] == [1.0, 2.0]
    samples = (path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(samples[-2]) == {
        "step": 2,
        "photo": "00007",
        "says": "eine Straße\u2028mit Hund",
    }
