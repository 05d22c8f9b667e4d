"""What a training run leaves on disk, and where it goes on from.

config.json             the resolved config, hashes of the frozen files, versions
metrics.jsonl           a line every log_every and eval_every steps
samples.jsonl           what the model says about a few photos of val
checkpoints/            Orbax: trainables and optimizer at the last two saves
trainables.safetensors  the newest trainables; what Generator.load reads
"""

import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

import minigpt4_jax
from minigpt4_jax import checkpoint, locate, run_config
from minigpt4_jax.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


class WorkDir:
    """One run's folder.

    Attributes:
        step: of the newest checkpoint; 0 when there is none.
    """

    def __init__(self, path: Path, cfg, directory: Path):
        """Make the folder, or take up the run in it.

        Args:
            cfg: the run's config.
            directory: the converted model that holds the frozen weights.

        Raises:
            ConfigError: the folder belongs to a run with other knobs or weights, or to
                one that is past this config's end.
        """
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        run = _describe(cfg, directory)
        self._manager = ocp.CheckpointManager(
            self.path / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                enable_async_checkpointing=False,  # the next step reuses the arrays
                cleanup_tmp_directories=True,  # of a save that was killed
            ),
        )
        self.step = self._manager.latest_step() or 0
        if self.step:  # before the first save there is nothing to mix
            self._refuse_another(run)
        if self.step > cfg.optim.total_steps:
            raise ConfigError(
                f"{self.path}: got a run at step {self.step}, want at most "
                f"config.optim.total_steps={cfg.optim.total_steps}; raise that, or give "
                "a new --workdir"
            )
        _replace(self.path / "config.json", json.dumps(run, indent=1) + "\n")

    def restore(self, state: Any) -> Any:
        """The newest checkpoint in the shapes and places of `state`.

        Lines that were logged after it are dropped: those steps are done again.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            self._drop_lines_after(name, self.step)
        if not self.step:
            return state
        folder = self.path / "checkpoints" / str(self.step)
        try:
            args = ocp.args.StandardRestore(state)
            state = self._manager.restore(self.step, args=args)
        except Exception as error:  # Orbax raises what its storage layers raise
            raise CheckpointError(
                f"{folder} cannot be restored ({error}); delete it to go on from the "
                "checkpoint before"
            ) from error
        logger.info("resumed at step %d", self.step)
        return state

    def save(self, step: int, state: dict) -> None:
        """Keep `state["params"]` and all else that the run needs to go on from `step`."""
        if step == self.step:
            return
        # First, so that a run whose last checkpoint is there has its result too.
        checkpoint.save_trainables(self.path, state["params"])
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        self.step = step

    def log(self, step: int, record: dict) -> None:
        """One line in metrics.jsonl and in the log."""
        self._append("metrics.jsonl", {"step": step, **record})
        values = " ".join(f"{name} {value:.5g}" for name, value in record.items())
        logger.info("step %d %s", step, values)

    def log_samples(self, step: int, samples: dict[str, str]) -> None:
        """One line in samples.jsonl for each photo's answer, and in the log."""
        for key, answer in samples.items():
            self._append("samples.jsonl", {"step": step, "photo": key, "says": answer})
            logger.info("step %d photo %s: %s", step, key, answer)

    def close(self) -> None:
        self._manager.close()

    def _append(self, name: str, record: dict) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _drop_lines_after(self, name: str, step: int) -> None:
        path = self.path / name
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        # By "\n" alone: a caption may hold other ends of lines, such as U+2028. What
        # stands behind the last one is a line that a kill cut short.
        whole = [line + "\n" for line in text.split("\n")[:-1]]
        kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
        if kept != text:
            _replace(path, kept)

    def _refuse_another(self, new: dict) -> None:
        old = locate.read_json(self.path / "config.json")
        found = run_config.differences(old.get("config", {}), new["config"])
        changed = _changed_files(old.get("frozen", {}), new["frozen"])
        found += [f"{name} of {new['checkpoint']}" for name in changed]
        if found:
            listed = "\n  ".join(found)
            raise ConfigError(
                f"{self.path}: got a run that began otherwise; want the same to resume, "
                f"or a new --workdir. What differs:\n  {listed}"
            )


def _describe(cfg, directory: Path) -> dict:
    """What config.json holds; locate.py reads `checkpoint`."""
    run = {
        "format": locate.FORMAT,
        "checkpoint": str(directory.absolute()),
        "config": cfg.to_dict(),
        "frozen": {
            file.name: locate.sha256(file)
            for file in sorted(directory.iterdir())
            if file.is_file() and file.name != "manifest.json"  # it may hold times
        },
        "versions": {
            "minigpt4_jax": minigpt4_jax.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
    return json.loads(json.dumps(run))  # tuples become lists, as they will be read


def _changed_files(old: dict, new: dict) -> list[str]:
    names = sorted(old.keys() | new.keys())
    return [name for name in names if old.get(name) != new.get(name)]


def _replace(path: Path, text: str) -> None:
    """Write a text file that is there as a whole or as it was before."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
