"""Pieces and rows: what turns share is read once, and several examples share a row."""

import time

import numpy as np
import pytest

from minigpt4_jax.data import rows
from minigpt4_jax.data.rows import BRANCHES, RowSizes
from minigpt4_jax.errors import DataError
from minigpt4_jax.models import layers
from tests import batches, tiny

# Prompts of 1 BOS, 2 slots, and a word of their own; answers of 3, 2 and 4 tokens.
TURNS = [
    ([1, 9, 9, 20], [False, True, True, False], [30, 31, 2]),
    ([1, 9, 9, 21], [False, True, True, False], [40, 2]),
    ([1, 9, 9, 22], [False, True, True, False], [50, 51, 52, 2]),
]


# One example.


def test_a_segment_id_means_the_same_to_rows_and_to_the_mask():
    assert BRANCHES == layers.BRANCHES


def test_turns_share_the_image_and_go_on_from_it_as_branches():
    piece = rows.encode(TURNS, tokens=14, answers=10)
    ids, branches, positions, slots = piece.tokens_4T.tolist()
    assert ids == [
        *(1, 9, 9),  # once
        *(20, 30, 31),  # an answer's last token is predicted, not read
        *(21, 40),
        *(22, 50, 51, 52),
    ]
    assert branches == 3 * [0] + 3 * [1] + 2 * [2] + 4 * [3]
    assert positions == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5, 6]
    assert slots == [-1, 0, 1] + 9 * [-1]
    assert piece.answers_2A.tolist() == [
        [30, 31, 2, 40, 2, 50, 51, 52, 2],
        [3, 4, 5, 6, 7, 8, 9, 10, 11],
    ]


def test_captions_without_a_prompt_are_all_predicted_from_the_last_slot():
    turns = [([1, 9], [False, True], [30, 2]), ([1, 9], [False, True], [40, 41, 2])]
    piece = rows.encode(turns, tokens=6, answers=5)
    assert piece.tokens_4T[0].tolist() == [1, 9, 30, 40, 41]
    assert piece.answers_2A[1].tolist() == [1, 2, 1, 3, 4]


@pytest.mark.parametrize(
    "tokens, answers, answered",
    [
        (12, 9, [30, 31, 2, 50, 51, 52, 2, 40, 2]),  # just fits
        (11, 9, [30, 31, 2, 50, 51, 52, 2]),
        (12, 8, [30, 31, 2, 50, 51, 52, 2]),
        (9, 9, [30, 31, 2, 40, 2]),  # the second does not fit, the third does
        (12, 6, [30, 31, 2, 40, 2]),
    ],
)
def test_a_turn_that_does_not_fit_is_left_out(tokens, answers, answered):
    piece = rows.encode([TURNS[0], TURNS[2], TURNS[1]], tokens, answers)
    assert piece.answers_2A[0].tolist() == answered
    assert piece.tokens_4T.shape[1] <= tokens


@pytest.mark.parametrize("tokens, answers", [(5, 9), (9, 2)])
def test_the_first_answer_is_cut_where_the_tokens_or_the_answers_end(tokens, answers):
    piece = rows.encode(TURNS[2:], tokens, answers)
    assert piece.answers_2A.tolist() == [[50, 51], [3, 4]]
    assert piece.tokens_4T[0].tolist() == [1, 9, 9, 22, 50]


def test_an_example_has_no_more_turns_than_there_are_branches():
    piece = rows.encode(300 * TURNS[:1], tokens=2000, answers=2000)
    assert piece.tokens_4T[1].max() == BRANCHES - 1
    assert len(piece.answers_2A[0]) == 3 * (BRANCHES - 1)


def test_a_prompt_without_room_for_an_answer_is_refused():
    for tokens in (4, 3):  # the shared part fits into 3
        with pytest.raises(DataError, match="prompt of 4 tokens .* config.row.tokens"):
            rows.encode(TURNS, tokens, answers=9)


def test_turns_that_differ_before_the_image_ends_are_refused():
    other = ([1, 8, 9, 20], [False, True, True, False], [30])
    with pytest.raises(DataError, match="differ before the image ends"):
        rows.encode([TURNS[0], other], tokens=20, answers=9)


# A batch.


def pieces(count: int, tokens: int = 40, answers: int = 30) -> tuple[list, list]:
    turns = [batches.random_turns(i, (i % 5 + 1, 3)) for i in range(count)]
    return turns, [rows.encode(example, tokens, answers) for example in turns]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_laid_out_as_plainly_as_in_the_tests_of_the_loss(packed):
    turns, made = pieces(7)
    sizes = RowSizes(rows=3 if packed else 7, tokens=43, answers=31, padding=0.0)
    row_B = list(range(7))
    if packed:
        row_B = rows.share_out(rows.lengths(made)[None], 3)[0].tolist()
        assert max(row_B.count(row) for row in row_B) > 2
    got = rows.lay_out(made, sizes, tiny.CONFIG.num_slots, np.array(row_B))
    want = batches.lay_out(turns, sizes.tokens, sizes.answers, row_B, sizes.rows)
    del want["ok_B"]
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        assert got[name].dtype == want[name].dtype, name


def test_examples_of_a_row_see_nothing_of_each_other():
    _, made = pieces(7)
    row_B = rows.share_out(rows.lengths(made)[None], 3)[0]
    batch = rows.lay_out(made, RowSizes(3, 43, 31, 0.0), 3, row_B)
    segments, positions = batch["segments_RT"], batch["positions_RT"]
    mask_RTS = np.asarray(
        layers.attention_mask(segments, positions, segments, positions)
    )
    other_RTS = segments[:, :, None] // BRANCHES != segments[:, None, :] // BRANCHES
    assert not mask_RTS[other_RTS].any() and mask_RTS.any()
    # Positions begin anew: each example is as it would be alone in a row.
    for number in range(1, 4):
        own = segments // BRANCHES == number
        assert set(positions[own & (segments % BRANCHES == 0)].tolist()) >= {0, 1}


# Packing.


def test_rows_share_the_examples_of_a_step_about_equally():
    lengths_SB = np.random.default_rng(0).integers(38, 64, (5, 64))
    rows_SB = rows.share_out(lengths_SB, 7)
    for lengths_B, rows_B in zip(lengths_SB, rows_SB):
        full_R = np.bincount(rows_B, lengths_B)
        assert full_R.sum() == lengths_B.sum() and len(full_R) == 7
        assert full_R.max() - full_R.min() <= lengths_B.max()
    alone_B = rows.share_out(lengths_SB[3:4], 7)[0]
    np.testing.assert_array_equal(alone_B, rows_SB[3])


def test_each_part_of_the_rows_gets_as_many_examples():
    lengths_SB = np.random.default_rng(0).integers(38, 64, (5, 48))
    rows_SB = rows.share_out(lengths_SB, 8, parts=4)
    for lengths_B, rows_B in zip(lengths_SB, rows_SB):
        assert np.bincount(rows_B // 2).tolist() == [12] * 4
        full_R = np.bincount(rows_B, lengths_B)
        assert full_R.max() - full_R.min() <= lengths_B.max()


def test_the_sizes_hold_every_step_and_no_shorter_row_would():
    rng = np.random.default_rng(1)
    answers_SB = rng.integers(3, 20, (9, 24))
    tokens_SB = answers_SB + 11
    sizes = rows.row_sizes(tokens_SB, answers_SB, packed=130, multiple=2)
    assert sizes.rows % 2 == 0 and sizes.tokens % 8 == 0 and sizes.tokens <= 130
    fullest, answers = 0, 0
    for tokens_B, answers_B in zip(tokens_SB, answers_SB):
        rows_B = rows.share_out(tokens_B[None], sizes.rows, sizes.parts)[0]
        fullest = max(fullest, np.bincount(rows_B, tokens_B).max())
        answers = max(answers, np.bincount(rows_B, answers_B).max())
    assert fullest <= sizes.tokens < fullest + 8
    assert answers == sizes.answers
    used = tokens_SB.sum() / (9 * sizes.rows * sizes.tokens)
    assert sizes.padding == pytest.approx(1 - used)


def test_without_packing_each_example_has_a_row_as_long_as_the_longest():
    sizes = rows.row_sizes(
        np.array([[5, 9], [7, 3]]), np.array([[2, 6], [1, 2]]), packed=0
    )
    assert sizes == RowSizes(rows=2, tokens=9, answers=6, padding=1 - 24 / 36)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="example of 9 tokens .* row of 8"):
        rows.row_sizes(np.array([[5, 9]]), np.array([[2, 6]]), packed=8)


@pytest.mark.parametrize("packed, multiple", [(512, 1), (512, 8), (1024, 4)])
def test_padding_is_under_5_percent_at_the_lengths_of_stage_1(packed, multiple):
    """33 tokens of BOS and image, captions of about 12 and their end, at most 32 of
    these; the reference's batch."""
    answers_SB = stage_1_answers(steps=1_000)
    sizes = rows.row_sizes(
        32 + answers_SB, answers_SB, packed=packed, multiple=multiple
    )
    assert sizes.padding < 0.05
    apart = rows.row_sizes(32 + answers_SB, answers_SB, packed=0)
    assert apart.padding > 0.2


def stage_1_answers(steps: int) -> np.ndarray:
    drawn = np.random.default_rng(0).gamma(12, 1.0, (steps, 256))
    return np.clip(drawn.round().astype(int), 2, 31) + 1


def test_the_sizes_of_a_whole_stage_1_are_found_in_seconds():
    answers_SB = stage_1_answers(steps=2_000)
    began = time.process_time()
    rows.row_sizes(32 + answers_SB, answers_SB, packed=512, multiple=8)
    assert time.process_time() - began < 5  # of its 20,000 steps: ten times that
