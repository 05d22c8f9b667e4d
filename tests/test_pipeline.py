"""What a batch is made of, and that it follows from the seed and the index alone."""

import pickle

import cloudpickle
import numpy as np
import pytest

from minigpt4_jax.data import demo_texts, pipeline, texts
from minigpt4_jax.data.pipeline import AnswerArrays, WordArrays
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.prompts import (
    ALIGNMENT_QUESTIONS,
    CHATML,
    LLAMA2,
    VICUNA_V0,
    Special,
    parse_specials,
    training_prompt,
)
from minigpt4_jax.data.tokens import lay_out, load_tokenizer
from minigpt4_jax.errors import ConfigError
from tests import published, tiny
from tests.training import captions

SLOTS = tiny.CONFIG.num_slots
EOS = tiny.CONFIG.eos_ids[0]


class Photos(list):
    """A data set of captions alone."""

    def captions(self, i: int):
        return self[i]


PHOTOS = Photos(captions(i) for i in range(7))
SHORT = Photos([text] for i in range(5) for text in captions(i)[1:2])


# Texts.


@pytest.mark.parametrize(
    "text, clean",
    [
        (  # the fact sheet's example
            'A man, riding a "HORSE" (brown)...  in #NYC! what? it\'s ~10%',
            "a man, riding a horse brown in nyc what? it's 10%",
        ),
        ("  Two\tdogs \t run.\n", "two\tdogs run"),
        ("A; B: C*D", "a b c d"),
        ("word " * 60, ("word " * 50).strip()),
        ("...", ""),
    ],
)
def test_captions_are_cleaned_as_the_reference_does(text, clean):
    assert texts.blip_caption(text) == clean


def drawn(make, what, seed=0):
    return make(what, np.random.default_rng(seed))


def test_stage_1_has_an_image_before_each_caption_and_nothing_else():
    tokenizer = tiny.tokenizer()
    turns = drawn(pipeline.caption_texts(tokenizer, SLOTS), captions(0))
    assert sorted(tokenizer.decode(answer) for _, _, answer in turns) == sorted(
        caption + "\n" for caption in captions(0)
    )
    for ids, slots, _ in turns:
        assert ids[0] == tiny.CONFIG.bos_id
        assert slots == [False] + SLOTS * [True]


def test_one_caption_of_an_image_is_drawn():
    tokenizer = tiny.tokenizer()
    make = pipeline.caption_texts(tokenizer, SLOTS, one=True)
    found = [drawn(make, captions(0), seed) for seed in range(40)]
    assert {len(turns) for turns in found} == {1}
    said = {tokenizer.decode(turns[0][2]) for turns in found}
    assert said == {caption + "\n" for caption in captions(0)}


@pytest.mark.parametrize("limit, kept", [(0, "a dog\n"), (6, "a dog\n"), (4, "a do")])
def test_a_long_answer_is_cut_and_loses_its_end(limit, kept):
    tokenizer = tiny.tokenizer()
    make = pipeline.caption_texts(
        tokenizer, SLOTS, clean=texts.blip_caption, limit=limit
    )
    [(_, _, answer)] = drawn(make, ["A dog."])
    assert tokenizer.decode(answer) == kept


@pytest.mark.parametrize("template", [VICUNA_V0, LLAMA2, CHATML])
def test_stage_2_answers_one_of_four_requests_with_the_caption_as_written(
    template, tmp_path
):
    tokenizer = tiny.tokenizer()
    if template is LLAMA2:
        published.tokenizer(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
    make = pipeline.description_texts(tokenizer, SLOTS, template)
    caption = "The image shows a Dog. It #runs!"
    [end] = parse_specials(template.end, template.specials)
    asked = set()
    for seed in range(60):
        [(ids, slots, answer)] = drawn(make, [caption], seed)
        assert tokenizer.decode(answer).removesuffix("###") == caption
        if isinstance(end, Special):
            assert answer[-1] == tokenizer.special_id(end.name)
        asked.add((tuple(ids), tuple(slots)))
    prompts = [training_prompt(template, question) for question in ALIGNMENT_QUESTIONS]
    requests = [lay_out(prompt, tokenizer, SLOTS) for prompt in prompts]
    assert asked == {(tuple(ids), tuple(slots)) for ids, slots in requests}
    assert len(asked) == 4


def test_the_demo_describes_some_photos_and_asks_about_the_others():
    tokenizer = tiny.tokenizer()
    for share, questions in ((1.0, 1), (0.0, 2)):
        make = pipeline.dialogue_texts(tokenizer, SLOTS, CHATML, share)
        turns = drawn(make, captions(0), seed=1)
        prompts = {tokenizer.decode(ids[1 + SLOTS :]) for ids, _, _ in turns}
        assert len(prompts) == questions if share else len(prompts) >= questions
        assert all(answer[-1] == EOS for _, _, answer in turns)
        assert {tokenizer.decode(answer) for _, _, answer in turns} <= derived()


def derived() -> set[str]:
    """All that can be answered about the first photo."""
    return {
        answer
        for derive in (
            demo_texts.one_sentence,
            demo_texts.in_detail,
            demo_texts.short_questions,
        )
        for seed in range(20)
        for _, answer in derive(captions(0), np.random.default_rng(seed))
    }


# Arrays.


def arrays(kind: str, sources=(PHOTOS, SHORT), seed=4, **knobs) -> AnswerArrays:
    tokenizer = tiny.tokenizer()
    made = {
        "captions": pipeline.caption_texts(tokenizer, SLOTS),
        "dialogues": pipeline.dialogue_texts(tokenizer, SLOTS, CHATML, 0.5),
        "descriptions": pipeline.description_texts(tokenizer, SLOTS, CHATML),
    }[kind]
    knobs = dict(tokens=150, answers=120) | knobs
    return AnswerArrays(sources, made, seed=seed, num_slots=SLOTS, **knobs)


def plan(batch_size: int) -> Plan:
    return Plan([len(PHOTOS), len(SHORT)], [3, 2], seed=4, batch_size=batch_size)


KINDS = ["captions", "dialogues", "descriptions"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_the_same_in_whatever_batch(kind):
    """Alone in its row, it is the same however many others the batch has."""
    make = arrays(kind)
    by_three = [make(step, plan(3).picks(step)) for step in range(5)]
    by_five = [make(step, plan(5).picks(step)) for step in range(3)]
    for name in ("ids_RT", "segments_RT", "answer_ids_RA", "answer_from_RA"):
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in by_three]),
            np.concatenate([batch[name] for batch in by_five]),
            err_msg=name,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_made_again_without_those_before_it(kind):
    first = arrays(kind)
    again = pickle.loads(cloudpickle.dumps(first))  # as for another process
    for step in (3, 0):
        want = first(step, plan(3).picks(step))
        got = again(step, plan(3).picks(step))
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("kind", ["captions", "dialogues"])
def test_texts_are_drawn_anew_in_each_epoch_and_for_each_source_and_seed(kind):
    make = arrays(kind, [PHOTOS, PHOTOS])

    def said(make, source, epoch):
        return [make.piece(source, epoch, i).answers_2A.tolist() for i in range(7)]

    assert said(make, 0, 0) == said(make, 0, 0)
    assert said(make, 0, 0) != said(make, 0, 1)
    assert said(make, 0, 0) != said(make, 1, 0)
    assert said(make, 0, 0) != said(arrays(kind, [PHOTOS, PHOTOS], seed=5), 0, 0)


def test_packed_rows_hold_the_same_examples():
    make = arrays("captions")
    alone = make(2, plan(6).picks(2))
    make.fit(plan(6), range(4), packed=300, multiple=2)
    packed = make(2, plan(6).picks(2))
    assert packed["ids_RT"].shape == (make.sizes.rows, make.sizes.tokens)
    assert make.sizes.rows % 2 == 0 and make.sizes.rows < 6
    assert packed["answer_ids_RA"].shape == (make.sizes.rows, make.sizes.answers)

    def by_example(batch):
        return [
            batch["answer_ids_RA"][
                (batch["example_RA"] == b) & (batch["loss_mask_RA"] == 1)
            ].tolist()
            for b in range(6)
        ]

    order = packed["order_B"]
    assert sorted(order.tolist()) == list(range(6)) != order.tolist()
    said = by_example(alone)
    assert by_example(packed) == [said[b] for b in order]
    # The first three examples in the first half of the rows.
    for row, examples in enumerate(np.split(packed["example_RA"], 2)):
        counts = np.split(packed["loss_mask_RA"], 2)[row] > 0
        assert set(examples[counts].tolist()) == {3 * row, 3 * row + 1, 3 * row + 2}
    slots = np.sort(packed["slots_RT"][packed["slots_RT"] >= 0])
    np.testing.assert_array_equal(slots, np.arange(6 * SLOTS))  # each image once


@pytest.mark.parametrize("limit", [0, 9])
@pytest.mark.parametrize("tokens", [150, 20])
def test_lengths_are_known_from_counts_or_found_by_making_the_texts(limit, tokens):
    tokenizer = tiny.tokenizer()
    knobs = dict(seed=4, num_slots=SLOTS, tokens=tokens, answers=18, limit=limit)
    make_texts = pipeline.caption_texts(
        tokenizer, SLOTS, clean=texts.blip_caption, limit=limit
    )
    sources = [PHOTOS, SHORT]
    made = AnswerArrays(sources, make_texts, **knobs)
    asked = []

    def count(captions, rng):
        asked.append(captions)
        return make_texts(captions, rng)

    counts = [token_counts(source, tokenizer) for source in sources]
    counted = AnswerArrays(sources, count, counts=counts, **knobs)
    for step in range(4):
        for got, want in zip(
            counted.lengths(plan(5).picks(step)), made.lengths(plan(5).picks(step))
        ):
            np.testing.assert_array_equal(got, want)
    assert asked and all(len(captions) > 1 for captions in asked)


def token_counts(source, tokenizer):
    """As Examples.token_counts."""
    clean = texts.WITH_END["blip"]
    counts = [len(tokenizer.encode(clean(text))) for texts in source for text in texts]
    starts = np.cumsum([0, *(len(texts) for texts in source)])
    return starts, np.array(counts, np.int32)


# The warm start.


def test_words_are_counted_once_a_caption():
    tokenizer = tiny.tokenizer()
    sources = [Photos([["aab", "ab", "xb"]]), Photos([["b"]])]
    words_V, share_V = pipeline.vocabulary(sources, tokenizer, least=2)
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    found = dict(zip(words_V.tolist(), share_V.tolist(), strict=True))
    assert found == {a: 0.5, b: 3.5 / 4}  # in all four: kept off 1
    with pytest.raises(ConfigError, match="no token is in 5 captions"):
        pipeline.vocabulary(sources, tokenizer, least=5)


def test_targets_are_shares_of_a_photos_own_captions():
    tokenizer = tiny.tokenizer()
    sources = [Photos([["z"], ["aab", "ab", "xb", "x"]]), Photos([["b"]])]
    words_V, share_V = pipeline.vocabulary(sources, tokenizer, least=2)
    make = WordArrays(sources, tokenizer, words_V, share_V)
    batch = make(0, np.array([[0, 3, 1], [1, 0, 0]]))
    a, b, x = (words_V.tolist().index(tokenizer.encode(c)[0]) for c in "abx")
    for target_V, want in zip(batch["target_BV"], ({a: 0.5, b: 0.75, x: 0.5}, {b: 1})):
        assert {i: target_V[i] for i in np.flatnonzero(target_V)} == want
    assert batch["target_BV"].dtype == np.float32
    np.testing.assert_array_equal(batch["words_V"], words_V)
    np.testing.assert_array_equal(batch["share_V"], share_V)
