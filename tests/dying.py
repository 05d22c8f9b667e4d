"""Runs in processes that end in the middle: what is killed where, and a toy run.

The places are in the order in which a save comes by them.
"""

import errno
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from minigpt4_jax import cluster, errors, kept, locate, sharding, storage, watchdog
from minigpt4_jax.errors import CheckpointError, DataError, MiniGPT4Error
from minigpt4_jax.workdir import WorkDir
from tests import training

TOTAL, EVERY = 8, 2  # steps of the toy run, and between its saves


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(owner, name: str, act: Callable[[], object]):
    """Calls the original and then `act`."""
    original = getattr(owner, name)

    def both(*args, **kwargs):
        result = original(*args, **kwargs)
        act()
        return result

    return mock.patch.object(owner, name, both)


def _instead(owner, name: str, act: Callable[[], object]):
    return mock.patch.object(owner, name, lambda *_, **__: act())


def _half_removed(act: Callable[[], object]):
    def remove(folder, **_):
        if not Path(folder).exists():
            return
        for file in itertools.islice(Path(folder).rglob("*.ocdbt"), 2):
            file.unlink()
        act()

    return mock.patch.object(kept.shutil, "rmtree", remove)


def _unfinished(text: str, act: Callable[[], object]):
    """A file is written, with another name than it is to have, and not all of it."""

    def replace(part, path):
        if text in str(path):
            os.truncate(part, 20)
            act()
        original(part, path)

    original = storage.replace
    return mock.patch.object(storage, "replace", replace)


# Name -> patch that calls its argument when a save gets there.
PLACES: dict[str, Callable] = {
    "Orbax writes": lambda act: _after(ocp.StandardCheckpointer, "save", act),
    "Orbax has written": lambda act: _instead(kept, "write_json", act),
    "the trainables are written": lambda act: _unfinished(".part/trainables", act),
    "hashes are computed": lambda act: _after(kept, "sha256", act),
    "the hashes are written": lambda act: _unfinished("sha256.json", act),
    "all is hashed": lambda act: _instead(WorkDir, "_publish", act),
    "the run's trainables are replaced": lambda act: _after(WorkDir, "_publish", act),
    "the checkpoint has its name": lambda act: _instead(kept, "prune", act),
    "an old checkpoint is removed": _half_removed,
}


def toy(path: Path, frozen: Path, dies: tuple[str, int] | None = None, limit=0) -> None:
    """A run whose weights go their own way from step to step, with buffers donated.

    Args:
        dies: a place of PLACES, and the step after which it is reached, or "step" itself.
        limit: bytes that a file may have, from half of the steps on; 0: any.
    """
    cfg = training.config(frozen, optim__total_steps=TOTAL)
    run = WorkDir(path, cfg, frozen)
    state = run.restore(
        {
            "params": {"projector/bias": jnp.linspace(0.0, 1.0, 40_000)},
            "opt_state": (jnp.zeros(40_000), jnp.int32(0)),
        }
    )
    for step in range(run.step, TOTAL):
        if limit and step == TOTAL // 2:
            run.wait()
            _limit(limit)
        state, loss = _step(state)
        done = step + 1
        run.log(done, {"loss": float(loss)})
        place, when = dies or ("", 0)
        patch = mock.MagicMock()
        if done == when:
            run.wait()  # the save before is not meant
            if place == "step":
                kill()
            patch = PLACES[place](kill)
        with patch:
            if done % EVERY == 0 or run.save_again:
                run.save(done, state, {"next": done})
            if done == when:
                run.wait()
    run.close()


@functools.partial(jax.jit, donate_argnums=0)
def _step(state):
    (moment, count), bias = state["opt_state"], state["params"]["projector/bias"]
    moment = 0.9 * moment + jnp.sin(3 * bias + count)
    bias = bias - 0.1 * moment
    state = {"params": {"projector/bias": bias}, "opt_state": (moment, count + 1)}
    return state, jnp.square(bias).mean()


def _limit(size: int) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def toy_with_code(*args, **kwargs) -> None:
    """`toy`, ending as errors.run ends a command."""
    try:
        toy(*args, **kwargs)
    except CheckpointError as error:
        print(error)
        raise SystemExit(error.exit_code) from error


def one_of_two(path: Path, frozen: Path, port: int, index: int, fails: int) -> None:
    """A process of a run over two: saves twice, the first one failing `fails` times."""
    join(port, index)
    mesh = sharding.make_mesh(data=2, fsdp=2)
    run = WorkDir(path, training.config(frozen), frozen)
    left = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] * fails
    seal = kept.seal

    def fail(part):
        if left:
            raise left.pop()
        seal(part)

    with mock.patch.object(kept, "seal", fail):  # by the first process alone
        run.save(2, sharded_state(mesh, 2), {"next": 2})
        run.wait()
    run.log(2, {"loss": 0.5})
    run.save(4, sharded_state(mesh, 4), {"next": 4})
    run.close()
    run = WorkDir(path, training.config(frozen), frozen)
    found = run.restore(sharded_state(mesh, 0))
    wanted = sharded_state(mesh, 4)
    assert run.step == 4 and run.position == {"next": 4}
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(sharding.fetch(got), sharding.fetch(want))
    run.close()


def sharded_state(mesh: jax.sharding.Mesh, value: int) -> dict:
    """Parameters that are everywhere and in parts, as the mesh wants them."""
    kernel = np.random.default_rng(value).normal(size=(2, 12, 20)).astype(np.float32)
    params = {
        "llama/blocks/mlp/up/kernel": kernel,  # over `fsdp`
        "projector/bias": np.full(24, value, np.float32),
    }
    moments = {name: 2 * array for name, array in params.items()}
    return sharding.place_state({"params": params, "opt_state": (moments,)}, mesh)


def join(
    port: int, index: int, of: int = 2, devices: int = 2, start_s=60, limit_s=60
) -> cluster.Team:
    """Makes this process one of several that have so many devices each."""
    jax.config.update("jax_num_cpu_devices", devices)
    os.environ |= {
        cluster.COORDINATOR: f"localhost:{port}",
        cluster.PROCESSES: str(of),
        cluster.PROCESS: str(index),
    }
    team = cluster.start(start_s, limit_s)
    assert team is not None
    return team


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def in_process(function: Callable, *args, **kwargs) -> int:
    """The exit code of a process of its own; minus the signal that ended it."""
    (code,) = in_processes((function, args, kwargs))
    assert code is not None
    return code


def in_processes(
    *calls: tuple[Callable, Sequence, Mapping[str, Any]], stopped: int | None = None
) -> list[int | None]:
    """The exit codes of several processes at a time.

    They are forked from one that has imported everything and started nothing.

    Args:
        stopped: the one that will not end; it is killed when the others have.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tensorboardX"])
    processes = [
        context.Process(target=function, args=tuple(args), kwargs=dict(kwargs))
        for function, args, kwargs in calls
    ]
    waited = [p for i, p in enumerate(processes) if i != stopped]
    try:
        for process in processes:
            process.start()
        for process in waited:
            process.join(timeout=300)
        assert all(process.exitcode is not None for process in waited), calls
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def saved_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a run's newest checkpoint by its path in the state."""
    step = max(locate.kept_steps(path))
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(
            path.absolute() / locate.CHECKPOINTS / str(step) / "state"
        )
    return {
        jax.tree_util.keystr(keys): np.asarray(value)
        for keys, value in jax.tree_util.tree_leaves_with_path(state)
    }


# Several processes, and what is done to one of them.


def say_into(path: Path) -> None:
    """stderr, of C too, into a file."""
    logging.basicConfig(level=logging.INFO, force=True)
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def hurt(how: str, log: Path) -> None:
    """Do something to this process, and say when, on the clock of all processes."""
    log.write_text(str(time.monotonic()))
    if how == "killed":
        kill()
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "stuck":
        threading.Event().wait()
    elif how == "fails":
        raise DataError("a shard is damaged")
    elif how == "has a bug":
        raise RuntimeError("a bug")
    elif how == "takes its time":
        time.sleep(3)


def ends_as_a_command(run: Callable[[], object]) -> None:
    """Exits with the code of errors.run, which reads flags, as train.main would."""
    try:
        run()
        jax.distributed.shutdown()
    except MiniGPT4Error as error:
        raise SystemExit(errors.say(error, [])) from error


def stepping(
    port: int, index: int, folder: Path, victim: int, how: str, when: int | str = 3
) -> None:
    """Process 0 or 1 of a run whose steps only wait for each other; one is hurt.

    What it says is in INDEX.log. Its disk is slow.

    Args:
        when: step (from 0) in which that is, "save": at the one after the third, or
            "before": all of them, where that may take four seconds.
    """
    say_into(folder / f"{index}.log")
    team = join(port, index, devices=1)
    other_s = 4 if when == "before" else 60
    write = watchdog._write

    def slowly(*args):
        time.sleep(0.5)
        write(*args)

    def run():
        with (
            mock.patch.object(watchdog, "_write", slowly),
            watchdog.Watchdog(folder / "stacks", 2, other_s, team) as watch,
        ):
            watch.pace.before("loading the model")
            if (index, when) == (victim, "before"):
                hurt(how, folder / "hurt")
            watch.pace.begin(0)
            for step in range(6):
                if (index, step) == (victim, when):
                    hurt(how, folder / "hurt")
                watch.pace.ended(step)
                multihost_utils.process_allgather(np.array(step))
                if (index, step, when) == (victim, 2, "save"):
                    with watch.pace.other("save"):
                        hurt(how, folder / "hurt")

    ends_as_a_command(run)


def coming(port: int, index: int, of: int, log: Path, start_s: float) -> None:
    """A process that comes; what it says when others do not is in `log`."""
    say_into(log)
    ends_as_a_command(lambda: join(port, index, of, start_s=start_s))
