"""Rule tables: tensors by their names in a published file -> parameters by our paths.

A table is a tuple of `Rule` and `Drop` rows. Every parameter is filled exactly once and
every source tensor is used or dropped for a stated reason; anything else is one error
that lists everything. Names and shapes are checked before a single value is read.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minigpt4_jax.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How one source tensor becomes one parameter (one layer of it, if stacked).

    Attributes:
        name: for reports.
        source_shape: the shape the source must have, from the parameter's shape.
        convert: (source array, parameter's shape) -> parameter.
        invert: parameter -> source array, or its own part of that (see `part`).
        index, parts: which of how many equal parts along the source's first axis.
    """

    name: str
    source_shape: Callable[[Shape], Shape]
    convert: Callable[[np.ndarray, Shape], np.ndarray]
    invert: Callable[[np.ndarray], np.ndarray]
    index: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Rule:
    """Source tensors whose name matches `pattern` fill the parameter at `path`.

    Attributes:
        pattern: regex for the whole name. A group `(\\d+)` is the layer number: the
            tensors are stacked in its order along a leading axis.
        path: our parameter path. Several rules may read one source tensor.
        layout: how values are rearranged.
        otherwise: what to do if the model has no such parameter: a function of (array,
            source) that returns why the tensor must not be dropped, or None if it may.
    """

    pattern: str
    path: str
    layout: Layout
    otherwise: "Callable[[np.ndarray, Mapping[str, Any]], str | None] | None" = None


@dataclass(frozen=True)
class Drop:
    """Source tensors that are left out on purpose, and why."""

    pattern: str
    reason: str


@dataclass
class Fill:
    """How one parameter is made: its source names in layer order, and their layout."""

    path: str
    shape: Shape
    layout: Layout
    names: dict[int | None, str] = field(default_factory=dict)

    @property
    def stacked(self) -> bool:
        return None not in self.names

    @property
    def sources(self) -> list[str]:
        """Names of the source's tensors, in the order of layers."""
        return [self.names[number] for number in sorted(self.names, key=_first_none)]

    def pieces(self, source: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """The parameter, layer by layer if it is stacked; nothing else is read."""
        shape = self.shape[1:] if self.stacked else self.shape
        for name in self.sources:
            array = self.layout.convert(np.asarray(source[name]), shape)
            yield np.ascontiguousarray(array)

    def make(self, source: Mapping[str, Any]) -> np.ndarray:
        """The whole parameter, in the source's dtype."""
        if not self.stacked:
            return next(self.pieces(source))
        made = None
        for index, layer in enumerate(self.pieces(source)):
            if made is None:
                made = np.empty(self.shape, layer.dtype)
            if layer.dtype != made.dtype:
                raise mixed(self.path, index, layer.dtype, made.dtype)
            made[index] = layer
        assert made is not None
        return made


def _first_none(number: int | None) -> int:
    return -1 if number is None else number


def mixed(path: str, index: int, dtype: Any, first: Any) -> CheckpointError:
    """The error for layers of one parameter that are stored in different dtypes."""
    return CheckpointError(
        f"{path}: layer {index} is {dtype} but layer 0 is {first}; the source mixes "
        "dtypes inside one parameter (choose one: --dtype)"
    )


def apply(
    rules: Iterable[Rule | Drop],
    source: Mapping[str, Any],
    wanted: Mapping[str, Shape],
) -> dict[str, np.ndarray]:
    """Parameters by path, in the source's dtypes.

    Args:
        rules: the table.
        source: tensors by name; a value has `.shape` and becomes values by `np.asarray`.
        wanted: shape of every parameter to fill.
    """
    return {fill.path: fill.make(source) for fill in plan(rules, source, wanted)}


def plan(
    rules: Iterable[Rule | Drop],
    source: Mapping[str, Any],
    wanted: Mapping[str, Shape],
) -> list[Fill]:
    """What `apply` does, in the order of `wanted`; raises one error with all problems."""
    rules = tuple(rules)
    fills: dict[str, Fill] = {}
    problems: list[str] = []
    for name in source:
        hits = [(rule, hit) for rule in rules if (hit := _match(rule, name))]
        fillers = [(rule, hit) for rule, hit in hits if isinstance(rule, Rule)]
        if hits and isinstance(hits[0][0], Drop):
            continue
        if not fillers:
            problems.append(f"{name} {list(source[name].shape)}: no rule knows it")
        for rule, hit in fillers:
            problems += _add(fills, rule, hit, name, source, wanted)
    for path, shape in wanted.items():
        fill = fills.get(path)
        if fill is None:
            problems.append(f"{path} {list(shape)}: nothing in the source fills it")
        elif fill.stacked:
            problems += _check_layers(fill)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"the source does not fit the model, {len(problems)} problems (is it the "
            f"right file for this preset?):\n  {listed}"
        )
    return [fills[path] for path in wanted]


def dropped(rules: Iterable[Rule | Drop], names: Iterable[str]) -> dict[str, str]:
    """Names of a source that a table leaves out, with the reason."""
    rules = tuple(rules)
    reasons = {}
    for name in names:
        first = next((rule for rule in rules if _match(rule, name)), None)
        if isinstance(first, Drop):
            reasons[name] = first.reason
    return reasons


def filled(rules: Iterable[Rule | Drop], names: Iterable[str]) -> set[str]:
    """Paths of the parameters that at least one name of a source goes into."""
    rules = tuple(rules)
    paths = set()
    for name in names:
        hits = [rule for rule in rules if _match(rule, name)]
        if hits and not isinstance(hits[0], Drop):
            paths |= {rule.path for rule in hits if isinstance(rule, Rule)}
    return paths


def _match(rule: Rule | Drop, name: str) -> re.Match[str] | None:
    return re.fullmatch(rule.pattern, name)


def _add(
    fills: dict[str, Fill],
    rule: Rule,
    hit: re.Match[str],
    name: str,
    source: Mapping[str, Any],
    wanted: Mapping[str, Shape],
) -> list[str]:
    """Enters one source tensor into the plan; returns what is wrong with it."""
    shape = wanted.get(rule.path)
    if shape is None:
        return _without_parameter(rule, name, source)
    number = int(hit.group(1)) if hit.re.groups else None
    fill = fills.setdefault(rule.path, Fill(rule.path, shape, rule.layout))
    if number in fill.names or (fill.names and (number is None) == fill.stacked):
        return [
            f"{rule.path}: both {next(iter(fill.names.values()))} and {name} fill it"
        ]
    fill.names[number] = name
    fill.layout = rule.layout
    one_layer = shape if number is None else shape[1:]
    got, want = tuple(source[name].shape), rule.layout.source_shape(one_layer)
    if got == want:
        return []
    return [f"{name}: got {list(got)}, want {list(want)} for {rule.path} {list(shape)}"]


def _without_parameter(rule: Rule, name: str, source: Mapping[str, Any]) -> list[str]:
    if rule.otherwise is None:
        return [f"{name}: the model has no {rule.path}"]
    reason = rule.otherwise(np.asarray(source[name]), source)
    return [f"{name}: the model has no {rule.path}, and {reason}"] if reason else []


def _check_layers(fill: Fill) -> list[str]:
    """Layer numbers start at 0, are evenly spaced, and are as many as wanted."""
    numbers = sorted(number for number in fill.names if number is not None)
    want = fill.shape[0]
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if len(numbers) == want and numbers == [step * index for index in range(want)]:
        return []
    return [f"{fill.path}: the source has layers {numbers}, want {want} of them"]


# Layouts. Torch stores a linear layer as [out, in], we as [in, out].


def transposed(array: np.ndarray) -> np.ndarray:
    """A contiguous copy of array.T, a cache line of it at a time.

    Numpy's own copy goes along one side only and takes 30 times longer for 4096 x 11008.
    """
    out = np.empty(array.shape[::-1], array.dtype)
    line = max(1, 64 // array.dtype.itemsize)
    for start in range(0, array.shape[0], line):
        out[:, start : start + line] = array[start : start + line].T
    return out


KEEP = Layout("keep", lambda want: want, lambda array, want: array, lambda array: array)
TRANSPOSE = Layout(
    "transpose",
    lambda want: want[::-1],
    lambda array, want: transposed(array),
    lambda array: transposed(array),
)
SPLIT_HEADS = Layout(  # [N*K, D] -> [D, N, K]
    "split heads",
    lambda want: (math.prod(want[1:]), want[0]),
    lambda array, want: transposed(array).reshape(want),
    lambda array: transposed(array.reshape(array.shape[0], -1)),
)
JOIN_HEADS = Layout(  # [D, N*K] -> [N, K, D]
    "join heads",
    lambda want: (want[-1], math.prod(want[:-1])),
    lambda array, want: transposed(array).reshape(want),
    lambda array: transposed(array.reshape(-1, array.shape[-1])),
)
FLAT = Layout(  # [N*K] -> [N, K]
    "split bias",
    lambda want: (math.prod(want),),
    lambda array, want: array.reshape(want),
    lambda array: array.reshape(-1),
)
PATCH = Layout(  # [D, C, H, W] -> [H, W, C, D]
    "patch kernel",
    lambda want: (want[3], want[2], want[0], want[1]),
    lambda array, want: array.transpose(2, 3, 1, 0),
    lambda array: array.transpose(3, 2, 0, 1),
)


def batched(axes: int = 1) -> Layout:
    """Removes leading axes of size 1, as of `cls_token` [1, 1, D]."""
    return Layout(
        f"remove {axes} leading axes of size 1",
        lambda want: (1,) * axes + want,
        lambda array, want: array.reshape(want),
        lambda array: array.reshape((1,) * axes + array.shape),
    )


def part(index: int, parts: int, layout: Layout) -> Layout:
    """The `index`-th of equal parts along the first axis (a fused qkv weight or bias)."""

    def source_shape(want: Shape) -> Shape:
        one = layout.source_shape(want)
        return (parts * one[0],) + one[1:]

    def convert(array: np.ndarray, want: Shape) -> np.ndarray:
        return layout.convert(np.split(array, parts, axis=0)[index], want)

    name = f"part {index + 1} of {parts}, {layout.name}"
    return Layout(name, source_shape, convert, layout.invert, index, parts)


def half_rotated(layout: Layout) -> Layout:
    """q or k rows stored for interleaved rotary pairs (2i, 2i+1), as Meta and llama.cpp do.

    Row h*K + 2i + j of the source is row h*K + j*K/2 + i of a half-rotation model.
    """

    def swap(array: np.ndarray, shape: Shape) -> np.ndarray:
        return array.reshape(shape).swapaxes(1, 2).reshape(array.shape)

    def convert(array: np.ndarray, want: Shape) -> np.ndarray:
        heads, size = want[-2:]
        return layout.convert(swap(array, (heads, size // 2, 2, -1)), want)

    def invert(array: np.ndarray) -> np.ndarray:
        heads, size = array.shape[-2:]
        return swap(layout.invert(array), (heads, 2, size // 2, -1))

    name = f"undo rotary pairs, {layout.name}"
    return Layout(name, layout.source_shape, convert, invert)


# Conditions under which a tensor without a parameter may be dropped (`Rule.otherwise`).


def must_be_zero(array: np.ndarray, source: Mapping[str, Any]) -> str | None:
    return "its values are not zero" if np.any(array) else None


def must_equal(name: str) -> Callable[[np.ndarray, Mapping[str, Any]], str | None]:
    """The tensor repeats another one, as a tied output head repeats the embeddings."""

    def check(array: np.ndarray, source: Mapping[str, Any]) -> str | None:
        if name in source and np.array_equal(array, np.asarray(source[name])):
            return None
        return f"it is not equal to {name}"

    return check
