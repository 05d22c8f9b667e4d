"""Rows of a training batch: turns about an image -> a piece; pieces -> arrays of one shape.

A piece is one example: what its prompts share once, then a branch for each turn
(attention_mask in models/layers.py). A row holds one piece, or, packed, as many as fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minigpt4_jax.errors import DataError

BRANCHES = 256  # as in models/layers.py; a test holds them equal
CHUNK = 512  # steps worked on at a time
TRIALS = 3  # numbers of rows to choose from
ALIGNED = 8  # a packed row's length is a multiple: matrix units work in such tiles
Turn = tuple[list[int], list[bool], list[int]]  # ids and slots of a prompt, answer ids


@dataclass(frozen=True)
class Piece:
    """One example.

    tokens_4T: id, branch, position and slot (which image embedding, -1: none) of each.
    answers_2A: ids to be predicted, and from which of the tokens T.
    """

    tokens_4T: np.ndarray
    answers_2A: np.ndarray


@dataclass(frozen=True)
class RowSizes:
    """The one shape that every step of a run fits in."""

    rows: int
    tokens: int
    answers: int
    padding: float  # share of the tokens, over all steps
    parts: int = 1  # of a packed batch, each with rows and examples of its own


def encode(turns: Sequence[Turn], tokens: int, answers: int) -> Piece:
    """A piece of at most so many tokens and answer tokens.

    The longest common beginning of the prompts, which must hold all slots, is read once;
    each turn goes on from it as a branch that sees no other. A turn that no longer fits
    is left out, the first one is cut; so are those beyond the branches that there are.
    """
    assert turns
    turns = turns[: BRANCHES - 1]
    ids, slots, _ = turns[0]
    if len(ids) >= tokens:
        raise DataError(
            f"a prompt of {len(ids)} tokens leaves no room for an answer among "
            f"{tokens}; raise config.row.tokens"
        )
    shared = _common(turns)
    if any(any(slots[shared:]) for _, slots, _ in turns):
        raise DataError("turns of a row differ before the image ends; cannot share it")
    read, branches, positions = list(ids[:shared]), [0] * shared, list(range(shared))
    answer_ids: list[int] = []
    answer_from: list[int] = []
    for branch, (ids, _, answer) in enumerate(turns, start=1):
        own, at = ids[shared:], len(read)
        room = tokens - at - len(own) + 1  # an answer's last token is not read
        left = answers - len(answer_ids)
        if branch > 1 and len(answer) > min(room, left):
            continue
        answer = answer[: min(room, left)]
        read += own
        read += answer[:-1]
        length = len(read) - at
        branches += [branch] * length
        positions += range(shared, shared + length)
        answer_ids += answer
        # The first token after what is shared is predicted from the last shared one.
        answer_from += [shared - 1, *range(at, at + length)][len(own) :]
    slot = np.full(len(read), -1)
    places = np.flatnonzero(slots[:shared])
    slot[places] = np.arange(len(places))
    return Piece(
        np.array([read, branches, positions, slot], np.int32),
        np.array([answer_ids, answer_from], np.int32),
    )


def lay_out(
    pieces: Sequence[Piece], sizes: RowSizes, num_slots: int, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Arrays of `sizes.rows` rows R of T tokens and A answer tokens.

    Args:
        rows: the row of each piece.

    Returns:
        ids_RT, segments_RT, positions_RT; slots_RT: b * num_slots + q of the image
        embedding that stands here, -1: none; answer_ids_RA: tokens to be predicted;
        answer_from_RA: the places T whose output predicts them; loss_mask_RA: which of
        them count; example_RA: b that they are of.
    """
    tokens_5RT = np.zeros((5, sizes.rows, sizes.tokens), np.int32)
    tokens_5RT[3] = -1
    answers_3RA = np.zeros((3, sizes.rows, sizes.answers), np.int32)
    mask_RA = np.zeros((sizes.rows, sizes.answers), np.float32)
    ends = np.zeros((3, sizes.rows), int).tolist()  # tokens, answers, examples so far
    for b, (piece, row) in enumerate(zip(pieces, rows.tolist(), strict=True)):
        at, answered, number = (end[row] for end in ends)
        end = at + piece.tokens_4T.shape[1]
        tokens_5RT[:4, row, at:end] = piece.tokens_4T
        tokens_5RT[1, row, at:end] += (number + 1) * BRANCHES
        tokens_5RT[4, row, at:end] = b * num_slots
        last = answered + piece.answers_2A.shape[1]
        answers_3RA[:2, row, answered:last] = piece.answers_2A
        answers_3RA[1, row, answered:last] += at
        answers_3RA[2, row, answered:last] = b
        mask_RA[row, answered:last] = 1
        ends[0][row], ends[1][row], ends[2][row] = end, last, number + 1
    ids_RT, segments_RT, positions_RT, slot_RT, first_RT = tokens_5RT
    return {
        "ids_RT": ids_RT,
        "segments_RT": segments_RT,
        "positions_RT": positions_RT,
        "slots_RT": np.where(slot_RT < 0, -1, slot_RT + first_RT),
        "answer_ids_RA": answers_3RA[0],
        "answer_from_RA": answers_3RA[1],
        "loss_mask_RA": mask_RA,
        "example_RA": answers_3RA[2],
    }


def lengths(pieces: Sequence[Piece]) -> np.ndarray:
    """Tokens of each piece."""
    return np.array([piece.tokens_4T.shape[1] for piece in pieces])


def share_out(lengths_SB: np.ndarray, rows: int, parts: int = 1) -> np.ndarray:
    """The row of each example, int64 [S B], for each step S apart.

    The longest first, each into the row that is emptiest: rows come out as good as equal
    in length, which is what a fixed number of them needs.

    Args:
        parts: as many equal groups of neighbouring rows; each gets as many examples, so
            that the images of a group can lie where its rows do.
    """
    steps = np.arange(len(lengths_SB))
    full_SR = np.zeros((len(steps), rows), int)
    left_SG = np.full((len(steps), parts), lengths_SB.shape[1] // parts)
    rows_SB = np.empty(lengths_SB.shape, np.int64)
    for example_S in np.argsort(-lengths_SB, axis=1, kind="stable").T:
        open_SR = np.repeat(left_SG > 0, rows // parts, axis=1)
        row_S = np.where(open_SR, full_SR, np.iinfo(int).max).argmin(axis=1)
        left_SG[steps, row_S // (rows // parts)] -= 1
        full_SR[steps, row_S] += lengths_SB[steps, example_S]
        rows_SB[steps, example_S] = row_S
    return rows_SB


def row_sizes(
    tokens_SB: np.ndarray, answers_SB: np.ndarray, *, packed: int, multiple: int = 1
) -> RowSizes:
    """The smallest shape that holds every step S.

    Args:
        tokens_SB, answers_SB: how many tokens and answer tokens each example has.
        packed: most tokens of a row that several examples share; 0: a row each.
        multiple: parts that the rows, and with them the examples, are split into.
    """
    most = int(tokens_SB.max())
    if most > packed > 0:
        raise DataError(
            f"an example of {most} tokens does not fit into a row of {packed}; raise "
            "config.row.packed or lower config.row.tokens"
        )
    if packed:
        rows, tokens, answers = _packed_sizes(tokens_SB, answers_SB, packed, multiple)
    else:
        rows, tokens, answers = tokens_SB.shape[1], most, int(answers_SB.max())
    used = float(tokens_SB.mean(dtype=float)) * tokens_SB.shape[1]
    padding = 1 - used / (rows * tokens)
    return RowSizes(rows, tokens, answers, padding, multiple if packed else 1)


def _packed_sizes(
    tokens_SB: np.ndarray, answers_SB: np.ndarray, packed: int, multiple: int
) -> tuple[int, int, int]:
    """Rows, and the tokens and answer tokens of the fullest row.

    As few rows as `packed` tokens allow, or some more where these are so much shorter
    that fewer tokens are padding.
    """
    found: list[tuple[int, int, int]] = []
    fewest = -(-int(tokens_SB.sum(axis=1).max()) // packed)
    rows = -(-fewest // multiple) * multiple
    while len(found) < TRIALS:
        tokens, answers = _fullest(tokens_SB, answers_SB, rows, multiple)
        if tokens <= packed:
            found.append((rows, min(-(-tokens // ALIGNED) * ALIGNED, packed), answers))
        rows += multiple
    return min(found, key=lambda sizes: sizes[0] * sizes[1])


def _fullest(
    tokens_SB: np.ndarray, answers_SB: np.ndarray, rows: int, parts: int
) -> tuple[int, int]:
    """Most tokens, and most answer tokens, of any row of any step."""
    tokens = answers = 0
    for i in range(0, len(tokens_SB), CHUNK):
        part = slice(i, i + CHUNK)
        rows_SB = share_out(tokens_SB[part], rows, parts)
        tokens = max(tokens, _most(tokens_SB[part], rows_SB, rows))
        answers = max(answers, _most(answers_SB[part], rows_SB, rows))
    return tokens, answers


def _most(lengths_SB: np.ndarray, rows_SB: np.ndarray, rows: int) -> int:
    """The largest sum of the lengths in one row."""
    steps = np.arange(len(lengths_SB))[:, None]
    sums = np.bincount((steps * rows + rows_SB).ravel(), lengths_SB.ravel())
    return int(sums.max())


def _common(turns: Sequence[Turn]) -> int:
    """Length of the longest beginning that all prompts share."""
    ids, slots, _ = turns[0]
    if all(turn[0] == ids and turn[1] == slots for turn in turns[1:]):
        return len(ids)  # the usual case, and much quicker than the loop
    length = 0
    for entries in zip(*(zip(ids, slots) for ids, slots, _ in turns), strict=False):
        if any(entry != entries[0] for entry in entries):
            break
        length += 1
    return length
