"""How a run goes, while it goes: a meter of its speed, and where its numbers are shown.

The loop feeds `Meter` after each step and gives what it reads to `Board` (TensorBoard,
Weights & Biases) and `Bar` (a terminal). metrics.jsonl is workdir.py's. `keep_photos`
puts beside a run what its samples are of; report.py makes a page of all this.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import resource
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4_jax.data.images import read_image
from minigpt4_jax.data.sources import Example
from minigpt4_jax.errors import InputError

logger = logging.getLogger(__name__)

PHOTO_SIDE = 256  # most pixels of a side of a photo that is kept for the report


class Meter:
    """Speed, utilization and memory since the last look.

    The first step of a process compiles: where a window holds others too, it is left out.
    """

    _began: float  # of the window
    _last: float  # step's end
    _seconds: list[float]  # of each step
    _sums: dict[str, int]
    _flops: float
    _waited: float

    def __init__(
        self,
        *,
        peak_flops: float | None = None,
        devices: Sequence[Any] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        """Start the clock.

        Args:
            peak_flops: FLOP/s of all devices of the run together; None when unknown.
            devices: JAX devices of this process, asked for their memory.
            clock: seconds that never go back.
        """
        self._peak, self._devices, self._clock = peak_flops, devices, clock
        self._lost = 0.0  # seconds in `paused`
        self._compiling = True
        self._begin(self._now())

    def step(
        self,
        *,
        examples: int,
        answer_tokens: int,
        tokens: int,
        flops: float = 0.0,
        waited: float = 0.0,
    ) -> None:
        """A step is done. All counts are of the whole batch, over all hosts.

        Args:
            tokens: all that are not padding, prompts and image slots included.
            flops: useful ones (flops.py).
            waited: seconds for which the loop had no batch to give to the devices.
        """
        now = self._now()
        if self._compiling and self._seconds:
            self._begin(self._last)
            self._compiling = False
        self._seconds.append(now - self._last)
        self._last = now
        self._sums["examples"] += examples
        self._sums["answer_tokens"] += answer_tokens
        self._sums["tokens"] += tokens
        self._flops += flops
        self._waited += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no step's, as of an evaluation or a save, is not counted."""
        began = self._clock()
        try:
            yield
        finally:
            self._lost += self._clock() - began

    def read(self) -> dict[str, float]:
        """The numbers of the steps since the last call; {} when there were none.

        examples_per_s, tokens_per_s, answer_tokens_per_s; step_s, the median step;
        waiting, share of the time without a batch; mfu, useful FLOP/s by the peak,
        absent when either is unknown; memory_gb (`memory`).
        """
        if not self._seconds:
            return {}
        seconds = max(self._last - self._began, 1e-9)
        record = {f"{name}_per_s": n / seconds for name, n in self._sums.items()}
        record["step_s"] = statistics.median(self._seconds)
        record["waiting"] = min(self._waited / seconds, 1.0)
        if self._peak and self._flops:
            record["mfu"] = self._flops / seconds / self._peak
        record["memory_gb"] = memory(self._devices) / 1e9
        self._compiling = False
        self._begin(self._last)
        return record

    def _begin(self, now: float) -> None:
        self._began = self._last = now
        self._seconds = []
        self._sums = {"examples": 0, "tokens": 0, "answer_tokens": 0}
        self._flops = self._waited = 0.0

    def _now(self) -> float:
        return self._clock() - self._lost


def memory(devices: Sequence[Any]) -> int:
    """Most bytes that were in use: on the fullest device, where its backend counts them
    (GPU, TPU), else by this process (CPU)."""
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [
        found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found
    ]
    if peaks:
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Board:
    """Numbers to TensorBoard, and to Weights & Biases if the environment asks for it.

    What a view cannot write is said once and never ends the run: metrics.jsonl has all.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int = 0,
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ):
        """Open the boards.

        Args:
            step: where the run goes on; TensorBoard forgets what was logged later.
            config: the run's, shown by Weights & Biases.
            active: False in all processes but the first; nothing is written.
        """
        self._views: list[Any] = []
        if not active:
            return
        self._open(TensorBoard, workdir / "tensorboard", step)
        if wandb_wanted(os.environ):
            self._open(WeightsAndBiases, workdir, config or {})

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """One point in each curve."""
        for view in list(self._views):
            try:
                view.log(step, record)
            except Exception as error:  # W&B raises what its network layers raise
                self._views.remove(view)
                logger.warning("%s stops here: %s", view.name, error)

    def close(self) -> None:
        """Write what is pending. W&B may wait for its network: save the run first."""
        for view in self._views:
            try:
                view.close()
            except Exception as error:
                logger.warning("%s did not close: %s", view.name, error)
        self._views = []

    def _open(self, view: Any, *args) -> None:
        try:
            self._views.append(view(*args))
        except Exception as error:
            logger.warning("%s is not used: %s", view.name, error)


class TensorBoard:
    """An event file.

    Not tensorboardX.SummaryWriter: its writing thread dies on a full disk, after which
    the tenth `add_scalar` waits for ever.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix: a name of whole seconds could overwrite the file of a run that
        # was stopped within the second.
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # TensorBoard drops the points of earlier files from this step on.
        self._write(step=step + 1, session_log=start)
        self._file.flush()

    def log(self, step: int, record: Mapping[str, float]) -> None:
        value = self._summary.Value
        values = [value(tag=name, simple_value=x) for name, x in record.items()]
        self._write(step=step, summary=self._summary(value=values))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields) -> None:
        self._file.write_event(self._event(wall_time=time.time(), **fields))


def wandb_wanted(environment: Mapping[str, str]) -> bool:
    """Whether W&B is installed and its own variables ask for it (README.md)."""
    mode = environment.get("WANDB_MODE", "")
    asked = mode in ("online", "offline", "shared") or (
        mode == "" and bool(environment.get("WANDB_PROJECT"))
    )
    return asked and importlib.util.find_spec("wandb") is not None


class WeightsAndBiases:
    """A run there; a resumed one goes on under the same id."""

    name = "Weights & Biases"

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "minigpt4-jax",
            name=os.environ.get("WANDB_NAME") or workdir.name,
            id=os.environ.get("WANDB_RUN_ID") or _run_id(workdir / "wandb_id"),
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            # A question for a login must not hold a run that nobody looks at.
            settings=wandb.Settings(console="off", login_timeout=30),
        )
        # Our own axis: W&B's refuses steps that a resumed run does again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log({"step": step, **record})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class Bar:
    """A bar of steps with loss, learning rate and speed; nothing where no one looks.

    As a context it sends the log above the bar.
    """

    def __init__(self, total: int, *, step: int = 0, active: bool = True, file=None):
        """The bar at `step` of `total`.

        Args:
            active: False in all processes but the first.
            file: default stderr; nothing is shown unless it is a terminal.
        """
        from tqdm import tqdm

        file = file or sys.stderr
        self._bar = tqdm(
            total=total,
            initial=step,
            file=file,
            disable=not (active and file.isatty()),
            unit="step",
            dynamic_ncols=True,
        )
        self._logs = contextlib.ExitStack()

    def step(self, record: Mapping[str, float] | None = None) -> None:
        """A step is done.

        Args:
            record: as logged; its loss, lr and examples_per_s are shown from now on.
        """
        if record and not self._bar.disable:
            shown = {
                label: f"{record[name]:.4g}"
                for name, label in (
                    *(("loss", "loss"), ("lr", "lr")),
                    ("examples_per_s", "examples/s"),
                )
                if name in record
            }
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def __enter__(self) -> "Bar":
        if not self._bar.disable:
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._logs.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._logs.close()
        self._bar.close()


def keep_photos(workdir: Path, photos: Iterable[Example]) -> dict[str, str]:
    """Write small JPEGs into WORKDIR/samples, once; the file name of each photo by key.

    Names are hashes of the content, as a key may hold anything. A photo that cannot be
    read or written has the name "": samples go on without it.
    """
    folder = workdir / "samples"
    files = {}
    for photo in photos:
        name = hashlib.sha256(photo.image).hexdigest()[:16] + ".jpg"
        try:
            if not (folder / name).exists():
                _write_small(photo.image, folder / name)
        except (InputError, OSError) as error:
            logger.warning("photo %s is not kept: %s", photo.key, error)
            name = ""
        files[photo.key] = name
    return files


def _write_small(image: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(read_image(image))
    small.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    part = path.with_name(f".{path.name}.part")
    small.save(part, "jpeg", quality=80)
    os.replace(part, path)
