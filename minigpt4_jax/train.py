"""Train the connector: python -m minigpt4_jax.train --config FILE --workdir DIR.

What the work directory gets is in workdir.py. The same command, or --workdir alone,
resumes. SIGTERM saves first and exits with code 143.
"""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import config_flags

from minigpt4_jax import (
    checkpoint,
    cluster,
    errors,
    flops,
    initial,
    optim,
    run_config,
    sharding,
)
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.data.tokens import load_tokenizer
from minigpt4_jax.generator import default_dtypes
from minigpt4_jax.guard import Guard
from minigpt4_jax.looks import Looks
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.progress import Bar, Board, Meter
from minigpt4_jax.step import Trainables, make_step, new_state
from minigpt4_jax.stream import Stream
from minigpt4_jax.task import make_task
from minigpt4_jax.watchdog import Watchdog
from minigpt4_jax.workdir import WorkDir, saved_config

logger = logging.getLogger(__name__)

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "where checkpoints and logs go")

TERMINATED = 128 + signal.SIGTERM  # exit code of a run that has more to do


def main(argv: list[str]) -> int:
    """Read the flags and train; returns the exit code."""
    if argv[1:]:
        raise errors.InputError(f"train takes flags only, got {argv[1]!r}")
    if not WORKDIR.value:
        raise errors.InputError("train needs --workdir, and --config to begin")
    if "://" in WORKDIR.value:  # as a path it would be a folder of that name here
        raise errors.InputError(
            f"--workdir: training writes files, got {WORKDIR.value}; mount the bucket "
            "(gcsfuse) and name the mount"
        )
    workdir = Path(WORKDIR.value).expanduser()
    cfg = CONFIG.value or saved_config(workdir)
    run_config.check(cfg)  # its limits, before they are used
    team = cluster.start(cfg.watchdog.start_s, cfg.watchdog.limit_s)
    finished = train(cfg, workdir, team=team)
    if jax.process_count() > 1:
        # Together: the first process serves the others, which abort without it.
        jax.distributed.shutdown()
    return 0 if finished else TERMINATED


def train(cfg, workdir: Path, devices=None, team: cluster.Team | None = None) -> bool:
    """Train until `cfg.optim.total_steps`, resuming what stands in `workdir`.

    Args:
        devices: of the mesh; default all.
        team: the processes of the run; default this one.

    Returns:
        Whether the run is finished; False when SIGTERM ended it early.
    """
    run_config.check(cfg)
    run_config.check_given(cfg)
    limits = cfg.watchdog.limit_s, cfg.watchdog.other_s
    with Watchdog(workdir / "stacks", *limits, team) as watch:
        return _prepare(cfg, workdir, devices, watch)


def _prepare(cfg, workdir: Path, devices, watch: Watchdog) -> bool:
    # Mesh.
    mesh = sharding.make_mesh(**cfg.mesh, devices=devices)
    sharding.check_batch(cfg.batch_size // cfg.optim.accumulate, mesh)
    directory = checkpoint.resolve(cfg.checkpoint)
    preset = checkpoint.read_config(directory)
    shapes = checkpoint.parameter_shapes(preset)
    trained = optim.select(shapes, cfg.trainable)  # a pattern that hits nothing raises
    how = checkpoint.settle(directory, Quantisation(cfg.quantize))
    held = checkpoint.parameter_shapes(preset, how)
    run_config.check_trainable(trained, held, how.decoder or how.vision)

    # Data, before the model: a wrong path should not cost a load.
    watch.pace.before("opening the data")
    paths = {f"data.{name}": source.path for name, source in cfg.data.items()}
    budget = cfg.loader.budget
    sources = {name: open_data(path, budget=budget) for name, path in paths.items()}
    val = {"val": open_data(cfg.val, budget=budget)} if cfg.val else {}
    for name, found in (sources | val).items():
        logger.info("%s: %d examples, left out: %s", name, len(found), found.left_out())
    digests = {name: found.digest for name, found in (sources | val).items()}
    notes = {"differs_from_reference": run_config.reference_differences(cfg)}
    with contextlib.closing(WorkDir(workdir, cfg, directory, digests, notes)) as run:
        if run.step == cfg.optim.total_steps:
            logger.info("%s is at step %d, its last, already", run.path, run.step)
        else:
            data = list(sources.values()), val.get("val")
            _train(cfg, run, mesh, directory, *data, watch)
    return run.step == cfg.optim.total_steps


def _train(
    cfg, run: WorkDir, mesh, directory: Path, sources, val, watch: Watchdog
) -> None:
    # Model: the frozen weights in their places, and what is trained.
    watch.pace.before("loading the model")
    dtypes = default_dtypes(cfg.dtype or None)
    model = checkpoint.load_model(
        directory,
        dtypes,
        mesh,
        absent=tuple(cfg.trainable),
        seed=cfg.seed,
        quantisation=Quantisation(cfg.quantize),
    )
    model.set_remat(cfg.remat == "block")
    shapes = checkpoint.parameter_shapes(model.cfg)
    sharding.hold(model, set(shapes) - set(optim.select(shapes, cfg.trainable)), mesh)
    trainables = Trainables(model, cfg.trainable, mesh)
    trainables.log()
    paths = list(trainables.params)
    if cfg.init and not run.step:
        trainables.params = initial.begin(trainables.params, cfg.init, directory)
    tokenizer = load_tokenizer(
        directory, bos_id=model.cfg.bos_id, eos_ids=model.cfg.eos_ids
    )
    watch.pace.before("making features and lengths")
    task = make_task(cfg, model, paths, tokenizer, sources, val, mesh, run.path)

    # Optimizer.
    optimizer, rate = optim.make_optimizer(cfg.optim), optim.schedule(cfg.optim)
    state = sharding.place_state(new_state(trainables.params, optimizer), mesh)
    step_fn = make_step(trainables, task.loss_fn, optimizer, rate, cfg.optim.accumulate)

    # Restore.
    watch.pace.before("restoring")
    start, total = run.step, cfg.optim.total_steps
    state = run.restore(state)

    # Loop.
    work = task.prompt is not None  # the warm start leaves the decoder out
    costs = flops.costs(model.cfg, paths, task.part) if work else None
    looks = Looks(trainables, task, tokenizer, mesh, cfg.optim.warmup_steps)
    meter = Meter(peak_flops=flops.peak(mesh.devices.flat), devices=jax.local_devices())
    shown = dict(step=start, active=jax.process_index() == 0)
    guard = Guard(run.path / "skipped", cfg.guard.skipped)
    pace = watch.pace
    with contextlib.ExitStack() as ends:
        loader = task.loader()
        if run.position is not None:
            loader.set_state(run.position)
        stream = Stream(loader, mesh, cfg.optim.accumulate, costs)
        ends.enter_context(contextlib.closing(stream))
        board = Board(run.path, config=cfg.to_dict(), **shown)
        ends.enter_context(contextlib.closing(board))
        bar = ends.enter_context(Bar(total, **shown))
        stop = ends.enter_context(terminated())
        ends.enter_context(watch.telling())
        pace.begin(start)
        for step in range(start, total):
            batches, counts = stream.step()
            state, metrics = step_fn(state, trainables.frozen, batches)
            stream.prepare()  # by the host, while the devices work on the step
            guard.look(step, metrics, batches)
            pace.ended(step)
            meter.step(**counts)
            done, last = step + 1, step + 1 == total or stop(step)
            record = {}
            if done % cfg.log_every == 0 or last:
                record = {k: float(v) for k, v in metrics.items() if k != "finite"}
                record |= meter.read() | {"skipped": int(state["skipped"])}
                record |= {"bad_examples": stream.bad}
            if done % cfg.eval_every == 0 or done == total:
                with meter.paused(), pace.other("evaluation"):
                    record |= looks.losses(state["params"])
                    run.log_samples(done, looks.samples(state["params"], run.path))
            if record:
                run.log(done, record)
                board.log(done, record)
                looks.say(done, record)
            bar.step(record)
            if done % cfg.save_every == 0 or last or run.save_again:
                with meter.paused(), pace.other("save"):
                    run.save(done, state, stream.position)
            if last:
                break
        guard.check()
        pace.end()
        run.wait()  # before the boards, which may wait for a network


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[int], bool]]:
    """Whether SIGTERM has come, as a function of the step; the run then ends with it.

    Of several processes all must end with the same step: JAX's service, which learns of
    the signal by itself, finds one that none of them has passed.
    """
    came = []
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    errors.run(main)
