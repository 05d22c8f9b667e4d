"""A map in fresh processes, results in order; for scans that take minutes to hours.

Not `multiprocessing`: its fresh processes import the caller's main file again, with JAX
and all, and a script without a guard starts itself. These import what the function needs
and end with this process, whatever ends it.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 16  # more would only wait for the disk
_WORK = "from minigpt4_jax.data.workers import work; work()"


def ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`map(function, items)`, all three picklable; fewer than 2 workers: done here.

    At most twice as many results as workers are in memory. An item whose worker dies (out
    of memory, say) is done here.
    """
    if workers < 2:
        yield from map(function, items)
        return
    idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    processes = [_start() for _ in range(workers)]
    for process in processes:
        idle.put(process)

    def do(item: Item) -> Result:
        process = idle.get()
        try:
            return _ask(process, function, item)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            if stopped.is_set():
                raise
            return function(item)
        finally:
            idle.put(process)

    pool, stopped = ThreadPoolExecutor(workers), threading.Event()
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(do, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stopped.set()
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            with contextlib.suppress(BrokenPipeError), process:
                pass  # closes its pipes and waits


def available() -> int:
    """How many workers this machine feeds."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST)
    return min(os.cpu_count() or 1, MOST)


def work() -> None:
    """The loop of a worker: (function, item) from stdin, (result, error) to stdout."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # prints must not mix in
    while True:
        try:
            function, item = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (function(item), None)
        except Exception as error:
            answer = (None, error)
        pickle.dump(answer, answers)
        answers.flush()


def _start() -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", _WORK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # Ctrl-C is for the parent to say
    )


def _ask(process: subprocess.Popen, function: Callable, item):
    """Raises what `function` raises, or a broken pipe when the worker is dead."""
    assert process.stdin is not None and process.stdout is not None
    pickle.dump((function, item), process.stdin)
    process.stdin.flush()
    result, error = pickle.load(process.stdout)
    if error is not None:
        raise error
    return result
