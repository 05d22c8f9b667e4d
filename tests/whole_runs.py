"""Whole tiny runs for processes of their own, and where they are to end or be hurt."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from unittest import mock

import jax

from minigpt4_jax import kept, train
from tests import dying, training

TOTAL, EVERY = 8, 2  # steps, and between saves


def run(
    path: Path, folder: Path, hurts: tuple[str, int] | None = None, total: int = TOTAL
):
    """A run of folder/frozen on folder/data; ends with the exit code of the command.

    Args:
        hurts: what happens when the step of this number (from 0) is under way: "killed",
            "terminated twice", "worker killed", "worker stalls", or a place of
            dying.PLACES, where the next save is killed.
    """
    cfg = training.config(
        folder / "frozen",
        optim__total_steps=total,
        save_every=EVERY,
        eval_every=4,
        row__packed=450,
        loader__workers=2,
        loader__prefetch=1,  # so that a worker has not made all of its batches at once
        loader__limit_s=5,
    )
    look = train.Guard.look

    def hurt(self, step, *args):
        look(self, step, *args)
        if hurts and step == hurts[1]:
            hurting(hurts[0])

    with mock.patch.object(train.Guard, "look", hurt):
        finished = train.train(cfg, path, devices=jax.devices()[:1])
    raise SystemExit(0 if finished else train.TERMINATED)


def hurting(what: str) -> None:
    if what == "killed":
        dying.kill()
    elif what == "terminated twice":
        seal = kept.seal

        def again(folder):
            time.sleep(1)  # the loop has ended, and waits for this thread
            os.kill(os.getpid(), signal.SIGTERM)
            seal(folder)

        mock.patch.object(kept, "seal", again).start()
        os.kill(os.getpid(), signal.SIGTERM)
    elif what.startswith("worker"):
        (worker, *_) = multiprocessing.active_children()
        assert worker.pid is not None
        signalled = signal.SIGKILL if what == "worker killed" else signal.SIGSTOP
        os.kill(worker.pid, signalled)
    else:
        dying.PLACES[what](dying.kill).start()


def alone(path: Path, folder: Path, of: int = 2) -> None:
    """The run of `one_of` so many on one device of one process."""
    assert train.train(_shared(folder, of), path, devices=jax.devices()[:1])


def one_of(
    process: int,
    port: int,
    path: Path,
    folder: Path,
    of: int = 2,
    ends: int | None = None,
) -> None:
    """A process of a run on one device each; SIGTERM comes to process 1 in step `ends`."""
    team = dying.join(port, process, of, devices=1)
    look = train.Guard.look

    def end(self, step, *args):
        look(self, step, *args)
        if process == 1 and step == ends:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(train.Guard, "look", end):
        finished = train.train(_shared(folder, of), path, team=team)
    jax.distributed.shutdown()  # as train.main does
    raise SystemExit(0 if finished else train.TERMINATED)


def _shared(folder: Path, of: int):
    return training.config(
        folder / "frozen",
        batch_size=of,
        optim__total_steps=TOTAL,
        save_every=EVERY,
        eval_every=4,
        loader__workers=0,
    )


def watched(
    index: int,
    port: int,
    path: Path,
    folder: Path,
    hurt: tuple[int, str, int | str] | None = None,
    of: int = 2,
) -> None:
    """A process of a warm start under a watchdog of three seconds.

    What it says is in PATH-INDEX.log.

    Args:
        hurt: (process, what, step) as of dying.hurt, in that step (from 0), or "load":
            where the model is loaded, which may take a second more.
    """
    dying.say_into(path.with_name(f"{path.name}-{index}.log"))
    os.environ["XLA_FLAGS"] = (  # compiles twice as fast
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    team = dying.join(port, index, of, devices=1) if of > 1 else None
    cfg = training.config(
        folder / "frozen",
        loss="words",
        optim__total_steps=TOTAL,
        save_every=EVERY,
        cache__dtype="",
        loader__limit_s=1,
        watchdog__limit_s=3,
        watchdog__other_s=4 if hurt and hurt[2] == "load" else 600,
    )
    look, loads = train.Guard.look, train.checkpoint.load_model

    def looks(self, step, *args):
        look(self, step, *args)
        if hurt and (index, step) == (hurt[0], hurt[2]):
            dying.hurt(hurt[1], path.with_name(f"{path.name}-hurt"))

    def load(*args, **kwargs):
        if hurt and (index, "load") == (hurt[0], hurt[2]):
            dying.hurt(hurt[1], path.with_name(f"{path.name}-hurt"))
        return loads(*args, **kwargs)

    with (
        mock.patch.object(train.Guard, "look", looks),
        mock.patch.object(train.checkpoint, "load_model", load),
    ):
        dying.ends_as_a_command(
            lambda: train.train(cfg, path, jax.devices()[:of], team=team)
        )
