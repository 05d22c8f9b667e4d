"""The rate of the training loop beside that of its compiled step alone.

    python -m benchmarks.train_loop --data=DATA [--cache=DIR] [--workers=1]

The demo's stage 1 on DATA/train (tar shards), with all that a run does: reading, packing,
placing, logging, guards; saves and evaluations are not in the rate, as they come every
few hundred steps. Alone: the same step over and over on one batch that lies on the device.
The two take turns, since the machine may be busy.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from configs import demo_stage1
from minigpt4_jax import checkpoint, errors, locate, optim, sharding, train
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.data.tokens import load_tokenizer
from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import default_dtypes
from minigpt4_jax.step import Trainables, make_step, new_state
from minigpt4_jax.task import make_task

STEPS = 30  # of each turn, after
WARM = 10  # steps that compile and fill what is read ahead
TURNS = 3


def main(argv: list[str]) -> None:
    args = flags.FLAGS
    if not args.data or len(argv) > 1:
        raise InputError("give --data=FOLDER, which has train/*.tar, and only flags")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        alone, loops = [], []
        step = bare(args, work)
        for turn in range(TURNS):
            alone.append(statistics.median(step() for _ in range(STEPS)))
            loops.append(loop(args, work, turn))
    print(f"{'':24}{'s a step':>10}{'photos/s':>10}{'ratio':>8}")
    size = config(args, work).batch_size
    one, other = statistics.median(alone), statistics.median(loops)
    for name, seconds in (("step alone", one), ("training loop", other)):
        print(f"{name:24}{seconds:10.3f}{size / seconds:10.2f}{one / seconds:8.3f}")


def config(args, work: Path):
    cfg = demo_stage1.get_config()
    cfg.data.photos.path = str(Path(args.data) / "train")
    cfg.cache.folder = args.cache or str(work / "features")
    cfg.loader.workers = args.workers
    cfg.optim.total_steps = WARM + STEPS
    cfg.optim.warmup_steps = 1
    cfg.log_every = 1
    cfg.save_every = cfg.eval_every = 10**6
    return cfg


def bare(args, work: Path):
    """A function that does the step once and returns its seconds."""
    cfg = config(args, work)
    mesh = sharding.make_mesh(**cfg.mesh)
    directory = locate.resolve(cfg.checkpoint)
    model = checkpoint.load_model(
        *(directory, default_dtypes(cfg.dtype or None), mesh),
        absent=tuple(cfg.trainable),
        seed=cfg.seed,
    )
    model.set_remat(cfg.remat == "block")
    trainables = Trainables(model, cfg.trainable, mesh)
    tokenizer = load_tokenizer(
        directory, bos_id=model.cfg.bos_id, eos_ids=model.cfg.eos_ids
    )
    data = [open_data(cfg.data.photos.path)]
    paths = list(trainables.params)
    task = make_task(cfg, model, paths, tokenizer, data, None, mesh, work)
    optimizer, rate = optim.make_optimizer(cfg.optim), optim.schedule(cfg.optim)
    step_fn = make_step(trainables, task.loss_fn, optimizer, rate)
    state = sharding.place_state(new_state(trainables.params, optimizer), mesh)
    loader = task.loader()
    batch = sharding.place_batch(next(loader), mesh)
    loader.close()

    def once() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step_fn(state, trainables.frozen, (batch,))
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    for _ in range(3):
        once()
    return once


def loop(args, work: Path, turn: int) -> float:
    """Median seconds between the ends of two steps of a run."""
    workdir = work / f"run{turn}"
    train.train(config(args, work), workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["step_s"] for line in lines[WARM:])


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Folder with train/*.tar.")
    flags.DEFINE_string("cache", None, "Folder where frozen features lie or are kept.")
    flags.DEFINE_integer("workers", 0, "Loader processes.", lower_bound=0)
    errors.run(main)
