"""Parameters by our paths -> tensors under published names: the rule tables backwards.

The same rows, each with its layout's inverse; a fused tensor is joined of all its parts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.casting import cast, widest
from convert.rules import Drop, Layout, Rule, Shape, plan
from convert.tensors import Tensor
from minigpt4_jax.errors import CheckpointError

LAYER = r"(\d+)"
OPTIONAL = re.compile(r"\(\?:([^()|]*)\)\?")  # a prefix that some files leave out


@dataclass(frozen=True)
class Piece:
    """A parameter, or one layer of it, that a tensor is made of."""

    path: str
    layer: int | None
    layout: Layout


@dataclass(frozen=True)
class Origin:
    """A tensor of a published file, and the pieces it was split into, in their order."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]

    def tensor(self, stored: Mapping[str, Any], dtypes: Mapping[str, Any]) -> Tensor:
        """The tensor, unread; reading it reads its pieces and no more.

        Args:
            stored: parameters by path, to be indexed by a layer or by `...`.
            dtypes: by path; a fused tensor gets the one that holds all its parts.

        Raises:
            CheckpointError: on reading, when a narrower dtype does not hold a value.
        """
        dtype = widest(dtypes[piece.path] for piece in self.pieces)

        def read() -> np.ndarray:
            arrays = [
                piece.layout.invert(
                    np.asarray(
                        stored[piece.path][... if piece.layer is None else piece.layer]
                    )
                )
                for piece in self.pieces
            ]
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            return self._narrowed(array, dtype)

        return Tensor(self.shape, dtype, read)

    def _narrowed(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        made = cast(array, dtype)
        if np.can_cast(array.dtype, dtype, "safe"):
            return made
        if not np.array_equal(cast(made, array.dtype), array):
            raise CheckpointError(
                f"{self.name}: {array.dtype} values that {dtype} does not hold, though "
                "manifest.json says they came from it; convert the model again"
            )
        return made


def origins(
    rules: Iterable[Rule | Drop],
    wanted: Mapping[str, Shape],
    steps: Mapping[str, int] = {},
) -> list[Origin]:
    """The tensors that a table would read to fill exactly these parameters.

    Args:
        wanted: shapes by path, for a fused tensor of all its parts (see `sisters`).
        steps: distance of two layers' numbers, for paths that begin so; else 1.

    Raises:
        CheckpointError: listing parameters that the table has no name for.
    """
    rules = tuple(rules)
    known = {rule.path for rule in rules if isinstance(rule, Rule)}
    if nameless := [path for path in wanted if path not in known]:
        raise CheckpointError(
            f"the reference has no name for {len(nameless)} parameters, so its model is "
            f"another one: {', '.join(nameless)}"
        )
    pieces: dict[str, list[Piece]] = {}
    for rule in rules:
        if isinstance(rule, Drop) or rule.path not in wanted:
            continue
        step = next((n for path, n in steps.items() if rule.path.startswith(path)), 1)
        stacked = LAYER in rule.pattern
        for layer in range(wanted[rule.path][0]) if stacked else (None,):
            name = spelled(rule.pattern, None if layer is None else step * layer)
            pieces.setdefault(name, []).append(Piece(rule.path, layer, rule.layout))
    made = [_joined(name, found, wanted) for name, found in pieces.items()]
    plan(rules, {origin.name: origin for origin in made}, wanted)  # and so back again
    return made


def sisters(rules: Iterable[Rule | Drop], paths: Iterable[str]) -> set[str]:
    """These paths and those that share a tensor of the source with them."""
    rules = tuple(rule for rule in rules if isinstance(rule, Rule))
    paths = set(paths)
    patterns = {rule.pattern for rule in rules if rule.path in paths}
    return paths | {rule.path for rule in rules if rule.pattern in patterns}


def spelled(pattern: str, number: int | None) -> str:
    """The name that a rule's pattern matches, with every optional prefix, at a layer."""
    name = OPTIONAL.sub(r"\1", pattern)
    if number is not None:
        name = name.replace(LAYER, str(number))
    name = name.replace(r"\.", ".")
    assert re.fullmatch(pattern, name), f"{pattern} does not spell one name"
    return name


def _joined(name: str, pieces: Iterable[Piece], wanted: Mapping[str, Shape]) -> Origin:
    """The tensor of all its parts; its shape is what their layouts read."""
    pieces = tuple(sorted(pieces, key=lambda piece: piece.layout.index))
    first = pieces[0]
    assert [p.layout.index for p in pieces] == list(range(first.layout.parts)), name
    shape = wanted[first.path][0 if first.layer is None else 1 :]
    return Origin(name, first.layout.source_shape(shape), pieces)
