"""What a compiled program multiplies: dot products in optimised HLO text, loops counted."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\([^=]*?\)|\S+) ([\w-]+)\((.*)$")
CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Dot:
    """A dot product, and how often the program runs it."""

    shape: tuple[int, ...]  # of its output
    flops: int  # of one run: a multiplication and an addition each
    times: int


def total(dots: list[Dot]) -> int:
    """FLOPs of all of them."""
    return sum(dot.flops * dot.times for dot in dots)


def dots(text: str) -> list[Dot]:
    """All dot products of `compiled.as_text()`.

    Raises ValueError where they cannot be counted: a loop whose length is not written
    down, or a call of a library for products.
    """
    computations, entry = _parse(text)
    return list(_dots(computations, entry, 1))


def _parse(text: str) -> tuple[dict[str, list[tuple]], str]:
    """Instructions (name, type, operation, rest of the line) by computation."""
    computations: dict[str, list[tuple]] = {}
    entry = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := COMPUTATION.match(line):
            found = computations.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif instruction := INSTRUCTION.match(line):
            found.append(instruction.groups()[1:])
    return computations, entry


def _dots(computations: dict, name: str, times: int) -> Iterator[Dot]:
    types = {name: kind for name, kind, _, _ in computations[name]}
    for _, kind, operation, rest in computations[name]:
        if operation == "dot":
            yield Dot(_shape(kind), _flops(kind, rest, types), times)
        elif operation == "custom-call" and re.search("matmul|gemm|dot|conv", rest):
            raise ValueError(f"cannot count {rest[:120]}")
        again = times
        if operation == "while":
            trips = TRIPS.search(rest)
            if trips is None:
                raise ValueError(f"{name}: a loop of unknown length: {rest[:120]}")
            again *= int(trips[1])
        for one, several in CALLED.findall(rest):
            for called in [one] if one else re.findall(r"[\w.-]+", several):
                yield from _dots(computations, called, again)


def _flops(kind: str, rest: str, types: dict[str, str]) -> int:
    left = re.findall(r"%?([\w.-]+)", re.sub(r"\w+\[[^]]*\]\S*", "", rest))[0]
    over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    left_shape = _shape(types[left])
    contracted = [left_shape[int(i)] for i in over[1].split(",")] if over else []
    return 2 * math.prod(_shape(kind)) * math.prod(contracted)


def _shape(kind: str) -> tuple[int, ...]:
    """ "f32[3,5]{1,0}" -> (3, 5)."""
    inside = kind.partition("[")[2].partition("]")[0]
    return tuple(int(size) for size in inside.split(",")) if inside else ()
