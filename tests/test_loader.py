"""Batches read ahead: the same whoever reads them, and in spite of what dies or hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax.data import loader as loader_lib
from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.loader import Loader, ReadPixels
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import DataError, InputError
from tests import tiny
from tests.fake_photos import Failing, Numbers, Photos, Recorded, Watched
from tests.training import write_shard

SOURCES = [Photos(9), Photos(5)]
BATCH = 4
RULES = tiny.CONFIG.vit


def load(sources=SOURCES, batch=BATCH, make=Numbers(), read=None, **knobs) -> Loader:
    plan = Plan([source.count for source in sources], [2, 1][: len(sources)], 3, batch)
    pixels = ReadPixels(sources, RULES)
    knobs = dict(stop=7, workers=0, limit_s=30) | knobs
    start = knobs.pop("start", 0)
    loader = Loader(
        sources,
        plan,
        make,
        read or pixels,
        image="pixels_BHWC",
        blank=pixels.blank,
        **knobs,
    )
    if start:
        loader.set_state(at(start))
    return loader


def at(step: int) -> dict:
    """The state of a loader that gave out so many steps, all of them good."""
    return {"step": step, "seen": 4 * step, "bad": {}}


def assert_same(got: list[dict], want: list[dict]) -> None:
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# Content.


def test_a_batch_has_the_plans_examples_and_their_exact_pixels():
    for step, batch in enumerate(load()):
        picks = Plan([9, 5], [2, 1], 3, BATCH).picks(step)
        np.testing.assert_array_equal(batch["picks_B3"], picks)
        assert batch["pixels_BHWC"].dtype == np.uint8
        assert (
            batch["ok_B"].tolist() == BATCH * [1] and batch["ok_B"].dtype == np.float32
        )
        for image_HWC, (source, _, example) in zip(batch["pixels_BHWC"], picks):
            value = image_HWC.astype(np.float32) / np.float32(255)
            mean, std = np.float32(RULES.mean), np.float32(RULES.std)
            want = preprocess(read_image(SOURCES[source].image(example)), RULES)
            np.testing.assert_array_equal((value - mean) / std, want)
    assert step == 6


@pytest.mark.parametrize("workers, prefetch", [(0, 1), (0, 4), (1, 1), (2, 3)])
def test_batches_are_the_same_from_threads_and_from_processes(workers, prefetch):
    assert_same(list(load(workers=workers, prefetch=prefetch)), list(load()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_from_any_step(workers):
    want = list(load())
    first = load()
    assert_same([next(first) for _ in range(3)], want[:3])
    again = load(workers=workers)
    again.set_state(json.loads(json.dumps(first.get_state())))
    assert_same(list(again), want[3:])
    assert_same(list(load(start=5)), want[5:])


def test_the_position_counts_what_was_given_out_not_what_was_read_ahead():
    loader = load(workers=1, prefetch=3)
    assert loader.get_state()["step"] == 0
    next(loader)
    time.sleep(0.2)
    assert loader.get_state()["step"] == 1
    loader.set_state(at(6))  # back and forth within one loader
    assert_same([next(loader)], list(load(start=6)))
    assert next(loader, None) is None
    loader.set_state(at(2))
    assert_same(list(loader), list(load(start=2)))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_have_equal_parts_of_the_same_batches(hosts):
    """More hosts than the data has files, too: each reads single examples."""
    whole = list(load())
    parts = [list(load(part=(k, hosts))) for k in range(hosts)]
    for step, batch in enumerate(whole):
        for name in ("picks_B3", "row_RT", "pixels_BHWC", "ok_B"):
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name], err_msg=name)
        for part in parts:
            np.testing.assert_array_equal(part[step]["words_V"], batch["words_V"])


def test_a_host_reads_the_images_of_its_own_part_alone():
    read = Recorded()
    list(load(part=(1, 2), read=read, prefetch=1))
    want = [
        pick for step in range(7) for pick in Plan([9, 5], [2, 1], 3, 4).picks(step)[2:]
    ]
    assert sorted(read.asked) == sorted((s, i) for s, _, i in np.array(want).tolist())


def test_a_real_data_set_is_read_by_processes(tmp_path):
    write_shard(tmp_path / "data/0.tar", range(5))
    write_shard(tmp_path / "data/1.tar", range(5, 7))
    examples = open_data(tmp_path / "data")
    read = ReadPixels([examples], RULES)
    plan = Plan([len(examples)], [1], 0, 7)
    knobs = dict(image="pixels_BHWC", blank=read.blank, stop=2)
    made = [
        list(Loader([examples], plan, Numbers(), read, workers=n, **knobs))
        for n in (0, 2)
    ]
    assert_same(*made)
    for batch in made[0]:
        order = np.argsort(batch["picks_B3"][:, 2])
        want = [read(0, i) for i in range(7)]
        np.testing.assert_array_equal(batch["pixels_BHWC"][order], want)


# Bad examples.


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_example_keeps_its_place_and_counts_for_nothing(workers, caplog):
    sources = [Photos(9, bad=[2]), Photos(5)]
    got, want = list(load(sources, workers=workers)), list(load())
    lost = 0
    for batch, whole in zip(got, want, strict=True):
        bad = (batch["picks_B3"][:, [0, 2]] == [0, 2]).all(axis=1)
        lost += bad.sum()
        np.testing.assert_array_equal(batch["ok_B"], 1 - bad)
        assert not batch["pixels_BHWC"][bad].any()
        np.testing.assert_array_equal(
            batch["pixels_BHWC"][~bad], whole["pixels_BHWC"][~bad]
        )
        np.testing.assert_array_equal(batch["row_RT"], whole["row_RT"])
    assert lost >= 2
    assert caplog.text.count("0.tar: 00002: image: ") == lost


def test_more_bad_examples_than_the_budget_name_their_shard(monkeypatch):
    monkeypatch.setattr(loader_lib, "FEW", 20)
    loader = load([Photos(9, bad=[4, 5, 6]), Photos(5)], budget=0.1, stop=40)
    with pytest.raises(DataError) as error:
        list(loader)
    assert "1.tar: 3 examples cannot be read, 3 of 12 in all" in str(error.value)
    assert "config.loader.budget" in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_other_errors_are_raised_at_once_as_they_are(workers):
    loader = load(make=Failing(3), workers=workers)
    for step in range(3):
        assert loader.get_state()["step"] == step
        next(loader)
    with pytest.raises(InputError, match="no arrays for step 3"):
        next(loader)


# Processes that die or hang.


def others(folder: Path) -> list[int]:
    """Process ids of those that made steps."""
    return [int(path.stem) for path in folder.glob("*.txt")]


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_loader_processes_import_no_jax_and_no_program(tmp_path):
    list(load(make=Watched(tmp_path, 99, signal.SIGCONT), workers=2))
    found = others(tmp_path)
    assert len(found) == 2 and os.getpid() not in found
    for pid in found:
        modules = (tmp_path / f"{pid}.txt").read_text().split()
        assert {"numpy", "grain"} <= set(modules)
        assert not {"jaxlib", "flax", "torch", "pytest"} & set(modules)


def test_a_process_that_dies_is_replaced_and_no_batch_changes(tmp_path, caplog):
    make = Watched(tmp_path, 3, signal.SIGSEGV)
    assert_same(list(load(make=make, workers=2)), list(load()))
    assert "a loader process ended (signal 11); loading begins anew" in caplog.text


def test_a_process_killed_from_outside_is_replaced(tmp_path):
    loader = load(make=Watched(tmp_path, 99, signal.SIGCONT), workers=2, prefetch=1)
    got = [next(loader)]
    for pid in others(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert_same([*got, *loader], list(load()))


def test_a_process_that_hangs_is_replaced_and_no_batch_changes(tmp_path, caplog):
    make = Watched(tmp_path, 5, signal.SIGSTOP)
    loader = load(make=make, workers=2, limit_s=1.5)
    assert_same(list(loader), list(load()))
    assert "no batch in 1.5 s; loading begins anew there" in caplog.text
    assert not any(map(alive, others(tmp_path)))


def test_a_step_that_always_kills_ends_the_loader(tmp_path, caplog):
    loader = load(make=Watched(tmp_path, 2, signal.SIGKILL, always=True), workers=1)
    with pytest.raises(DataError, match=r"step 2: .*signal 9.*4 times in a row"):
        list(loader)
    assert loader.get_state()["step"] == 2
    assert caplog.text.count("loading begins anew") == loader_lib.RETRIES


def test_closing_ends_the_processes(tmp_path):
    loader = load(make=Watched(tmp_path, 99, signal.SIGCONT), workers=2)
    next(loader)
    loader.close()
    assert others(tmp_path) and not any(map(alive, others(tmp_path)))
    next(loader)  # goes on with new ones
    del loader
    assert len(others(tmp_path)) > 2 and not any(map(alive, others(tmp_path)))


PROGRAM = """
import signal, sys
from pathlib import Path
from tests.fake_photos import Watched
from tests.test_loader import load

loader = load(make=Watched(Path(sys.argv[1]), 99, signal.SIGCONT), workers=2, stop=10**6)
for _ in range(3):
    next(loader)
print("ready", flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["wait", "exit"])
def test_processes_end_with_their_program(end, tmp_path):
    """Killed, or ended in the midst of the data without a word on stderr."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if end == "wait":
        assert program.stdout.readline() == "ready\n"
        program.kill()
    _, errors = program.communicate(timeout=60)
    if end == "exit":
        assert (program.returncode, errors) == (0, "")
    until = time.monotonic() + 10
    while any(map(alive, others(tmp_path))) and time.monotonic() < until:
        time.sleep(0.1)
    assert others(tmp_path) and not any(map(alive, others(tmp_path)))


def test_signals_to_the_whole_group_leave_the_processes_at_work(tmp_path):
    """As a cluster sends SIGTERM: the trainer still needs batches until it has saved."""
    loader = load(make=Watched(tmp_path, 99, signal.SIGCONT), workers=2, prefetch=1)
    got = [next(loader), next(loader)]
    before = others(tmp_path)
    assert len(before) == 2
    for pid in before:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert_same([*got, *loader], list(load()))
    assert sorted(others(tmp_path)) == sorted(before)
