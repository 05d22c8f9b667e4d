"""Trainings that are really killed, stalled and started elsewhere end as the unbroken one."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax import train
from tests import dying, training, whole_runs

SPEED = {
    *("examples_per_s", "tokens_per_s", "answer_tokens_per_s", "step_s", "waiting"),
    *("memory_gb", "mfu"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A frozen model, photos, and a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("survival")
    training.write_frozen(folder / "frozen")
    training.write_photos(folder / "data", train=7, val=2)
    assert dying.in_process(whole_runs.run, folder / "unbroken", folder) == 0
    return folder


def losses(path: Path) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in SPEED} for r in records]


def assert_same(path: Path, other: Path) -> None:
    """Weights, optimizer state and losses, bit by bit."""
    ours, theirs = dying.saved_arrays(path), dying.saved_arrays(other)
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert losses(path) == losses(other)


def random_end(seed: int) -> tuple[str, int]:
    """Where and when a run is killed."""
    rng = np.random.default_rng(seed)
    places = ["killed", "killed", *dying.PLACES]
    step = int(rng.integers(whole_runs.TOTAL - 2))
    return places[rng.integers(len(places))], step


def killed_and_resumed(folder: Path, path: Path, seed: int) -> None:
    for attempt in range(2):
        ended = dying.in_process(
            whole_runs.run, path, folder, random_end(100 * seed + attempt)
        )
        # The second end may lie before the step from which the run goes on.
        assert ended == -signal.SIGKILL or (attempt and ended == 0)
    assert dying.in_process(whole_runs.run, path, folder) == 0
    assert_same(path, folder / "unbroken")


def test_a_killed_run_ends_as_the_unbroken_one(folder, tmp_path):
    killed_and_resumed(folder, tmp_path / "run", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_run_killed_anywhere_ends_as_the_unbroken_one(folder, tmp_path, seed):
    killed_and_resumed(folder, tmp_path / "run", seed)


@pytest.mark.slow
def test_a_run_killed_in_its_first_step_begins_again(folder, tmp_path):
    ended = dying.in_process(whole_runs.run, tmp_path / "run", folder, ("killed", 0))
    assert ended == -signal.SIGKILL
    assert dying.in_process(whole_runs.run, tmp_path / "run", folder) == 0
    assert_same(tmp_path / "run", folder / "unbroken")


@pytest.mark.slow
def test_a_second_sigterm_while_the_first_is_saved_changes_nothing(folder, tmp_path):
    path = tmp_path / "run"
    ended = dying.in_process(whole_runs.run, path, folder, ("terminated twice", 2))
    assert ended == train.TERMINATED == 143
    assert (path / "checkpoints" / "3").is_dir()
    assert dying.in_process(whole_runs.run, path, folder) == 0
    ours = dying.saved_arrays(path)
    for name, value in dying.saved_arrays(folder / "unbroken").items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("hurt", ["worker killed", "worker stalls"])
def test_a_loader_process_that_dies_or_stalls_costs_only_time(folder, tmp_path, hurt):
    path = tmp_path / "run"
    assert dying.in_process(whole_runs.run, path, folder, (hurt, 0)) == 0
    assert_same(path, folder / "unbroken")


@pytest.mark.parametrize(
    "damage", ["cut short", pytest.param("flipped", marks=pytest.mark.slow)]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(
    folder, tmp_path, damage, capfd
):
    path = tmp_path / "run"
    shutil.copytree(folder / "unbroken", path)
    newest = path / "checkpoints" / str(whole_runs.TOTAL)
    victim = max((newest / "state").rglob("*"), key=lambda f: f.stat().st_size)
    data = bytearray(victim.read_bytes())
    if damage == "cut short":
        data = data[:-7]
    else:
        data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    longer = whole_runs.TOTAL + 2  # else there is nothing to restore
    ended = in_fresh_process(whole_runs.run, path, folder, None, longer)
    said = capfd.readouterr().err
    assert ended == 1 and "CheckpointError" in said
    assert victim.name in said and "go on from step 6" in said
    shutil.rmtree(newest)
    assert dying.in_process(whole_runs.run, path, folder) == 0
    assert_same(path, folder / "unbroken")


@pytest.mark.parametrize("broken", ["corrupt", "unwritable"])
@pytest.mark.slow
def test_a_broken_cache_of_compiled_programs_is_warned_of_and_gone_around(
    folder, tmp_path, monkeypatch, capfd, broken
):
    cache = tmp_path / "compiled"
    cache.mkdir()
    for file in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).iterdir():
        (cache / file.name).write_bytes(b"no program")
    if broken == "unwritable":
        (tmp_path / "file").write_text("not a folder")
        cache = tmp_path / "file" / "in"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    ended = in_fresh_process(whole_runs.run, tmp_path / "run", folder)
    assert ended == 0
    assert "Error reading persistent compilation cache" in capfd.readouterr().err
    assert_same(tmp_path / "run", folder / "unbroken")


def in_fresh_process(function, *args) -> int:
    """As dying.in_process, but with the environment of now."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode
