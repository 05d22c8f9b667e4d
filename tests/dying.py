"""Runs in processes that end in the middle: what is killed where, and a toy run.

The places are in the order in which a save comes by them.
"""

import functools
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from minigpt4_jax import kept, locate, storage
from minigpt4_jax.errors import CheckpointError
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


def in_process(function: Callable, *args, **kwargs) -> int:
    """The exit code of a process of its own; minus the signal that ended it.

    It is forked from one that has imported everything and started nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{function.__name__}{args} did not end")
    assert process.exitcode is not None
    return process.exitcode


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
