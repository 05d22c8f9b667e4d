"""Rows in the slots of one running batch, whose shape follows them in few steps.

A row is any object; its arrays come in and go out as a `Decoding` of one row. The
batch grows and shrinks by moving rows one at a time, so that each shape costs three
small programs and no pair of shapes one of its own.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from minigpt4_jax import decoding, sampling
from minigpt4_jax.decoding import Decoding, Programs
from minigpt4_jax.models.llama import Cache

LEAST_PLACES = 128


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Which shapes of batches are compiled.

    slots: rows at most.
    chunk: forward passes between two looks of the host.
    drafts: tokens guessed in each, 0 for none.
    places: None: 128, 256, 512, ... as the longest row needs, for 1, 4, 16, ... rows. A
        number: always `slots` rows that hold so many tokens, however few there are.
    """

    slots: int
    chunk: int
    drafts: int = 0
    places: int | None = None

    def width(self, rows: int) -> int:
        return next(w for w in self.widths if w >= rows)

    @property
    def widths(self) -> tuple[int, ...]:
        if self.places is not None:
            return (self.slots,)
        small = [4**i for i in range(self.slots.bit_length()) if 4**i < self.slots]
        return (*small, self.slots)

    def searches(self, beams: int) -> int:
        """Beam searches that run together."""
        return max(1, self.slots // beams)

    def room(self, tokens: int) -> int:
        """Places of a batch whose longest row needs `tokens`."""
        if self.places is None:
            return bucket(tokens, LEAST_PLACES)
        # Behind the last token a piece of a prompt is padded, and drafts are checked.
        return self.places + LEAST_PLACES + self.drafts

    def rooms(self, tokens: int) -> list[int]:
        """All sizes up to that of `tokens`."""
        sizes = [self.room(LEAST_PLACES)]
        while self.places is None and sizes[-1] < tokens:
            sizes.append(2 * sizes[-1])
        return sizes


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that holds `size` and `least`."""
    return 1 << (max(size, least, 1) - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Empty:
    """Makes batches of spare rows.

    ends: end tokens that a row has room for.
    """

    programs: Programs
    weights: Any
    ends: int
    width: int
    vocabulary: int

    def __call__(self, rows: int, places: int, cache: Cache | None = None) -> Decoding:
        """So many rows; a cache can be given."""
        if cache is None:
            cache = self.programs.new_cache(self.weights, batch=rows, places=places)
        return decoding.start(
            cache,
            np.zeros((rows, places), np.int32),
            np.zeros((rows, self.width), np.float32),
            np.full((rows, self.ends), -1, np.int32),
            np.zeros(rows, np.int32),
            sampling.controls([], rows, self.vocabulary),
        )


class Pool:
    """The batch: `rows[b]` is in slot b, None where that is free.

    Attributes:
        state: their arrays; None before the first row.
    """

    def __init__(self, programs: Programs, weights, shapes: Shapes, empty: Empty):
        self.programs = programs
        self.weights = weights
        self.shapes = shapes
        self.empty = empty
        self.rows: list[Any] = []
        self.state: Decoding | None = None

    @property
    def taken(self) -> list[int]:
        """Slots that hold a row."""
        return [b for b, row in enumerate(self.rows) if row is not None]

    @property
    def places(self) -> int:
        return 0 if self.state is None else self.state.tokens_BS.shape[1]

    def fit(self, width: int, places: int) -> None:
        """Move to a batch of another shape; all rows must fit into it."""
        if self.state is not None and (width, places) == (len(self.rows), self.places):
            return
        moved = [(self.rows[b], self.take(b)) for b in self.taken]
        self.rows = [None] * width
        self.state = self.empty(width, places)
        for row, arrays in moved:
            self.add(row, arrays)

    def add(self, row: Any, arrays: Decoding) -> None:
        """Put a row into a free slot."""
        b = self.rows.index(None)
        arrays = fitted(self.programs, arrays, self.places)
        self.state = self.programs.insert(self.state, arrays, b)
        self.rows[b] = row

    def decode(self, steps: int) -> None:
        """Let the rows grow by `steps` forward passes; free slots stand still."""
        ended_B = np.array([row is None for row in self.rows])
        self.state = self.programs.decode(
            self.weights, self.state, ended_B, steps, drafts=self.shapes.drafts
        )

    def look(self, *, tops: bool) -> tuple[np.ndarray, ...]:
        """On the host, once they are computed: ids_BA, logprobs_BA, count_B.

        tops: also top_ids_BAU and top_logprobs_BAU.
        """
        assert self.state is not None
        state = self.state
        arrays = [state.ids_BA, state.logprobs_BA, state.count_B]
        arrays += [state.top_ids_BAU, state.top_logprobs_BAU] if tops else []
        return jax.device_get(arrays)

    def take(self, b: int) -> Decoding:
        """The arrays of the row in slot b."""
        return self.programs.extract(self.state, b)


def fitted(programs: Programs, row: Decoding, places: int) -> Decoding:
    """The row in so many places, by doubling or halving what it has."""
    while (has := row.tokens_BS.shape[1]) != places:
        row = programs.resize(row, places=has * 2 if has < places else has // 2)
    return row
