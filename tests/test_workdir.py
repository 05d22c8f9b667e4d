"""What a run leaves on disk fits the run, also when it was cut short."""

import errno
import functools
import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from minigpt4_jax import Generator, checkpoint, kept, locate, sharding, workdir
from minigpt4_jax.errors import CheckpointError, ConfigError
from minigpt4_jax.workdir import WorkDir, saved_config
from tests import tiny, training
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


def run_with(path, frozen, *steps: int, **changes) -> None:
    """A run that saved these steps."""
    run = WorkDir(path, config(frozen, **changes), frozen)
    for step in steps:
        run.save(step, state(step), {"next": step})
    run.close()


def kept_in(path) -> list[int]:
    """Steps in checkpoints/; nothing unfinished may be left beside them."""
    return sorted(int(f.name) for f in (path / "checkpoints").iterdir())


def newest(path) -> float:
    return float(load_file(path / "trainables.safetensors")["projector/bias"][0])


# config.json.


def test_config_json_says_what_the_run_is(frozen, path):
    cfg = config(frozen)
    notes = {"reference": ["seed: 3, the reference has 42"]}
    WorkDir(path, cfg, frozen, {"photos": "0a1b"}, notes).close()
    run = json.loads((path / "config.json").read_text())
    assert run["format"] == locate.FORMAT and run["checkpoint"] == str(frozen)
    assert run["config"] == json.loads(json.dumps(cfg.to_dict()))
    weights = "model-00001-of-00001.safetensors"
    assert run["frozen"][weights] == locate.sha256(frozen / weights)
    assert "tokenizer.json" in run["frozen"]
    assert {"minigpt4_jax", "jax", "flax", "optax"} <= set(run["versions"])
    assert run["data"] == {"photos": "0a1b"}
    assert run["reference"] == notes["reference"]
    assert locate.base_directory(path) == frozen  # checkpoint.py finds the model


def test_a_runs_config_is_found_again_to_resume_it(frozen, path):
    with pytest.raises(CheckpointError, match="no run is there to go on.*--config"):
        saved_config(path)
    cfg = config(frozen)
    WorkDir(path, cfg, frozen).close()
    found = saved_config(path)
    assert found.to_dict() == cfg.to_dict() and found.trainable == cfg.trainable
    assert isinstance(found.trainable, tuple)
    with pytest.raises(AttributeError):
        found.sede = 4  # locked


def test_a_run_with_other_knobs_is_refused_and_they_are_named(frozen, path):
    run_with(path, frozen, seed=9)  # nothing was saved
    run_with(path, frozen, 1)
    with pytest.raises(ConfigError) as error:
        WorkDir(path, config(frozen, seed=4, optim__b1=0.5), frozen)
    assert "optim.b1: 0.9, now 0.5\n  seed: 3, now 4" in str(error.value)
    run_with(path, frozen, optim__total_steps=9, log_every=7)


def test_other_frozen_weights_at_the_same_place_are_refused(tmp_path, path):
    moved = write_frozen(tmp_path / "frozen")
    run_with(path, moved, 1)
    moved.rename(tmp_path / "old")
    write_frozen(tmp_path / "frozen", seed=1)
    with pytest.raises(ConfigError, match="model-00001-of-00001.safetensors of"):
        WorkDir(path, config(moved), moved)


def test_other_data_under_the_same_name_are_refused(frozen, path):
    cfg = config(frozen)
    run = WorkDir(path, cfg, frozen, {"photos": "0a", "val": "1b"})
    run.save(1, state(1))
    run.close()
    with pytest.raises(ConfigError) as error:
        WorkDir(path, cfg, frozen, {"photos": "0a", "val": "2c"})
    assert "val: other examples" in str(error.value)
    assert "photos" not in str(error.value)


def test_a_run_of_a_newer_format_is_not_resumed(frozen, path):
    run_with(path, frozen, 1)
    file = path / "config.json"
    newer = json.dumps(json.loads(file.read_text()) | {"format": 2})
    file.write_text(newer)
    with pytest.raises(CheckpointError, match="config.json: got format 2.*update"):
        WorkDir(path, config(frozen), frozen)
    assert file.read_text() == newer


def test_other_versions_are_said_to_be_no_longer_bitwise(
    frozen, path, monkeypatch, caplog
):
    run_with(path, frozen, 1)
    monkeypatch.setattr(workdir.minigpt4_jax, "__version__", "9.9")
    run_with(path, frozen)
    assert "minigpt4_jax is 9.9, the run began with" in caplog.text


def test_a_run_past_the_end_of_its_config_is_refused(frozen, path):
    run_with(path, frozen, 8)
    with pytest.raises(ConfigError, match="at step 8, want at most .*total_steps=6"):
        WorkDir(path, config(frozen, optim__total_steps=6), frozen)


# Saving and restoring.


def test_a_state_comes_back_as_it_was_saved(frozen, path):
    cfg = config(frozen)
    run = WorkDir(path, cfg, frozen)
    assert run.step == 0 and run.position is None
    assert run.restore(state(0)) is not None
    for step in (2, 5, 7):
        run.save(step, state(step), {"next": step})
    run.wait()
    assert run.step == 7
    run.save(7, state(99))  # it is there already
    run.close()
    run = WorkDir(path, cfg, frozen)
    assert run.step == 7 and run.position == {"next": 7}
    found = run.restore(state(0))
    np.testing.assert_array_equal(found["params"]["projector/bias"], [7, 7, 7])
    assert found["count"] == 7
    run.close()
    assert kept_in(path) == [5, 7] and newest(path) == 7


def test_the_last_and_every_so_many_steps_are_kept(frozen, path):
    run_with(path, frozen, *range(1, 8), keep__last=2, keep__every=3)
    assert kept_in(path) == [3, 6, 7]


def test_steps_that_follow_a_save_do_not_change_what_is_saved(
    frozen, path, monkeypatch
):
    held = threading.Event()
    monkeypatch.setattr(  # the thread that writes gets going after the steps below
        workdir.WorkDir,
        "_write",
        lambda *args, write=workdir.WorkDir._write: (held.wait(), write(*args)),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    big = np.arange(3_000_001, dtype=np.float32)
    now = {"params": {"projector/bias": jnp.asarray(big)}, "count": jnp.int32(5)}
    where = now["params"]["projector/bias"].unsafe_buffer_pointer()
    run = WorkDir(path, config(frozen), frozen)
    run.save(3, now)
    for _ in range(3):
        now = step(now)
    # The buffer was reused: had the saved state been a view of it, it would be -1 now.
    assert now["params"]["projector/bias"].unsafe_buffer_pointer() == where
    held.set()
    run.close()
    found = WorkDir(path, config(frozen), frozen).restore(now)
    np.testing.assert_array_equal(found["params"]["projector/bias"], big)
    assert found["count"] == 5
    saved = load_file(path / "trainables.safetensors")["projector/bias"]
    np.testing.assert_array_equal(saved, big)


def test_a_state_is_restored_onto_another_mesh(frozen, path):
    def placed(mesh, kernel):
        tree = {
            "params": {"llama/blocks/mlp/up/kernel": kernel},
            "opt_state": ({"llama/blocks/mlp/up/kernel": 2 * kernel}, np.int32(4)),
        }
        return sharding.place_state(tree, mesh)

    kernel = np.random.default_rng(0).normal(size=(2, 12, 20)).astype(np.float32)
    eight = placed(sharding.make_mesh(data=2, fsdp=2, tensor=2), kernel)
    run = WorkDir(path, config(frozen), frozen)
    run.save(2, eight)
    run.close()
    for mesh in (
        sharding.make_mesh(data=1, fsdp=4, tensor=1, devices=jax.devices()[:4]),
        sharding.make_mesh(devices=jax.devices()[:1]),
    ):
        target = placed(mesh, np.zeros_like(kernel))
        run = WorkDir(path, config(frozen), frozen)
        found = run.restore(target)
        run.close()
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(target)):
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(eight)):
            np.testing.assert_array_equal(got, want)


def test_a_checkpoint_of_other_shapes_is_refused(frozen, path):
    run_with(path, frozen, 2)
    run = WorkDir(path, config(frozen), frozen)
    other = state(0) | {"params": {"projector/bias": jnp.zeros(4)}}
    with pytest.raises(CheckpointError, match="checkpoints/2 cannot be restored"):
        run.restore(other)
    run.close()


def test_lines_after_the_checkpoint_are_dropped_since_their_steps_come_again(
    frozen, path
):
    run = WorkDir(path, config(frozen), frozen)
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
        run.log_samples(step, [{"photo": "7", "says": "ein Hund"}])
        if step == 2:
            run.save(step, state(step))
    run.close()
    run = WorkDir(path, config(frozen), frozen)
    run.restore(state(0))
    run.close()
    for name in ("metrics", "samples"):
        lines = (path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]


# Damage.


def largest(folder):
    files = [file for file in folder.glob("state/**/*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def truncate(file):
    os.truncate(file, file.stat().st_size - 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("which", ["array", "position", "trainables", "hashes"])
@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    frozen, path, which, damage
):
    run_with(path, frozen, 3, 6)
    folder = path / "checkpoints/6"
    file = {
        "array": largest(folder),
        "position": folder / "position.json",
        "trainables": folder / "trainables.safetensors",
        "hashes": folder / "sha256.json",
    }[which]
    damage(file)
    with pytest.raises(CheckpointError) as error:
        WorkDir(path, config(frozen), frozen).restore(state(0))
    text = str(error.value)
    assert "checkpoints/6 is damaged; delete it to go on from step 3" in text
    assert file.relative_to(folder).as_posix() in text
    shutil.rmtree(folder)
    run = WorkDir(path, config(frozen), frozen)
    assert run.step == 3 and run.restore(state(0))["count"] == 3
    run.close()
    assert newest(path) == 3


def test_a_damaged_checkpoint_with_none_before_it_says_so(frozen, path):
    run_with(path, frozen, 3)
    truncate(largest(path / "checkpoints/3"))
    run = WorkDir(path, config(frozen), frozen)
    with pytest.raises(CheckpointError, match="no other: delete it to begin ag"):
        run.restore(state(0))
    run.close()


# Saves that fail.


def failing(monkeypatch, times: int, error: Exception):
    """Makes the next so many checkpoints fail when their hashes are written."""
    seal, left = kept.seal, [error] * times

    def fail(part):
        if left:
            raise left.pop()
        seal(part)

    monkeypatch.setattr(kept, "seal", fail)


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_is_made_again_at_the_next_step(
    frozen, path, monkeypatch, caplog
):
    run_with(path, frozen, 2)
    failing(monkeypatch, 1, FULL)
    run = WorkDir(path, config(frozen), frozen)
    run.save(4, state(4))
    run._under_way.exception()
    assert run.save_again and run.step == 2
    assert locate.kept_steps(path) == [2] and newest(path) == 2
    run.save(5, state(5))
    assert "step 4 was not saved ([Errno 28] No space left on device)" in caplog.text
    run.close()
    assert run.step == 5 and not run.save_again
    assert kept_in(path) == [2, 5] and newest(path) == 5


def test_two_saves_that_fail_end_the_run_and_the_newest_checkpoint_stays(
    frozen, path, monkeypatch
):
    run_with(path, frozen, 2)
    failing(monkeypatch, 2, FULL)
    run = WorkDir(path, config(frozen), frozen)
    run.save(4, state(4))
    run.save(5, state(5))
    with pytest.raises(CheckpointError, match=r"step 5 .*No space.*on from step 2"):
        run.save(6, state(6))
    run.close()
    assert newest(path) == 2
    run_with(path, frozen)
    assert kept_in(path) == [2]


def test_the_last_save_is_tried_twice_too(frozen, path, monkeypatch):
    failing(monkeypatch, 1, FULL)
    run_with(path, frozen, 4)
    assert kept_in(path) == [4] and newest(path) == 4
    failing(monkeypatch, 2, FULL)
    run = WorkDir(path, config(frozen), frozen)
    run.save(6, state(6))
    with pytest.raises(CheckpointError, match="step 6 cannot be saved"):
        run.close()
    assert locate.kept_steps(path) == [4] and newest(path) == 4


def test_what_orbax_cannot_write_is_a_save_that_failed(frozen, path):
    """A limit on the size of files, which the system enforces as it does a full disk."""
    import resource

    big = {"params": {"projector/bias": np.random.default_rng(0).random(300_000)}}
    run = WorkDir(path, config(frozen), frozen)
    run.save(1, big)
    run.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        run.save(2, big)
        with pytest.raises(CheckpointError, match="step 2 cannot be saved"):
            run.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.save(3, big)
    run.close()
    assert kept_in(path) == [1, 3]


def test_what_a_save_left_unfinished_is_removed(frozen, path):
    run_with(path, frozen, 3, 6)
    for name in (".9.part", ".9.part/state.orbax-checkpoint-tmp", ".2.old"):
        (path / "checkpoints" / name).mkdir()
    (path / "trainables.safetensors").write_bytes(b"of step 9, not committed")
    run_with(path, frozen)
    assert kept_in(path) == [3, 6] and newest(path) == 6


def test_only_one_process_trains_in_a_folder(frozen, path):
    import subprocess
    import sys

    code = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    path.mkdir()
    command = [sys.executable, "-c", code, str(path / ".lock")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process is training there"):
            WorkDir(path, config(frozen), frozen)
        other.kill()
    WorkDir(path, config(frozen), frozen).close()


# A step that is kept, to be used.


@pytest.fixture
def trained(frozen, path):
    """A run of the tiny model that keeps steps 3 and 6."""
    run = WorkDir(path, config(frozen), frozen)
    for step in (3, 6):
        params = {
            name: np.full(value.shape, step / 10, np.float32)
            for name, value in training.arrays(tiny.model()).items()
            if name.startswith(("qformer/", "projector/"))
        }
        run.save(step, {"params": params})
    run.close()
    return path


def test_the_generator_serves_a_step_that_is_kept(trained):
    for name, value in ((f"{trained}@3", 0.3), (trained, 0.6), (f"{trained}@6", 0.6)):
        generator = Generator.load(name)
        kernel = np.asarray(generator.model.projector.kernel[...])
        np.testing.assert_array_equal(kernel, np.full_like(kernel, value))
    for step in ("4", "last", ""):
        with pytest.raises(
            CheckpointError, match=f"keeps no step '{step}'; kept: 3, 6"
        ):
            Generator.load(f"{trained}@{step}")
    with pytest.raises(CheckpointError, match="no directory at"):
        Generator.load(f"{trained.parent}@3")  # not a run


def test_a_step_that_is_kept_can_be_started_from(trained):
    model = tiny.model()
    found = checkpoint.load_trainables(model, checkpoint.resolve(f"{trained}@3"))
    assert "projector/bias" in found
    assert float(model.projector.bias[...][0]) == np.float32(0.3)


def test_a_damaged_step_is_not_served(trained):
    flip(trained / "checkpoints/3/trainables.safetensors")
    with pytest.raises(
        CheckpointError,
        match="(?s)3 is damaged; delete it; steps 6 are.*trainables.safetensors: sh",
    ):
        Generator.load(f"{trained}@3")
    Generator.load(trained)
