"""Train the connector: python -m minigpt4_jax.train --config FILE --data DIR --workdir DIR.

What the work directory gets is in workdir.py. The same command again resumes. SIGTERM
saves first and exits with code 143.
"""

import contextlib
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from minigpt4_jax import checkpoint, errors, features, optim, run_config, sharding
from minigpt4_jax.data.sources import TarShards
from minigpt4_jax.data.tokens import load_tokenizer
from minigpt4_jax.step import Trainables, make_evaluate, make_step
from minigpt4_jax.task import make_task, sample
from minigpt4_jax.workdir import WorkDir

logger = logging.getLogger(__name__)

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
DATA = flags.DEFINE_string("data", None, "folder with train/*.tar and val/*.tar")
WORKDIR = flags.DEFINE_string("workdir", None, "where checkpoints and logs go")
FEATURES = flags.DEFINE_string(
    "features", None, "where frozen features are kept (default: in the work directory)"
)

TERMINATED = 128 + signal.SIGTERM  # exit code of a run that has more to do
HELD_OUT = 64  # photos of val whose loss is logged
SAMPLES = 3  # photos of val that the model describes


def main(argv: list[str]) -> int:
    """Read the flags and train; returns the exit code."""
    if argv[1:]:
        raise errors.InputError(f"train takes flags only, got {argv[1]!r}")
    cfg = CONFIG.value
    if cfg is None or not DATA.value or not WORKDIR.value:
        raise errors.InputError("train needs --config, --data and --workdir")
    finished = train(cfg, Path(DATA.value), Path(WORKDIR.value), FEATURES.value)
    return 0 if finished else TERMINATED


def train(cfg, data: Path, workdir: Path, features_dir=None, devices=None) -> bool:
    """Train until `cfg.optim.total_steps`, resuming what stands in `workdir`.

    Args:
        features_dir: as --features.
        devices: of the mesh; default all.

    Returns:
        Whether the run is finished; False when SIGTERM ended it early.
    """
    # Mesh and config.
    run_config.check(cfg)
    mesh = sharding.make_mesh(**cfg.mesh, devices=devices)
    sharding.check_batch(cfg.batch_size, mesh)
    directory = checkpoint.resolve(cfg.checkpoint)
    paths = checkpoint.parameter_shapes(checkpoint.read_config(directory))
    features.check_frozen(optim.select(paths, cfg.trainable))
    run = WorkDir(Path(workdir), cfg, directory)
    total = cfg.optim.total_steps
    if run.step == total:
        logger.info("%s is at step %d of %d already", run.path, run.step, total)
        run.close()
        return True

    # Model: the frozen weights in their places, and what is trained.
    model = checkpoint.load_model(
        directory, absent=tuple(cfg.trainable), mesh=mesh, seed=cfg.seed
    )
    if cfg.init:
        found = checkpoint.load_trainables(model, checkpoint.resolve(cfg.init))
    trainables = Trainables(model, cfg.trainable)
    trainables.log()
    if cfg.init:
        check_init(cfg.init, found, trainables.paths)

    # Data.
    photos = {split: TarShards(data / split) for split in ("train", "val")}
    for split, found in photos.items():
        logger.info("%s: %d photos, left out: %s", split, len(found), found.left_out())
    folder = Path(features_dir or run.path / "features")
    patches = {s: features.patches(model, p, folder, mesh) for s, p in photos.items()}
    captions = {s: list(map(p.captions, range(len(p)))) for s, p in photos.items()}
    tokenizer = load_tokenizer(
        directory, bos_id=model.cfg.bos_id, eos_ids=model.cfg.eos_ids
    )
    task = make_task(cfg, model.cfg, tokenizer, captions, patches)

    # Optimizer.
    optimizer = optim.make_optimizer(cfg.optim)
    rate = optim.schedule(cfg.optim)
    params = trainables.params
    state = {"params": params, "opt_state": optimizer.init(params)}

    # Restore.
    start = run.step
    state = run.restore(sharding.place_state(state, mesh))

    # Loop.
    step_fn = make_step(trainables, task.loss_fn, optimizer)
    looks = Looks(trainables, task, tokenizer, photos["val"], mesh, cfg.batch_size)
    batches = task.batches("train", start)
    batch = sharding.place_batch(next(batches), mesh)
    timer = Timer(cfg.batch_size, start)
    with terminated() as stop:
        for step in range(start, total):
            state, metrics = step_fn(state, trainables.frozen, batch)
            # Made by the host while the devices work on the step.
            batch = sharding.place_batch(next(batches), mesh)
            done, last = step + 1, step + 1 == total or stop()
            record = {}
            if done % cfg.log_every == 0 or last:
                record = {name: float(value) for name, value in metrics.items()}
                record |= {"lr": float(rate(step)), "photos_per_s": timer.rate(done)}
            if done % cfg.eval_every == 0 or done == total:
                record["val_loss"] = looks.loss(state["params"])
                run.log_samples(done, looks.samples(state["params"]))
            if record:
                run.log(done, record)
            if done % cfg.save_every == 0 or last:
                run.save(done, state)
            if last:
                break

    # Finish.
    run.close()
    return run.step == total


def check_init(init: str, found, trainable) -> None:
    """Refuse to start from weights that this run would use and not save.

    A work directory holds its trainables alone; with others under them in training,
    `Generator.load` would later put together another model than the one trained.
    """
    frozen = sorted(set(found) - set(trainable))
    if frozen:
        raise errors.ConfigError(
            f"config.init: {init} was trained in {', '.join(frozen[:3])} and "
            f"{len(frozen)} parameters in all that config.trainable leaves out; add "
            "their pattern to config.trainable"
        )
    fresh = sorted(set(trainable) - set(found))
    if fresh:
        logger.warning("not in %s, so drawn anew: %s", init, ", ".join(fresh))


class Looks:
    """What is looked at now and then, on photos that are not trained on."""

    def __init__(self, trainables, task, tokenizer, photos, mesh, batch_size):
        self.trainables, self.task, self.tokenizer = trainables, task, tokenizer
        self.photos = [photos[i] for i in range(min(SAMPLES, len(photos)))]
        count = max(1, HELD_OUT // batch_size)
        self.batches = [
            sharding.place_batch(batch, mesh)
            for batch in itertools.islice(task.batches("val", 0), count)
        ]
        self.evaluate = make_evaluate(trainables, task.loss_fn)

    def loss(self, params: dict) -> float:
        """Mean of the losses of the first batches of val, always the same ones."""
        frozen = self.trainables.frozen
        losses = [self.evaluate(params, frozen, batch) for batch in self.batches]
        return float(np.mean(jax.device_get(losses)))

    def samples(self, params: dict) -> dict[str, str]:
        """What the model says about a few photos; {} while the decoder is not used."""
        if self.task.prompt is None:
            return {}
        model = self.trainables.model(params)
        return sample(model, self.tokenizer, self.task, self.photos)


class Timer:
    """Photos a second between two looks at it."""

    def __init__(self, batch_size: int, step: int):
        self.batch_size, self.step, self.began = batch_size, step, time.monotonic()

    def rate(self, step: int) -> float:
        now = time.monotonic()
        photos, seconds = (step - self.step) * self.batch_size, now - self.began
        self.step, self.began = step, now
        return photos / seconds


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, as a function; the loop ends at the next step."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    errors.run(main)
