"""A compiled step's time on the devices at hand, from what they reach in a measurement.

Two rates of this machine, of a large product and of memory, and the optimised program:
each of its instructions takes the longer of its products and of what it reads and writes.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from minigpt4_jax import hlo

SIZE = 4096  # rows and columns of the measured product
COPIED = 1 << 26  # values that are read and written
FREE = ("parameter constant tuple get-tuple-element bitcast after-all iota").split()


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a large product in `dtype`, and bytes/s read and written, of a device."""

    products: float
    memory: float
    dtype: str


@dataclass(frozen=True)
class Roofline:
    """Seconds of a program; products, memory: of what each alone would take.

    useful: whether products are those of the formula, as nobody can count the program's.
    """

    seconds: float
    products: float
    memory: float
    rates: Rates
    useful: bool = False

    def __str__(self) -> str:
        counted = "useful ones alone" if self.useful else "alone"
        return (
            f"projected {1e3 * self.seconds:.0f} ms (products {counted} "
            f"{1e3 * self.products:.0f} at {self.rates.products / 1e9:.0f} GFLOP/s, "
            f"memory alone {1e3 * self.memory:.0f} at {self.rates.memory / 1e9:.1f} "
            f"GB/s, both measured)"
        )


def measure(dtype: str) -> Rates:
    """What the first device of this machine reaches, the best of five."""
    x, many = jnp.ones((SIZE, SIZE), dtype), jnp.ones(COPIED, jnp.float32)
    product = _best(jax.jit(jnp.matmul), x, x)
    copy = _best(jax.jit(lambda x: x + 1), many)
    return Rates(2 * SIZE**3 / product, 2 * many.nbytes / copy, dtype)


def _best(function: Callable, *args) -> float:
    function(*args).block_until_ready()
    took = []
    for _ in range(5):
        began = time.perf_counter()
        function(*args).block_until_ready()
        took.append(time.perf_counter() - began)
    return min(took)


def project(
    program: hlo.Program, rates: Rates, useful: float, shared: int = 1
) -> Roofline:
    """The time of one run of a device's program.

    Args:
        useful: FLOPs of all devices by formula, which stand for the program's products
            where these are calls of a library that cannot be counted.
        shared: devices that share what was measured, as those of one CPU do.
    """
    ran = [(*run, moved(program, *run[:2])) for run in program.runs()]
    memory = [times * size / rates.memory for _, _, times, size in ran]
    try:
        products = [t * program.flops(n, i) / rates.products for n, i, t, _ in ran]
    except ValueError:
        alone = useful / shared / rates.products
        seconds = shared * max(alone, sum(memory))
        return Roofline(seconds, shared * alone, shared * sum(memory), rates, True)
    seconds = shared * sum(map(max, products, memory))
    return Roofline(seconds, shared * sum(products), shared * sum(memory), rates)


def moved(program: hlo.Program, name: str, i: hlo.Instruction) -> int:
    """Bytes that an instruction reads and writes; of a slice no more than the slice."""
    if i.operation in FREE:
        return 0
    types = {other.name: other.type for other in program.computations[name]}
    operands = [types[operand] for operand in i.operands if operand in types]
    if i.operation != "fusion":
        return _moved(i.operation, i.type, operands)
    (inner,) = i.called[:1]
    inside = program.computations[inner]
    root = inside[-1]
    inner_types = {other.name: other.type for other in inside}
    written = size(i.type)
    updated = ""
    if root.operation == "dynamic-update-slice":  # in place
        updated = root.operands[0]
        written = size(inner_types[root.operands[1]])
    read = 0
    for parameter in (other for other in inside if other.operation == "parameter"):
        users = [other for other in inside if parameter.name in other.operands]
        if parameter.name == updated and len(users) == 1:
            continue
        if users and all(u.operation == "dynamic-slice" for u in users):
            read += sum(size(user.type) for user in users)
        else:
            read += size(parameter.type)
    return read + written


def _moved(operation: str, type_: str, operands: Sequence[str]) -> int:
    if operation in ("dynamic-slice", "gather", "slice"):
        return 2 * size(type_)
    if operation == "dynamic-update-slice":
        return 2 * size(operands[1])
    return size(type_) + sum(map(size, operands))


def size(type_: str) -> int:
    """Bytes of a type of HLO, of a tuple all of its parts."""
    parts = re.findall(r"(?:pred|[a-z]+\d\w*)\[[\d,]*\]", type_)
    return sum(hlo.size(part) for part in parts)
