"""Speed is measured as it is named, shown where it is asked for, and ends no run."""

import io
import logging
import struct
import sys
import types

import pytest
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from minigpt4_jax import progress
from minigpt4_jax.data.sources import Example
from minigpt4_jax.progress import Bar, Board, Meter, keep_photos
from tests import training


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def take_step(meter, clock, seconds, **counts):
    clock.now += seconds
    given = dict(examples=6, answer_tokens=40, tokens=100, flops=3e9, waited=0.5)
    meter.step(**given | counts)


def test_rates_are_counts_by_the_seconds_of_their_steps(clock):
    meter = Meter(peak_flops=1e10, clock=clock)
    for seconds, examples in ((1.0, 6), (3.0, 8)):
        take_step(meter, clock, seconds, examples=examples)
    meter.read()
    for seconds, examples in ((1.0, 6), (1.0, 8), (3.0, 10)):
        take_step(meter, clock, seconds, examples=examples)
    clock.now += 7  # what comes after the last step belongs to the next one
    found = meter.read()
    assert found.pop("memory_gb") > 0.01
    assert found == pytest.approx(
        {
            "examples_per_s": 24 / 5,
            "tokens_per_s": 300 / 5,
            "answer_tokens_per_s": 120 / 5,
            "step_s": 1.0,
            "waiting": 1.5 / 5,
            "mfu": 9e9 / 5 / 1e10,
        }
    )
    assert meter.read() == {}
    take_step(meter, clock, 1.0)
    assert meter.read()["examples_per_s"] == pytest.approx(6 / 8)


def test_the_step_that_compiles_counts_only_where_it_is_alone(clock):
    meter = Meter(clock=clock)
    take_step(meter, clock, 60.0)
    take_step(meter, clock, 2.0)
    take_step(meter, clock, 2.0)
    assert meter.read()["examples_per_s"] == pytest.approx(12 / 4)
    meter = Meter(clock=clock)
    take_step(meter, clock, 60.0)
    assert meter.read()["examples_per_s"] == pytest.approx(6 / 60)
    take_step(meter, clock, 2.0)
    take_step(meter, clock, 2.0)
    assert meter.read()["examples_per_s"] == pytest.approx(12 / 4)


def test_evaluations_and_saves_are_not_in_the_rates_even_when_they_fail(clock):
    meter = Meter(clock=clock)
    take_step(meter, clock, 1.0)
    meter.read()
    with pytest.raises(OSError), meter.paused():
        clock.now += 100
        raise OSError
    take_step(meter, clock, 2.0)
    found = meter.read()
    assert found["examples_per_s"] == pytest.approx(3)
    assert found["step_s"] == pytest.approx(2)


@pytest.mark.parametrize("peak, flops", [(None, 3e9), (1e10, 0.0)])
def test_utilization_is_absent_when_unknown(clock, peak, flops):
    meter = Meter(peak_flops=peak, clock=clock)
    take_step(meter, clock, 1.0, flops=flops)
    assert "mfu" not in meter.read()


def test_memory_is_that_of_the_fullest_device_or_else_of_the_process():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    counted = [device({"peak_bytes_in_use": n}) for n in (5, 11, 7)]
    assert progress.memory(counted) == 11
    assert 10e6 < progress.memory([device(None), device({})]) < 1e12


def events(folder) -> list[Event]:
    """All events of a folder, files in the order in which TensorBoard reads them."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def points(folder) -> dict[tuple[int, str], float]:
    """What TensorBoard shows: a start drops the points from its step on."""
    shown = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            shown = {at: v for at, v in shown.items() if at[0] < event.step}
        for value in event.summary.value:
            shown[event.step, value.tag] = value.simple_value
    return shown


def test_numbers_go_to_tensorboard_and_a_resumed_run_drops_what_it_does_again(tmp_path):
    board = Board(tmp_path)
    for step in (2, 4, 6):
        board.log(step, {"loss": 10.0 - step, "lr": 0.5})
    # Not closed: a killed process closes nothing.
    board = Board(tmp_path, step=4)
    board.log(6, {"loss": 1.5})
    board.close()
    assert points(tmp_path / "tensorboard") == {
        **{(2, "loss"): 8.0, (2, "lr"): 0.5, (4, "loss"): 6.0, (4, "lr"): 0.5},
        (6, "loss"): 1.5,
    }


def test_only_the_first_process_writes(tmp_path):
    board = Board(tmp_path / "run", active=False)
    board.log(1, {"loss": 1.0})
    board.close()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_board_and_not_the_run(tmp_path, monkeypatch, caplog):
    board = Board(tmp_path)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", refuse)
    for step in range(20):
        board.log(step, {"loss": 1.0})
    board.close()
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard stops here: [Errno 28] No space left on device"
    ]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, asked for by a project; notes what it is told."""
    told = []
    run = types.SimpleNamespace(
        log=told.append,
        define_metric=lambda *a, **k: None,
        finish=lambda: told.append("finished"),
    )
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.Settings = lambda **k: k
    module.init = lambda **k: told.append((k["id"], k["resume"], k["config"])) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "alignment")
    for name in ("WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return types.SimpleNamespace(told=told, run=run, module=module)


def test_weights_and_biases_goes_on_with_the_run_when_it_resumes(tmp_path, wandb):
    for step in (0, 3):
        board = Board(tmp_path, step=step, config={"seed": 3})
        board.log(step + 1, {"loss": 2.0})
        board.close()
    (first, *_), *_ = wandb.told
    assert len(first) == 8
    assert wandb.told == [
        *((first, "allow", {"seed": 3}), {"step": 1, "loss": 2.0}, "finished"),
        *((first, "allow", {"seed": 3}), {"step": 4, "loss": 2.0}, "finished"),
    ]


def fail(*_, **__):
    raise RuntimeError("no network")


def test_weights_and_biases_never_fails_the_run(tmp_path, wandb, caplog):
    wandb.run.log = fail
    board = Board(tmp_path)
    board.log(1, {"loss": 3.0})
    board.log(2, {"loss": 2.0})
    board.close()
    wandb.module.init = fail
    Board(tmp_path, step=2).close()
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases stops here: no network",
        "Weights & Biases is not used: no network",
    ]
    assert len(points(tmp_path / "tensorboard")) == 2


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, False),
        ({"WANDB_API_KEY": "x"}, False),  # of another project of the same person
        ({"WANDB_PROJECT": "alignment"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "disabled", "WANDB_PROJECT": "alignment"}, False),
    ],
)
def test_weights_and_biases_is_used_when_its_own_variables_ask(
    wandb, environment, wanted
):
    assert progress.wandb_wanted(environment) == wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_with_loss_rate_and_speed_below_the_log():
    terminal = Terminal()
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        with Bar(9, step=4, file=terminal) as bar:
            bar.step({"loss": 2.3456789, "lr": 3e-5, "examples_per_s": 12.3, "x": 1.0})
            assert handler not in logger.handlers  # it would write into the bar
        assert handler in logger.handlers
    finally:
        logger.removeHandler(handler)
    last = terminal.getvalue().rpartition("\r")[2]
    assert "5/9" in last
    assert "loss=2.346, lr=3e-05, examples/s=12.3" in last


@pytest.mark.parametrize("file, active", [(io.StringIO(), True), (Terminal(), False)])
def test_a_file_and_other_processes_see_no_bar(file, active):
    with Bar(9, active=active, file=file) as bar:
        bar.step({"loss": 2.0})
        bar.step()
    assert file.getvalue() == ""


def example(key: str, image: bytes) -> Example:
    return Example(key, image, ("A dog.",), "", "")


def test_photos_are_kept_small_once_and_under_names_that_no_key_can_bend(tmp_path):
    large = io.BytesIO()
    Image.new("RGB", (900, 300), "red").save(large, "png")
    photos = [example("../../odd", large.getvalue()), example("0", training.jpeg(3))]
    files = keep_photos(tmp_path, photos)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    assert set(files) == {"../../odd", "0"} and set(files.values()) == set(written)
    assert Image.open(tmp_path / "samples" / files["../../odd"]).size == (256, 85)
    assert Image.open(tmp_path / "samples" / files["0"]).size == (14, 16)
    assert keep_photos(tmp_path, photos) == files
    assert written == {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}


def test_a_photo_that_cannot_be_kept_does_not_end_the_run(tmp_path, caplog):
    assert keep_photos(tmp_path, [example("7", b"no image")]) == {"7": ""}
    assert "photo 7 is not kept" in caplog.text
    (tmp_path / "samples").rmdir()
    (tmp_path / "samples").write_text("a file where the folder should be")
    assert keep_photos(tmp_path, [example("8", training.jpeg(1))]) == {"8": ""}
