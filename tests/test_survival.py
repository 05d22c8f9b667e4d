"""Processes that are really killed: what they leave goes on as if nothing had been."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from minigpt4_jax import kept, locate, sharding
from minigpt4_jax.workdir import WorkDir
from tests import dying, training

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    return training.write_frozen(tmp_path_factory.mktemp("models") / "frozen")


@pytest.fixture(scope="module")
def unbroken(frozen, tmp_path_factory):
    """The toy run, from its first step to its last."""
    path = tmp_path_factory.mktemp("runs") / "unbroken"
    assert dying.in_process(dying.toy, path, frozen) == 0
    return path


def assert_same(path: Path, other: Path) -> None:
    """Weights, optimizer, losses and files, bit by bit."""
    ours, theirs = dying.saved_arrays(path), dying.saved_arrays(other)
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in ("metrics.jsonl", locate.TRAINABLES):
        assert (path / name).read_bytes() == (other / name).read_bytes()
    kept = [
        sorted(p.name for p in (w / "checkpoints").iterdir()) for w in (path, other)
    ]
    assert kept[0] == kept[1]


# A save that is cut short.


def test_a_run_killed_wherever_its_first_save_comes_by_reaches_the_same_end(
    frozen, unbroken, tmp_path
):
    path = tmp_path / "run"
    for place in ("step", *list(dying.PLACES)[:-1]):  # nothing old is there to remove
        code = dying.in_process(dying.toy, path, frozen, (place, dying.EVERY))
        assert code == -signal.SIGKILL, place
    assert dying.in_process(dying.toy, path, frozen) == 0
    assert_same(path, unbroken)


def test_a_run_killed_wherever_a_later_save_comes_by_reaches_the_same_end(
    frozen, unbroken, tmp_path
):
    path = tmp_path / "run"
    for place in dying.PLACES:
        step = 8 if place == "an old checkpoint is removed" else 6  # 6 has its name
        code = dying.in_process(dying.toy, path, frozen, (place, step))
        assert code == -signal.SIGKILL, place
        load_file(path / locate.TRAINABLES)  # whole, whichever step it is of
        kept.check(locate.resolve(f"{path}@4" if step == 6 else f"{path}@6"))
    assert dying.in_process(dying.toy, path, frozen) == 0
    assert_same(path, unbroken)


# A full disk.


def test_a_run_that_cannot_write_ends_with_its_code_and_goes_on_when_it_can(
    frozen, unbroken, tmp_path
):
    path = tmp_path / "run"
    ended = dying.in_process(dying.toy_with_code, path, frozen, limit=50_000)
    assert ended == 4
    assert locate.kept_steps(path) == [2, 4]
    np.testing.assert_array_equal(
        load_file(path / locate.TRAINABLES)["projector/bias"],
        load_file(path / "checkpoints/4" / locate.TRAINABLES)["projector/bias"],
    )
    assert dying.in_process(dying.toy, path, frozen) == 0
    assert_same(path, unbroken)


FULL = """
set -e
mount -t tmpfs -o size=1400k none "$1"
"$2" -c "$3" "$1/run" "$4" && exit 1 || test $? = 4
ls "$1/run/checkpoints" >&2
mount -o remount,size=20m "$1"
"$2" -c "$3" "$1/run" "$4"
cp -r "$1/run" "$5"
"""
TOY = "import sys; from tests import dying; dying.toy_with_code(*map(dying.Path, sys.argv[1:]))"


def test_a_run_on_a_full_disk_ends_and_goes_on_when_there_is_room(
    frozen, unbroken, tmp_path
):
    """In a mount of its own, which needs no rights where users may have namespaces."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*alone, "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("nothing can be mounted here")
    done = subprocess.run(
        [*alone, "sh", "-c", FULL, "sh", disk, sys.executable, TOY, frozen]
        + [tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout
    assert_same(tmp_path / "run", unbroken)


# Two processes.


def test_two_processes_save_one_checkpoint_that_any_number_restores(frozen, tmp_path):
    path = tmp_path / "run"
    port = dying.free_port()
    # A save that one process cannot finish is made again by both.
    calls = [(dying.one_of_two, (path, frozen, port, i, 1 - i), {}) for i in range(2)]
    assert dying.in_processes(*calls) == [0, 0]
    assert locate.kept_steps(path) == [2, 4]
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 1
    mesh = sharding.make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    run = WorkDir(path, training.config(frozen), frozen)
    found = run.restore(dying.sharded_state(mesh, 0))
    run.close()
    wanted = dying.sharded_state(mesh, 4)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(got, want)
    for name, array in load_file(path / locate.TRAINABLES).items():
        np.testing.assert_array_equal(array, wanted["params"][name])
