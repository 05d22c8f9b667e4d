"""One attempt at steps in order: Grain's threads or processes, drawn from by a thread.

The thread is what makes a limit of time possible, for Grain itself waits for ever.
"""

import contextlib
import multiprocessing.spawn
import os
import queue
import shutil
import signal
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import IO

import grain
import numpy as np
from absl import flags

from minigpt4_jax.data import loader_worker
from minigpt4_jax.data.batch import Bad, MakeBatch
from minigpt4_jax.data.blocks import Name, Pool, Reader, make_folder

START_S = 60  # that the first batch of a process may take at least


class Lost(Exception):
    """The workers do not go on."""


class ReadAhead:
    """Batches of `steps`, in order."""

    def __init__(self, make: MakeBatch, steps: range, workers: int, prefetch: int):
        """Args: as Loader's."""
        for name in flags.FLAGS:
            if name.startswith("grain_"):
                flags.FLAGS[name].present = True  # else it wants all of argv parsed
        folder, lock = (
            make_folder()
        )  # of blocks, and of a file called as each process's id
        dataset = grain.MapDataset.range(steps.start, steps.stop)
        if workers:
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            made = dataset.map(_InBlocks(make, folder)).to_iter_dataset(options)
            ahead = made.mp_prefetch(
                grain.MultiprocessingOptions(workers, prefetch),
                worker_init_fn=partial(loader_worker.introduce, str(folder)),
            )
        else:
            options = grain.ReadOptions(prefetch, prefetch)
            ahead = dataset.map(partial(make, take=_fresh)).to_iter_dataset(options)
        self._reader, self._starting = Reader(), workers
        self._out: queue.Queue = queue.Queue(1)
        over = threading.Event()
        args = (iter(ahead), self._out, over)
        thread = threading.Thread(target=_draw, args=args, daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, thread, over, folder, lock)
        self._kill = partial(_kill, folder)

    def get(self, limit_s: float) -> tuple[dict[str, np.ndarray], list[Bad]]:
        """A batch and its bad examples; raises Lost, or what a worker raised."""
        if self._starting:  # processes of which each gives a batch in turn
            limit_s = max(limit_s, START_S)
        try:
            found = self._out.get(timeout=limit_s)
        except queue.Empty:
            raise Lost(f"no batch in {limit_s:g} s") from None
        self._starting = max(0, self._starting - 1)
        if isinstance(found, Exception):
            if "terminated unexpectedly" in str(found):
                raise Lost(f"a loader process ended ({_exit_code(found)})") from found
            raise found
        block, contents = found
        if isinstance(block, Name):
            block = self._reader.open(block)
        return contents.views(block), contents.bad

    def close(self, kill: bool) -> None:
        """End the workers, at once if `kill`."""
        if kill and self._end.alive:
            self._kill()
        self._end()


class _InBlocks:
    """MakeBatch in a process: its blocks are made there."""

    def __init__(self, make: MakeBatch, folder: Path):
        self.make, self.folder = make, folder
        self.pool: Pool | None = None

    def __call__(self, step: int):
        self.pool = self.pool or Pool(self.folder)
        return self.make(step, self.pool.take)


def _fresh(size: int) -> tuple[np.ndarray, np.ndarray]:
    block = np.empty(size, np.uint8)
    return block, block


def _draw(iterator, out: queue.Queue, over: threading.Event) -> None:
    """Put all that an iterator gives, or its exception, into `out` until it is over."""
    try:
        for found in iterator:
            if not _put(found, out, over):
                return
    except Exception as error:  # told to the thread that waits
        _put(error, out, over)
    else:
        _put(RuntimeError("the loader ended before its last step"), out, over)
    finally:
        iterator.close()


def _put(found, out: queue.Queue, over: threading.Event) -> bool:
    while not over.is_set():
        with contextlib.suppress(queue.Full):
            out.put(found, timeout=0.2)
            return True
    return False


def _end(
    thread: threading.Thread, over: threading.Event, folder: Path, lock: IO
) -> None:
    """End the workers, by killing those that do not go: they have nothing to save."""
    over.set()
    thread.join(2)
    if thread.is_alive():
        _kill(folder)
        thread.join(2)  # in vain if it waits for the rest of what a process was sending
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _kill(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody tidied up
        for path in folder.iterdir():
            if path.name.isdigit():
                with contextlib.suppress(OSError):
                    os.kill(int(path.name), signal.SIGKILL)


def _exit_code(error: Exception) -> str:
    """ "signal 9", say, of Grain's "... unexpectedly with exit code -9. ..."."""
    code = str(error).partition("exit code ")[2].partition(".")[0]
    return f"signal {code[1:]}" if code.startswith("-") else f"exit code {code}"


def _without_the_program(name: str) -> dict:
    """What a new process is told; Grain's begin with loader_worker.py."""
    data = _preparation(name)
    if name.startswith("grain-process-prefetch"):
        data.pop("init_main_from_path", None)
        data["init_main_from_name"] = loader_worker.__name__
    return data


_preparation = multiprocessing.spawn.get_preparation_data
multiprocessing.spawn.get_preparation_data = _without_the_program
