"""Whole runs of a tiny model: three stages, resumed, stopped, killed, refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from minigpt4_jax import Generator, train, workdir
from minigpt4_jax.errors import ConfigError, DataError
from tests import training

ROOT = Path(__file__).parent.parent
STAGES = ("words", "captions", "dialogues")
STEPS = 24
SPEED = {
    *("examples_per_s", "tokens_per_s", "answer_tokens_per_s", "step_s", "waiting"),
    *("memory_gb", "mfu"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A frozen model and photos."""
    folder = tmp_path_factory.mktemp("train")
    training.write_frozen(folder / "frozen")
    training.write_photos(folder / "data")
    return folder


def stage_config(folder: Path, loss: str, init: str = ""):
    return training.config(
        folder / "frozen",
        loss=loss,
        init=init and str(folder / init),
        batch_size=6,  # all photos in every step
        text__one_sentence=1.0,  # and all captions: the losses can be compared
        optim__total_steps=STEPS,
        save_every=10,
        eval_every=STEPS,
    )


def run(folder: Path, cfg, name: str, devices=1) -> bool:
    return train.train(cfg, folder / name, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def chain(folder):
    """Three stages, each from the one before."""
    before = ""
    for loss in STAGES:
        assert run(folder, stage_config(folder, loss, before), loss)
        before = loss
    return folder


def metrics(path: Path) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trained(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "trainables.safetensors")


def assert_same_run(path: Path, other: Path) -> None:
    """The same weights, optimizer and losses, bit by bit."""
    ours, theirs = trained(path), trained(other)
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    timeless = [
        [{k: v for k, v in record.items() if k not in SPEED} for record in found]
        for found in (metrics(path), metrics(other))
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("loss", STAGES)
def test_the_loss_of_each_stage_goes_down(chain, loss):
    losses = [record["loss"] for record in metrics(chain / loss)]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    # A random decoder can be told only so much by three slots.
    drop = {"words": 0.7, "captions": 0.96, "dialogues": 0.99}[loss]
    assert np.mean(losses[-3:]) < drop * np.mean(losses[:2])


def test_each_stage_begins_with_the_weights_of_the_one_before(chain, monkeypatch):
    begun = []

    def far_enough(trainables, *_):
        begun.append(dict(trainables.params))
        raise ZeroDivisionError

    monkeypatch.setattr(train, "make_step", far_enough)
    cfg = stage_config(chain, "captions", "words")
    with pytest.raises(ZeroDivisionError):
        run(chain, cfg, "begun")
    before = trained(chain / "words")
    assert set(begun[0]) == set(before)
    for name, value in begun[0].items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_run_says_how_it_goes(chain):
    last = metrics(chain / "captions")[-1]
    assert set(last) - {"mfu"} == {
        *(
            "step",
            "loss",
            "grad_norm",
            "lr",
            "answer_tokens",
            "skipped",
            "bad_examples",
        ),
        *("val_loss", "val_loss_exchanged"),
        *(SPEED - {"mfu"}),
    }
    assert last["step"] == STEPS and last["val_loss"] > 0
    assert last["skipped"] == last["bad_examples"] == 0
    for loss in ("captions", "dialogues"):
        lines = (chain / loss / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert [sample["photo"] for sample in samples] == ["00006", "00007"]
    assert not (chain / "words" / "samples.jsonl").exists()  # no decoder in it


def test_the_generator_reads_a_work_directory(chain):
    generator = Generator.load(chain / "dialogues", chunk=2)
    found = training.arrays(generator.model)
    for name, value in trained(chain / "dialogues").items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_finished_run_is_left_as_it_is(chain, monkeypatch):
    monkeypatch.setattr(train.checkpoint, "load_model", None)  # not reached
    before = (chain / "words" / "trainables.safetensors").stat().st_mtime_ns
    assert run(chain, stage_config(chain, "words"), "words")
    assert (chain / "words" / "trainables.safetensors").stat().st_mtime_ns == before


def test_sigterm_saves_and_the_resumed_run_is_the_unbroken_one(chain, monkeypatch):
    log = workdir.WorkDir.log

    def terminate(self, step, record):
        log(self, step, record)
        if step == 13:  # not a step that saves
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(workdir.WorkDir, "log", terminate)
    cfg = stage_config(chain, "captions", "words")
    assert not run(chain, cfg, "stopped")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (chain / "stopped" / "checkpoints" / "14").is_dir()  # the step it was in
    monkeypatch.undo()
    cfg = workdir.saved_config(chain / "stopped")  # --workdir alone
    assert run(chain, cfg, "stopped")
    assert_same_run(chain / "stopped", chain / "captions")


def short(chain, run_name: str, **changes) -> list[float]:
    """The losses of six steps of stage 1."""
    cfg = stage_config(chain, "captions", "words")
    cfg.optim.total_steps = cfg.save_every = cfg.eval_every = 6
    for name, value in changes.items():
        if isinstance(value, dict):
            cfg[name].update(value)
        else:
            cfg[name] = value
    assert run(chain, cfg, run_name)
    return [record["loss"] for record in metrics(chain / run_name)]


@pytest.mark.slow
def test_a_run_over_an_int8_decoder_learns_and_its_resumed_one_is_the_unbroken_one(
    chain, monkeypatch
):
    plain = short(chain, "in-floats")
    losses = short(chain, "in-int8", quantize="int8")
    assert 0 < np.abs(np.array(losses) - plain).max() < 0.02 * plain[0]
    assert losses[-1] < losses[0]
    log = workdir.WorkDir.log

    def break_off(self, step, record):
        log(self, step, record)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(workdir.WorkDir, "log", break_off)
    cfg = stage_config(chain, "captions", "words")
    cfg.optim.total_steps = cfg.save_every = cfg.eval_every = 6
    cfg.quantize = "int8"
    assert not run(chain, cfg, "int8-stopped")
    monkeypatch.undo()
    assert run(chain, workdir.saved_config(chain / "int8-stopped"), "int8-stopped")
    assert_same_run(chain / "int8-stopped", chain / "in-int8")
    cfg.quantize = ""
    with pytest.raises(ConfigError, match="quantize: int8, now"):
        run(chain, cfg, "int8-stopped")


@pytest.mark.slow
def test_runs_without_kept_features_packed_or_in_parts_learn_the_same(chain):
    """The same content in another form: only sums in another order."""
    want = short(chain, "plain")
    for name, changes in {
        "uncached": dict(cache=dict(dtype=""), val=""),
        "packed": dict(row=dict(packed=700)),
        "parts": dict(optim=dict(accumulate=2)),
        "processes": dict(loader=dict(workers=1)),
        "recomputed": dict(remat="block"),
    }.items():
        np.testing.assert_allclose(short(chain, name, **changes), want, rtol=2e-5)
        for path, value in trained(chain / name).items():
            if path.endswith("/k/bias"):  # its gradient is rounding: softmax is blind
                continue
            other = trained(chain / "plain")[path]
            np.testing.assert_allclose(
                value, other, atol=1e-5, err_msg=f"{name} {path}"
            )


def test_steps_that_stay_broken_end_the_run_and_their_batches_are_kept(chain):
    cfg = stage_config(chain, "captions", "words")
    cfg.optim.peak_lr, cfg.optim.end_lr, cfg.guard.skipped = 1e30, 1e30, 2
    with pytest.raises(DataError, match="2 steps in a row .* not finite"):
        run(chain, cfg, "broken")
    kept = sorted((chain / "broken" / "skipped").iterdir())
    assert len(kept) == 2 and "0/ids_RT" in np.load(kept[0])


@pytest.mark.slow
def test_a_run_on_eight_devices_breaks_off_and_is_resumed(folder, monkeypatch):
    log = workdir.WorkDir.log

    def break_off(self, step, record):
        log(self, step, record)
        if step == 3:
            raise KeyboardInterrupt

    cfg = stage_config(folder, "words")
    cfg.batch_size, cfg.save_every = 8, 2
    cfg.mesh = dict(data=2, fsdp=2, tensor=2)
    cfg.optim.total_steps = cfg.eval_every = 5
    monkeypatch.setattr(workdir.WorkDir, "log", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(folder, cfg, "eight", devices=8)
    monkeypatch.undo()
    assert run(folder, cfg, "eight", devices=8)
    losses = [record["loss"] for record in metrics(folder / "eight")]
    assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "knob, value, complaint",
    [
        ("batch_size", 3, "batch of 3 does not split over data=2"),
        ("trainable", ("projectr/.*",), "did you mean 'projector/"),
        ("quantize", "int8", "llama/blocks/attn/k/kernel would be held in int8"),
        (
            "trainable",
            (".*",),
            "the ViT is trained, so that nothing it makes can be kept",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_step(
    folder, monkeypatch, knob, value, complaint
):
    monkeypatch.setattr(train, "make_step", None)
    cfg = stage_config(folder, "words")
    cfg[knob] = value
    if knob == "quantize":
        cfg.trainable = ("projector/.*", "llama/.*")
    with pytest.raises(ConfigError, match=complaint):
        run(folder, cfg, f"refused-{len(str(value))}", devices=2)


def test_flags_that_are_absent_or_mistyped_end_with_a_sentence(folder):
    flags = ["--config", "configs/demo_stage1.py"]
    for more, code, complaint in (
        ([], 2, "train needs --workdir"),
        (["--workdir=gs://bucket/run"], 2, "mount the bucket"),
        (["--config.batchsize=2"], 3, 'Did you mean "batch_size"'),
    ):
        command = [sys.executable, "-m", "minigpt4_jax.train", *flags, *more]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stderr
        assert complaint in done.stderr and "Traceback" not in done.stderr
