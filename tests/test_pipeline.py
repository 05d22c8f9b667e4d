"""Rows, their order, and that both follow from the seed and the index alone."""

import itertools

import numpy as np
import pytest

from minigpt4_jax.data import demo_texts, pipeline
from minigpt4_jax.data.prompts import CHATML
from minigpt4_jax.errors import ConfigError, DataError
from minigpt4_jax.models import layers
from tests import tiny
from tests.training import captions, config

SLOTS = tiny.CONFIG.num_slots
# Prompts of 1 BOS, 2 slots, and a word of their own; answers of 3, 2 and 4 tokens.
TURNS = [
    ([1, 9, 9, 20], [False, True, True, False], [30, 31, 2]),
    ([1, 9, 9, 21], [False, True, True, False], [40, 2]),
    ([1, 9, 9, 22], [False, True, True, False], [50, 51, 52, 2]),
]


# One row.


def test_a_segment_id_means_the_same_to_rows_and_to_the_mask():
    assert pipeline.BRANCHES == layers.BRANCHES


def test_turns_share_the_image_and_go_on_from_it_as_branches():
    row = pipeline.pack(TURNS, length=14, answer_length=10)
    b = pipeline.BRANCHES
    assert row["ids_T"].tolist() == [
        *(1, 9, 9),  # once
        *(20, 30, 31),  # an answer's last token is predicted, not read
        *(21, 40),
        *(22, 50, 51, 52),
        *(0, 0),
    ]
    assert row["slots_T"].tolist() == [False, True, True] + 11 * [False]
    assert row["segments_T"].tolist() == (
        3 * [b] + 3 * [b + 1] + 2 * [b + 2] + 4 * [b + 3] + 2 * [0]
    )
    assert row["positions_T"].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5, 6, 0, 0]
    assert row["answer_ids_A"].tolist() == [30, 31, 2, 40, 2, 50, 51, 52, 2, 0]
    assert row["answer_from_A"].tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 0]
    assert row["loss_mask_A"].tolist() == 9 * [1] + [0]


def test_captions_without_a_prompt_are_all_predicted_from_the_last_slot():
    turns = [([1, 9], [False, True], [30, 2]), ([1, 9], [False, True], [40, 41, 2])]
    row = pipeline.pack(turns, length=6, answer_length=5)
    assert row["ids_T"].tolist() == [1, 9, 30, 40, 41, 0]
    assert row["answer_from_A"].tolist() == [1, 2, 1, 3, 4]


@pytest.mark.parametrize(
    "length, answer_length, answers",
    [
        (12, 9, [30, 31, 2, 50, 51, 52, 2, 40, 2]),  # just fits
        (11, 9, [30, 31, 2, 50, 51, 52, 2]),
        (12, 8, [30, 31, 2, 50, 51, 52, 2]),
        (9, 9, [30, 31, 2, 40, 2]),  # the second does not fit, the third does
        (12, 6, [30, 31, 2, 40, 2]),
    ],
)
def test_a_turn_that_does_not_fit_is_left_out(length, answer_length, answers):
    turns = [TURNS[0], TURNS[2], TURNS[1]]
    assert answered(pipeline.pack(turns, length, answer_length)) == answers


def test_the_first_answer_is_cut_where_the_row_or_the_answers_end():
    assert answered(pipeline.pack(TURNS[2:], length=5, answer_length=9)) == [50, 51]
    assert answered(pipeline.pack(TURNS[2:], length=9, answer_length=3)) == [50, 51, 52]


def answered(row) -> list[int]:
    return row["answer_ids_A"][row["loss_mask_A"] == 1].tolist()


def test_a_prompt_without_room_for_an_answer_is_refused():
    with pytest.raises(DataError, match="prompt of 4 tokens .* config.row.tokens"):
        pipeline.pack(TURNS, length=4, answer_length=9)
    with pytest.raises(DataError, match="prompt of 4 tokens"):  # shared part fits
        pipeline.pack(TURNS, length=3, answer_length=9)


def test_turns_that_differ_before_the_image_ends_are_refused():
    other = ([1, 8, 9, 20], [False, True, True, False], [30])
    with pytest.raises(DataError, match="differ before the image ends"):
        pipeline.pack([TURNS[0], other], length=20, answer_length=9)


# Texts.


def test_stage_1_has_an_image_before_each_caption_and_nothing_else():
    tokenizer = tiny.tokenizer()
    texts = pipeline.caption_texts(tokenizer, SLOTS)
    turns = texts(captions(0), np.random.default_rng(0))
    assert sorted(tokenizer.decode(answer) for _, _, answer in turns) == sorted(
        caption + "\n" for caption in captions(0)
    )
    for ids, slots, _ in turns:
        assert ids[0] == tiny.CONFIG.bos_id
        assert slots == [False] + SLOTS * [True]


def test_stage_2_describes_in_so_many_rows_and_asks_in_the_others():
    tokenizer = tiny.tokenizer()
    for share, questions in ((1.0, 1), (0.0, 2)):
        texts = pipeline.dialogue_texts(tokenizer, SLOTS, CHATML, share)
        turns = texts(captions(0), np.random.default_rng(1))
        prompts = {tokenizer.decode(ids[1 + SLOTS :]) for ids, _, _ in turns}
        assert len(prompts) >= questions
        assert all(answer[-1] == tiny.CONFIG.eos_ids[0] for _, _, answer in turns)
    answers = {tokenizer.decode(answer) for _, _, answer in turns}
    derived = {
        answer
        for make in (
            demo_texts.one_sentence,
            demo_texts.in_detail,
            demo_texts.short_questions,
        )
        for seed in range(20)
        for _, answer in make(captions(0), np.random.default_rng(seed))
    }
    assert answers <= derived


# Order.


def test_every_epoch_shows_each_example_once_in_an_order_of_its_own():
    rows = [row for step in range(7) for row in pipeline.order(5, 14, 4, step)]
    for epoch in (0, 1):
        shown = [i for e, i in rows if e == epoch]
        assert sorted(shown) == list(range(14))
    first, second = ([i for e, i in rows if e == epoch] for epoch in (0, 1))
    assert first != second != list(range(14)) != first
    assert first != [i for _, i in pipeline.order(6, 14, 14, 0)]  # another seed


def test_the_order_does_not_depend_on_how_rows_are_split_into_steps():
    one_by_one = [pipeline.order(5, 14, 1, step)[0] for step in range(60)]
    for batch_size in (3, 4, 20, 30):
        steps = [pipeline.order(5, 14, batch_size, s) for s in range(60 // batch_size)]
        assert [row for rows in steps for row in rows] == one_by_one[
            : len(steps) * batch_size
        ]


def batches(kind, batch_size=3, start=0, count=5):
    texts = {
        "captions": pipeline.caption_texts(tiny.tokenizer(), SLOTS),
        "dialogues": pipeline.dialogue_texts(tiny.tokenizer(), SLOTS, CHATML, 0.5),
    }[kind]
    patches = np.arange(7 * 2 * 3).reshape(7, 2, 3).astype(np.float16)
    made = pipeline.caption_batches(
        [captions(i) for i in range(7)],
        patches,
        texts,
        seed=4,
        batch_size=batch_size,
        row=config("unused").row,
        start=start,
    )
    return list(itertools.islice(made, count))


@pytest.mark.parametrize("kind", ["captions", "dialogues"])
def test_a_row_is_a_function_of_seed_epoch_and_example(kind):
    straight = batches(kind)
    again = batches(kind, start=2, count=3)
    for batch, same in zip(straight[2:], again, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], same[name], err_msg=name)
    other_size = batches(kind, batch_size=5, count=3)
    for name in straight[0]:
        np.testing.assert_array_equal(
            np.concatenate([b[name] for b in straight]),
            np.concatenate([b[name] for b in other_size]),
            err_msg=name,
        )
    one_epoch, next_epoch = batches(kind, batch_size=7, count=2)
    assert rows_by_photo(one_epoch) != rows_by_photo(next_epoch)  # drawn anew


def rows_by_photo(batch) -> list[list[int]]:
    order = np.argsort(batch["patches_BPE"][:, 0, 0])
    return batch["ids_BT"][order].tolist()


def test_a_row_comes_with_the_patches_of_its_photo():
    for batch in batches("captions"):
        for ids_T, patches_PE in zip(batch["ids_BT"], batch["patches_BPE"]):
            photo = int(patches_PE[0, 0]) // 6
            text = tiny.tokenizer().decode(ids_T.tolist())
            who = captions(photo)[0].split()[1]
            assert f"One {who}" in text
        assert batch["patches_BPE"].dtype == np.float32


# The warm start.


def test_words_are_counted_once_a_caption():
    tokenizer = tiny.tokenizer()
    texts = [["aab", "ab", "xb"], ["b"]]
    words_V, share_V = pipeline.vocabulary(texts, tokenizer, least=2)
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    found = dict(zip(words_V.tolist(), share_V.tolist(), strict=True))
    assert found == {a: 0.5, b: 3.5 / 4}  # in all four: kept off 1
    with pytest.raises(ConfigError, match="no token is in 5 captions"):
        pipeline.vocabulary(texts, tokenizer, least=5)


def test_targets_are_shares_of_a_photos_own_captions():
    tokenizer = tiny.tokenizer()
    texts = [["aab", "ab", "xb", "x"], ["b"]]
    words_V, share_V = pipeline.vocabulary(texts, tokenizer, least=2)
    made = pipeline.word_batches(
        texts,
        np.arange(2.0).reshape(2, 1, 1),
        tokenizer,
        words_V,
        share_V,
        seed=0,
        batch_size=2,
    )
    batch = next(made)
    a, b, x = (words_V.tolist().index(tokenizer.encode(c)[0]) for c in "abx")
    for patches_PE, target_V in zip(batch["patches_BPE"], batch["target_BV"]):
        want = (
            {a: 0.5, b: 0.75, x: 0.5} if patches_PE[0, 0] == 0 else {a: 0, b: 1, x: 0}
        )
        assert {i: target_V[i] for i in want} == want
    np.testing.assert_array_equal(batch["words_V"], words_V)
