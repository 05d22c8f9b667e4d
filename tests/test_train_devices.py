"""Over any number of devices and processes, a run learns what one device does."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from minigpt4_jax import locate, train
from minigpt4_jax.data.sources import open_data
from tests import dying, training, whole_runs

# Sums of other parts in another order, in float32, and AdamW on top of them.
RTOL = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    training.write_frozen(folder / "frozen")
    training.write_photos(folder / "data", train=11, val=2)
    return folder


def same_losses(path: Path, other: Path) -> None:
    found = [
        [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (path, other)
    ]
    assert [r["step"] for r in found[0]] == [r["step"] for r in found[1]]
    for ours, theirs in zip(*found):
        for name in ("loss", "grad_norm", "answer_tokens", "val_loss"):
            assert (name in ours) == (name in theirs)
            if name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=RTOL)


def run(folder: Path, name: str, devices: int, quantize: str = "", **mesh: int) -> None:
    cfg = training.config(
        folder / "frozen",
        batch_size=8,
        optim__total_steps=4,
        save_every=2,
        eval_every=4,
        quantize=quantize,
    )
    cfg.mesh.update(mesh)
    assert train.train(cfg, folder / name, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def on_one(folder):
    run(folder, "one", devices=1)
    return folder / "one"


@pytest.mark.parametrize(
    "devices, mesh",
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(4, dict(fsdp=2), marks=pytest.mark.slow),
        (8, dict(fsdp=2, tensor=2)),
    ],
)
def test_a_run_over_several_devices_has_the_losses_of_one(
    folder, on_one, devices, mesh
):
    run(folder, str(devices), devices, **mesh)
    same_losses(folder / str(devices), on_one)


@pytest.mark.slow
def test_a_run_over_an_int8_decoder_has_the_losses_of_one_device(folder):
    run(folder, "int8-one", devices=1, quantize="int8")
    run(folder, "int8-eight", devices=8, quantize="int8", fsdp=2, tensor=2)
    same_losses(folder / "int8-eight", folder / "int8-one")


def test_two_processes_end_at_the_same_step_and_one_goes_on(folder, on_one, tmp_path):
    """SIGTERM comes to one of them; they share one shard, which is fewer than they."""
    assert len(list(open_data(folder / "data/train").paths)) == 1
    path, port = tmp_path / "two", dying.free_port()
    calls = [(whole_runs.one_of, (i, port, path, folder), {"ends": 2}) for i in (0, 1)]
    assert dying.in_processes(*calls) == [train.TERMINATED] * 2
    assert 3 <= max(locate.kept_steps(path)) < whole_runs.TOTAL
    for place in (path, tmp_path / "one"):
        assert dying.in_process(whole_runs.alone, place, folder) == 0
    same_losses(path, tmp_path / "one")


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one(folder, tmp_path):
    assert dying.in_process(whole_runs.alone, tmp_path / "one", folder, 4) == 0
    path, port = tmp_path / "four", dying.free_port()
    calls = [(whole_runs.one_of, (i, port, path, folder, 4), {}) for i in range(4)]
    assert dying.in_processes(*calls) == [0] * 4
    same_losses(path, tmp_path / "one")
