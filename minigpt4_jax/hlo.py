"""What a compiled program does: products, collectives and cycles in optimised HLO text.

Loop bodies count as often as they run, which XLA's own cost analysis does not do.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # others end in their bits


@dataclass(frozen=True)
class Dot:
    """A dot product, and how often the program runs it."""

    shape: tuple[int, ...]  # of its output
    flops: int  # of one run: a multiplication and an addition each
    times: int


@dataclass(frozen=True)
class Collective:
    """An exchange between devices, and how often the program runs it.

    bytes: of the whole array a device ends with, or, reduced or sent, begins with.
    groups: ids of the devices that exchange, as rows; of a permutation (from, to).
    """

    kind: str
    shape: tuple[int, ...]
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int = 1


@dataclass(frozen=True)
class Instruction:
    """A line of HLO text."""

    name: str
    type: str
    operation: str
    rest: str  # operands and attributes

    @property
    def called(self) -> list[str]:
        """Computations that run with it, but for a loop's condition."""
        found = []
        for one, several in CALLED.findall(self.rest):
            found += [one] if one else re.findall(r"[\w.-]+", several)
        return found

    @property
    def operands(self) -> list[str]:
        inside = re.sub(r"\w+\[[^]]*\]\S*", "", self.rest.partition(")")[0])
        return re.findall(r"%?([\w.-]+)", inside)


class Program:
    """Instructions by computation, in the order in which they run."""

    def __init__(self, text: str):
        """Args: text: `compiled.as_text()`."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        found: list[Instruction] = []
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := COMPUTATION.match(line):
                found = self.computations.setdefault(head[1], [])
                self.entry = head[1] if line.startswith("ENTRY") else self.entry
            elif instruction := INSTRUCTION.match(line):
                found.append(Instruction(*instruction.groups()))
        self._types = {
            name: {i.name: i.type for i in instructions}
            for name, instructions in self.computations.items()
        }

    def dots(self) -> list[Dot]:
        """All dot products, also where a TPU's compiler writes them as convolutions.

        Raises ValueError where they cannot be counted: a loop whose length is not
        written down, or a call of a library for products.
        """
        return list(self._dots(self.entry, 1))

    def collectives(self) -> list[Collective]:
        """All exchanges between devices; parts of one that was spread over several
        fusions count once."""
        return list(self._collectives(self.entry, 1, frozenset()))

    def seconds(
        self, cycle_s: float, collective_s: Callable[[Collective], float]
    ) -> "Seconds":
        """Projected time of one run, as the compiler ordered it.

        A collective runs beside the instructions between its start and its end, but
        one at a time; where these are done before it, the device waits.

        Args:
            cycle_s: seconds of a cycle.
            collective_s: seconds of a collective by itself.
        """
        return self._seconds(self.entry, cycle_s, collective_s, frozenset())

    def runs(self) -> Iterator[tuple[str, Instruction, int]]:
        """What a device runs one by one: (computation, instruction, how often)."""
        yield from self._runs(self.entry, 1)

    def flops(self, name: str, i: Instruction) -> int:
        """Of the dot products in an instruction of a computation, for one run."""
        return total(list(self._dots_in(i, self._types[name], 1)))

    def _runs(self, name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for i in self.computations[name]:
            if i.operation in ("while", "call", "conditional"):
                for called in i.called:
                    yield from self._runs(called, times * self._trips(i))
            else:
                yield name, i, times

    def slowest(self, count: int) -> list[tuple[int, str, str]]:
        """(cycles with loops, name, operation in the source) of the largest fusions."""
        found = sorted(self._cycles(self.entry, 1), reverse=True)
        return found[:count]

    def _dots(self, name: str, times: int) -> Iterator[Dot]:
        for i in self.computations[name]:
            yield from self._dots_in(i, self._types[name], times)

    def _dots_in(self, i: Instruction, types: dict[str, str], times: int):
        if i.operation == "dot":
            yield Dot(shape(i.type), _dot_flops(i, types), times)
        elif i.operation == "convolution":
            yield Dot(shape(i.type), _convolution_flops(i, types), times)
        elif i.operation == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', i.rest)
            if target and re.search("matmul|gemm|dot|conv", target[1]):
                raise ValueError(f"cannot count {i.rest[:120]}")
        for called in i.called:
            yield from self._dots(called, times * self._trips(i))

    def _trips(self, i: Instruction) -> int:
        if i.operation != "while":
            return 1
        if known := TRIPS.search(i.rest):
            return int(known[1])
        # A TPU's compiler leaves it out: the counter of a scan runs from 0 to a constant.
        named = re.search(r"condition=%?([\w.-]+)", i.rest)
        condition = self.computations[named[1]] if named else []
        compare = [c for c in condition if c.operation == "compare"]
        limits = [c for c in condition if c.operation == "constant"]
        if len(compare) == len(limits) == 1 and "direction=LT" in compare[0].rest:
            return int(limits[0].rest.partition(")")[0])
        raise ValueError(f"{i.name}: a loop of unknown length")

    def _inside(self, i: Instruction) -> Iterator[Instruction]:
        """The collectives that run within one instruction."""
        for called in i.called if i.operation != "while" else []:
            for inner in self.computations[called]:
                if inner.operation.removesuffix("-start") in COLLECTIVES:
                    yield inner
                yield from self._inside(inner)

    def _collectives(self, name: str, times: int, outer: frozenset):
        spread = outer | self._spread(name)
        seen = set(outer)
        for i in self.computations[name]:
            if i.operation == "while":
                for called in i.called:
                    trips = self._trips(i)
                    yield from self._collectives(called, times * trips, spread)
                continue
            for inner in [i, *self._inside(i)]:
                key = _channel(inner)
                if key and key not in seen:
                    seen.add(key)
                    yield from _exchanged(inner, times)

    def _spread(self, name: str) -> frozenset[str]:
        """Collectives within fusions of a computation, which a loop in it may go on with."""
        fused = (inner for i in self.computations[name] for inner in self._inside(i))
        return frozenset(_channel(inner) for inner in fused)

    def _seconds(
        self, name: str, cycle_s: float, collective_s: Callable, outer: frozenset
    ) -> "Seconds":
        instructions = self.computations[name]
        spread = outer | self._spread(name)
        last = {}  # where a collective must be there, which may be a -done
        for place, i in enumerate(instructions):
            for inner in [i, *self._inside(i)]:
                last[_channel(inner)] = place
            if i.operation.endswith("-done"):
                last |= {operand: place for operand in i.operands if operand in last}
        now = link = compute = exchange = 0.0
        ends: dict[str, float] = {}
        for place, i in enumerate(instructions):
            if i.operation in ("while", "conditional"):
                runs = [
                    self._seconds(called, cycle_s, collective_s, spread)
                    for called in i.called
                ]
                longest = max(runs, key=lambda run: run.total)
                trips = self._trips(i)
                now += longest.total * trips
                compute += longest.compute * trips
                exchange += longest.collectives * trips
                continue
            for inner in [i, *self._inside(i)]:
                key = _channel(inner)
                if key and key not in ends and key not in outer:
                    took = sum(map(collective_s, _exchanged(inner)))
                    ends[key] = link = max(now, link) + took
                    exchange += took
            if cycles := CYCLES.search(i.rest):
                now += int(cycles[1]) * cycle_s
                compute += int(cycles[1]) * cycle_s
            here = (end for key, end in ends.items() if last[key] == place)
            now = max([now, *here])
        return Seconds(now, compute, exchange)

    def _cycles(self, name: str, times: int) -> Iterator[tuple[int, str, str]]:
        for i in self.computations[name]:
            if i.operation == "while":
                for called in i.called:
                    yield from self._cycles(called, times * self._trips(i))
            elif cycles := CYCLES.search(i.rest):
                source = re.search(r'op_name="([^"]*)"', i.rest)
                yield int(cycles[1]) * times, i.name, source[1] if source else ""


@dataclass(frozen=True)
class Seconds:
    """Projected time: of all, of the fusions alone, of the collectives alone."""

    total: float
    compute: float
    collectives: float


def total(dots: list[Dot]) -> int:
    """FLOPs of all of them."""
    return sum(dot.flops * dot.times for dot in dots)


def shape(type_: str) -> tuple[int, ...]:
    """ "f32[3,5]{1,0}" -> (3, 5)."""
    inside = type_.partition("[")[2].partition("]")[0]
    return tuple(int(size) for size in inside.split(",")) if inside else ()


def size(type_: str) -> int:
    """ "f32[3,5]{1,0}" -> 60 bytes."""
    kind = type_.partition("[")[0]
    bits = BITS.get(kind) or int(re.sub(r"\D*(\d+).*", r"\1", kind))
    return math.prod(shape(type_)) * bits // 8


def _exchanged(i: Instruction, times: int = 1) -> list[Collective]:
    """The parts of a collective instruction, of which the compiler may make one of many."""
    kind = i.operation.removesuffix("-start")
    parts = re.findall(r"\w+\[[\d,]*\]", i.type)
    if i.operation.endswith("-start"):  # operands and results, or what sends them
        if kind == "all-gather":
            parts = parts[len(parts) // 2 :]
        elif kind == "collective-permute":
            parts = parts[1:2]
    groups = _groups(i.rest)
    whole = len(groups[0]) if kind == "reduce-scatter" else 1
    return [
        Collective(kind, shape(part), size(part) * whole, groups, times)
        for part in parts
    ]


def _channel(i: Instruction) -> str:
    """What parts of one collective have in common; empty for all else."""
    if i.operation.removesuffix("-start") not in COLLECTIVES:
        return ""
    if i.operation.endswith("-start"):
        return i.name
    found = re.search(r"channel_id=(\d+)", i.rest)
    # With its kind and shape: on a CPU all have the same channel.
    return f"{i.operation} {shape(i.type)} {found[1]}" if found else i.name


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """Of replica_groups or source_target_pairs, written out or in short."""
    if found := re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest
    ):
        return tuple(
            tuple(int(n) for n in group.split(","))
            for group in re.findall(r"\{([\d,]+)\}", found[1])
        )
    # [groups,size]<=[dims]T(order): the devices in that order, cut into groups.
    if found := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    ):
        dims = [int(n) for n in found[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found[4]:
            ids = ids.transpose([int(n) for n in found[4].split(",")])
        ids = ids.reshape(int(found[1]), int(found[2]))
        return tuple(tuple(group) for group in ids.tolist())
    # mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}: over the axes in braces.
    short = (
        r"replica_groups=@?mesh\[([^]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{([^}]*)\}"
    )
    if found := re.search(short, rest):
        axes = re.findall(r"'?(\w+)'?=(\d+)", found[1])
        names, sizes = [name for name, _ in axes], [int(n) for _, n in axes]
        ids = np.arange(math.prod(sizes))
        if order := re.fullmatch(r"\[([\d,]+)\]T\(([\d,]+)\)", found[2] or ""):
            dims, turn = ([int(n) for n in part.split(",")] for part in order.groups())
            ids = ids.reshape(dims).transpose(turn)
        elif found[2]:
            ids = np.array([int(n) for n in re.findall(r"\d+", found[2])])
        over = [names.index(n) for n in re.findall(r"\w+", found[3])]
        kept = [n for n in range(len(names)) if n not in over]
        ids = ids.reshape(sizes).transpose(kept + over)
        ids = ids.reshape(-1, math.prod(sizes[n] for n in over))
        return tuple(tuple(group) for group in ids.tolist())
    raise ValueError(f"collective of unknown groups: {rest[:200]}")


def _dot_flops(i: Instruction, types: dict[str, str]) -> int:
    left_shape = shape(types[i.operands[0]])
    over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    contracted = [left_shape[int(n)] for n in over[1].split(",")] if over else []
    return 2 * math.prod(shape(i.type)) * math.prod(contracted)


def _convolution_flops(i: Instruction, types: dict[str, str]) -> int:
    """Of the products that padding and dilation leave."""
    left, kernel = (shape(types[name]) for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels, i.rest[:200]
    lhs, rhs, out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    attrs = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = [d for d in out if d.isdigit()]
    made = shape(i.type)
    flops = 2 * kernel[rhs.index("i")] * made[out.index("b")] * made[out.index("f")]
    for d in spatial:
        n = int(d)
        sizes = left[lhs.index(d)], kernel[rhs.index(d)], made[out.index(d)]
        flops *= _pairs(*sizes, **_window(attrs, n))
    return flops


def _window(attrs: dict[str, str], n: int) -> dict[str, int]:
    def of(name: str, default: int) -> int:
        parts = attrs[name].split("x") if name in attrs else []
        return int(parts[n].split("_")[0]) if parts else default

    return dict(
        stride=of("stride", 1),
        pad=of("pad", 0),
        dilate=of("lhs_dilate", 1),
        spread=of("rhs_dilate", 1),
    )


def _pairs(
    size: int, kernel: int, out: int, *, stride: int, pad: int, dilate: int, spread: int
) -> int:
    """How many pairs of an output and a tap of the kernel meet an input."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - pad
    return int(((at >= 0) & (at % dilate == 0) & (at // dilate < size)).sum())
