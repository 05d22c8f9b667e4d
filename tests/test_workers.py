"""Maps in fresh processes: order, failures, and what the processes are."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from minigpt4_jax.data import workers
from minigpt4_jax.errors import DataError
from tests import errands

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order(count):
    assert list(workers.ordered(errands.slow_square, range(17), count)) == [
        i * i for i in range(17)
    ]


def test_an_item_whose_worker_dies_is_done_here():
    function = partial(errands.die, os.getpid())
    assert list(workers.ordered(function, range(9), 2)) == [-i for i in range(9)]


def test_an_error_of_the_function_is_raised_at_its_place():
    results = workers.ordered(errands.refuse, range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match="item 2"):
        next(results)


def test_items_are_taken_as_needed_and_stopping_early_ends_the_workers():
    taken = []

    def items():
        for i in range(1_000):
            taken.append(i)
            yield i

    results = workers.ordered(errands.slow_square, items(), 2)
    assert next(results) == 0
    assert len(taken) < 10
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 5
    assert len(taken) < 10


def test_a_worker_imports_neither_jax_nor_the_callers_main_file():
    for loaded in workers.ordered(errands.modules, range(3), 2):
        assert "jax" not in loaded and "__mp_main__" not in loaded


def test_a_script_without_a_guard_may_use_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom minigpt4_jax.data import workers\n"
        "print(list(workers.ordered(math.factorial, range(5), 2)))\n"
    )
    result = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "[1, 1, 2, 6, 24]\n", result.stderr
    assert 1 <= workers.available() <= workers.MOST
