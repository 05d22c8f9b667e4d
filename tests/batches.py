"""Batches for the loss, laid out in the plainest way (data/rows.py has the fast one)."""

from collections.abc import Sequence

import numpy as np

from minigpt4_jax.models.layers import BRANCHES
from tests import tiny

Turn = tuple[list[int], list[bool], list[int]]  # ids and slots of a prompt, answer ids


def random_turns(seed: int, lengths: Sequence[int] = (4, 7)) -> list[Turn]:
    """Turns about one image, of so many answer tokens: a start, the image, a word or two."""
    rng = np.random.default_rng(seed)
    num_slots = tiny.CONFIG.num_slots

    def words(count):
        return [int(i) for i in rng.integers(3, tiny.VOCABULARY, count)]

    shared = [1, *words(seed % 3)]
    slots = [False] * len(shared) + [True] * num_slots
    turns = []
    for i, length in enumerate(lengths):
        own = words(i)
        turns.append(
            (
                [*shared, *[0] * num_slots, *own],
                [*slots, *[False] * len(own)],
                words(length),
            )
        )
    return turns


def lay_out(
    examples: Sequence[Sequence[Turn]],
    tokens: int,
    answers: int,
    rows: Sequence[int] | None = None,
    num_rows: int = 0,
) -> dict:
    """The arrays that MiniGPT4.loss wants, but for the images.

    Args:
        tokens, answers: lengths T and A of a row.
        rows: the row of each example (default: one each).
        num_rows: default as many as are used; more are padding.
    """
    rows = range(len(examples)) if rows is None else rows
    count = max(num_rows, max(rows) + 1)
    batch = {
        "ids_RT": np.zeros((count, tokens), np.int32),
        "segments_RT": np.zeros((count, tokens), np.int32),
        "positions_RT": np.zeros((count, tokens), np.int32),
        "slots_RT": np.full((count, tokens), -1, np.int32),
        "answer_ids_RA": np.zeros((count, answers), np.int32),
        "answer_from_RA": np.zeros((count, answers), np.int32),
        "loss_mask_RA": np.zeros((count, answers), np.float32),
        "example_RA": np.zeros((count, answers), np.int32),
        "ok_B": np.ones(len(examples), np.float32),
    }
    ends = [[0, 0, 0] for _ in range(count)]  # tokens, answers, examples of a row
    for b, (turns, row) in enumerate(zip(examples, rows)):
        _add(batch, b, turns, row, ends[row])
    return batch


def _add(batch: dict, b: int, turns: Sequence[Turn], row: int, end: list[int]) -> None:
    shared = max(i for i, slot in enumerate(turns[0][1]) if slot) + 1
    num_slots = sum(turns[0][1])
    end[2] += 1

    def read(token: int, slot: int, branch: int, position: int) -> None:
        t = end[0]
        batch["ids_RT"][row, t] = token
        batch["slots_RT"][row, t] = slot
        batch["segments_RT"][row, t] = end[2] * BRANCHES + branch
        batch["positions_RT"][row, t] = position
        end[0] += 1

    slot = b * num_slots
    for position, (token, is_slot) in enumerate(zip(*turns[0][:2])):
        if position < shared:
            read(token, slot if is_slot else -1, 0, position)
            slot += is_slot
    last_shared = end[0] - 1
    for branch, (ids, _, answer) in enumerate(turns, start=1):
        assert ids[:shared] == turns[0][0][:shared]
        before = last_shared
        own = ids[shared:]
        for i, token in enumerate([*own, *answer]):
            if i >= len(own):
                a = end[1]
                batch["answer_ids_RA"][row, a] = token
                batch["answer_from_RA"][row, a] = before
                batch["loss_mask_RA"][row, a] = 1
                batch["example_RA"][row, a] = b
                end[1] += 1
            if i < len(own) + len(answer) - 1:  # the last one is predicted, not read
                before = end[0]
                read(token, -1, branch, shared + i)
