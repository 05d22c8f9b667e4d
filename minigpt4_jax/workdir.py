"""What a training run leaves on disk, and where it goes on from.

config.json             the resolved config, hashes of model and data, versions
metrics.jsonl           a line every log_every and eval_every steps
samples.jsonl           what the model says about a few photos of val
checkpoints/            config.keep's checkpoints, each as kept.py says
trainables.safetensors  the newest trainables; what Generator.load reads
"""

import fcntl
import filecmp
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import minigpt4_jax
from minigpt4_jax import kept, locate, run_config, sharding, storage
from minigpt4_jax.errors import CheckpointError, ConfigError
from minigpt4_jax.lines import Lines

logger = logging.getLogger(__name__)

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def saved_config(path: Path) -> ConfigDict:
    """The config that the run in a work directory was started with last.

    Raises CheckpointError when there is no run.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path}: no run is there to go on; want --config to begin one"
        )
    run = locate.read_json(path / "config.json", locate.RUN_ADVICE)
    if "config" not in run:
        raise CheckpointError(f"{path}/config.json: `config` is absent; want --config")
    knobs = run_config.BEFORE | run["config"]
    return ConfigDict(_with_tuples(knobs)).lock()


class WorkDir:
    """One run's folder. Of several processes all call `restore`, `save`, `wait` and
    `close`; the first alone writes config, logs and trainables.

    Attributes:
        step: of the newest whole checkpoint; 0 when there is none.
    """

    def __init__(
        self,
        path: Path,
        cfg: ConfigDict,
        directory: Path,
        data: Mapping[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ):
        """Make the folder, or take up the run in it.

        Args:
            cfg: the run's config.
            directory: the converted model that holds the frozen weights.
            data: digest of each data set by its name; the same ones are wanted to resume.
            notes: what else config.json is to say.

        Raises:
            ConfigError: the folder belongs to a run with other knobs, weights or data,
                to one that is past this config's end, or to one that is still running.
        """
        self.path = Path(path).absolute()
        self._cfg = cfg
        self._writes = jax.process_index() == 0
        self._metrics = Lines(self.path / "metrics.jsonl")
        self._samples = Lines(self.path / "samples.jsonl")
        self.path.mkdir(parents=True, exist_ok=True)
        if self._writes:
            self._lock = _lock(self.path / ".lock")
        run = _describe(cfg, directory, data or {})
        self.step = max(locate.kept_steps(self.path), default=0)
        if self.step:  # before the first save there is nothing to mix
            self._refuse_another(run)
        if self.step > cfg.optim.total_steps:
            raise ConfigError(
                f"{self.path}: got a run at step {self.step}, want at most "
                f"config.optim.total_steps={cfg.optim.total_steps}; raise that, or give "
                "a new --workdir"
            )
        if self._writes:
            kept.clean(self.path)
            kept.write_json(self.path / "config.json", {**(notes or {}), **run})
            if self.step:  # a kill, or a folder deleted by hand, may have come between
                folder = self._folder(self.step)
                kept.check(folder, [locate.TRAINABLES])
                self._publish(folder)
                kept.prune(self.path, cfg.keep.last, cfg.keep.every)
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        self._orbax = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way: Future | None = None
        self._asked: tuple[int, Any, Any] | None = None  # what is being saved
        self._failures = 0  # in a row

    @property
    def position(self) -> Any:
        """Where the data stood at the newest checkpoint; None when there is none."""
        return kept.read_position(self._folder(self.step)) if self.step else None

    def restore(self, state: Any) -> Any:
        """The newest checkpoint in the shapes, types and places of `state`.

        Lines that were logged after it are dropped: those steps are done again.

        Raises:
            CheckpointError: naming what is damaged, and the checkpoint before.
        """
        if self._writes:
            self._metrics.drop_after(self.step)
            self._samples.drop_after(self.step)
        if not self.step:
            return state
        folder = self._folder(self.step)
        kept.check(folder)
        try:
            state = self._orbax.restore(folder / "state", state)
        except Exception as error:  # Orbax raises what its storage layers raise
            raise CheckpointError(
                f"{folder} cannot be restored ({error}); {kept.way_on(folder)}"
            ) from error
        logger.info("resumed at step %d", self.step)
        return state

    def save(self, step: int, state: dict, position: Any = None) -> None:
        """Begin to write `state` and `position` (JSON), from which `step` goes on.

        What is written is a copy, so that the next steps may donate the arrays: on a
        CPU, Orbax would read the memory that they reuse. A save before is waited for.

        Raises:
            CheckpointError: two saves in a row have failed.
        """
        self._settle()
        if step != self.step:
            copy = jax.tree.map(lambda x: x.copy(), state)
            self._begin(step, copy, position)

    @property
    def save_again(self) -> bool:
        """Whether the last save has failed, so that the next step should be saved.

        Of several processes one cannot know of the others: there, it is the next
        regular save that finds out and counts as the second attempt.
        """
        if self._under_way is None or jax.process_count() > 1:
            return False
        return self._under_way.done() and self._under_way.exception() is not None

    def wait(self) -> None:
        """Until the last save is on disk; if it fails, it is tried once more.

        Raises CheckpointError when that fails too.
        """
        asked = self._asked
        if not self._settle() and asked is not None:
            self._begin(*asked)
            self._settle()

    def log(self, step: int, record: dict) -> None:
        """One line in metrics.jsonl and in the log."""
        if not self._writes:
            return
        self._metrics.append({"step": step, **record})
        values = " ".join(f"{name} {value:.5g}" for name, value in record.items())
        logger.info("step %d %s", step, values)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """One line in samples.jsonl for each answer (`photo`, `says`), and in the log."""
        if not self._writes:
            return
        for sample in samples:
            self._samples.append({"step": step, **sample})
            logger.info("step %d photo %s: %s", step, sample["photo"], sample["says"])

    def close(self) -> None:
        """Wait as `wait` does, and leave the folder to others."""
        try:
            self.wait()
        finally:
            self._metrics.flush()
            self._samples.flush()
            self._thread.shutdown()
            self._orbax.close()
            if self._writes and self._lock is not None:
                self._lock.close()

    # Saving: _begin in the loop, _write in a thread, _settle in the loop again.

    def _begin(self, step: int, state: dict, position: Any) -> None:
        self._asked = step, state, position
        part = kept.part(self.path, step)
        params = state["params"]
        if jax.process_count() > 1:  # all take part in gathering, not one in a thread
            params = {name: sharding.fetch(x) for name, x in params.items()}
        try:
            if self._writes:
                part.mkdir(parents=True)
            self._orbax.save(part / "state", state)
        except Exception as error:  # Orbax raises what its storage layers raise
            self._under_way = Future()
            self._under_way.set_exception(error)
            return
        self._under_way = self._thread.submit(self._write, part, step, params, position)

    def _write(self, part: Path, step: int, params: dict, position: Any) -> None:
        self._orbax.wait_until_finished()
        if not self._writes:
            return
        about = {"step": step, "seed": self._cfg.seed, "position": position}
        kept.write_json(part / kept.POSITION, about)
        storage.save_trainables(part, params)
        kept.seal(part)
        self._publish(part)
        kept.commit(part, self._folder(step))
        kept.prune(self.path, self._cfg.keep.last, self._cfg.keep.every)

    def _settle(self) -> bool:
        """Wait for the save under way; False when it failed, for the first time."""
        if self._under_way is None or self._asked is None:
            return True
        error, step = self._under_way.exception(), self._asked[0]
        self._under_way = self._asked = None
        if not _any(error is not None):
            self.step, self._failures = step, 0
            return True
        self._failures += 1
        if self._writes:
            kept.clean(self.path)  # it may need the room
        what = error or "in another process"
        if self._failures > 1:
            raise CheckpointError(
                f"{self.path}: step {step} cannot be saved, as the save before could not "
                f"({what}); make room or see to the disk, then the same command goes on "
                f"from step {self.step}"
            ) from error
        logger.error("step %d was not saved (%s); trying once more", step, what)
        return False

    def _publish(self, folder: Path) -> None:
        """Make a checkpoint's trainables those of the run."""
        new, old = folder / locate.TRAINABLES, self.path / locate.TRAINABLES
        if old.exists() and filecmp.cmp(new, old):
            return
        # A copy, not a link: whoever writes into it must not damage the checkpoint.
        part = old.with_name(f".{old.name}.part")
        shutil.copyfile(new, part)
        storage.replace(part, old)

    def _folder(self, step: int) -> Path:
        return self.path / locate.CHECKPOINTS / str(step)

    def _refuse_another(self, new: dict) -> None:
        old = locate.read_json(self.path / "config.json", locate.RUN_ADVICE)
        found = run_config.differences(old.get("config", {}), new["config"])
        changed = _changed(old.get("frozen", {}), new["frozen"])
        found += [f"{name} of {new['checkpoint']}" for name in changed]
        changed = _changed(old.get("data", {}), new["data"])
        found += [f"{name}: other examples than then" for name in changed]
        if found:
            listed = "\n  ".join(found)
            raise ConfigError(
                f"{self.path}: got a run that began otherwise; want the same to resume, "
                f"or a new --workdir. What differs:\n  {listed}"
            )
        for name in _changed(old.get("versions", {}), new["versions"]):
            logger.warning(
                "%s is %s, the run began with %s: losses may differ in their last digits",
                *(name, new["versions"].get(name), old["versions"].get(name)),
            )


def _describe(cfg: ConfigDict, directory: Path, data: Mapping[str, str]) -> dict:
    """What config.json holds; locate.py reads `checkpoint`."""
    run = {
        "checkpoint": str(directory.absolute()),
        "config": cfg.to_dict(),
        "frozen": {
            file.name: locate.sha256(file)
            for file in sorted(directory.iterdir())
            if file.is_file() and file.name != "manifest.json"  # it may hold times
        },
        "data": dict(data),
        "versions": {
            "minigpt4_jax": minigpt4_jax.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
    return json.loads(json.dumps(run))  # tuples become lists, as they will be read


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that configs have."""
    if isinstance(value, dict):
        return {name: _with_tuples(part) for name, part in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _changed(old: dict, new: dict) -> list[str]:
    names = sorted(old.keys() | new.keys())
    return [name for name in names if old.get(name) != new.get(name)]


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs pages of traceback of what it raises; one sentence comes from here."""
    return "orbax" not in record.pathname


def _any(here: bool) -> bool:
    """Whether it is so in any process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def _lock(path: Path):
    """An open file that no other process holds; it is free again when that one ends."""
    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{path.parent}: another process is training there; wait for its end, or "
            "give a new --workdir"
        ) from error
    except OSError:  # a file system without locks
        pass
    return file
