"""Scores of given answers: the log-likelihoods of a plain forward pass."""

import jax
import numpy as np
import pytest
import tiny
import torch

from minigpt4_jax import score as score_lib
from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.request import Request, Sampling, user
from tests import parity

ANSWERS = ("a cat in a hat.", "x", "Nobody is in there, as far as I can see.", "")


@pytest.fixture(scope="module")
def pair():
    """(a generator with our model, the peer that has its weights)."""
    ours, theirs = parity.minigpt4(tiny.CONFIG, seed=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Generator(ours, tiny.tokenizer()), theirs
    torch.set_num_threads(threads)


def prepared(gen, images, prompt):
    turn = user(prompt, *images)
    return gen.prepare(Request([turn], sampling=Sampling(max_tokens=1)))


def plain(gen, prompt, ids) -> np.ndarray:
    """Log-probabilities of an answer alone, by one forward pass without a cache."""
    read = np.concatenate([prompt.ids, ids])[None]
    slots_BT = np.pad(prompt.slots, (0, len(ids)))[None]
    image_BQD = None
    if prompt.pixels:
        image_BQD = np.concatenate(
            gen.engine.reader.embed_images(prompt.pixels, prompt.image_keys)
        )[None]
    size = 160 - read.shape[1]  # of one compiled shape
    read, slots_BT = (np.pad(x, ((0, 0), (0, size))) for x in (read, slots_BT))
    logits_TV = parity.call(gen.model, read, slots_BT, image_BQD)[0]
    first = len(prompt.ids) - 1
    logits_AV = jax.nn.log_softmax(logits_TV[first : first + len(ids)])
    return np.asarray(logits_AV)[np.arange(len(ids)), ids]


@pytest.mark.parametrize("images", [(), (0,), (1, 2)], ids=str)
def test_scores_are_those_of_a_plain_forward_pass_of_each_answer_alone(pair, images):
    gen, images = pair[0], [tiny.image(i) for i in images]
    scores = gen.score(images, "Who is it?", ANSWERS)
    prompt = prepared(gen, images, "Who is it?")
    for answer, score in zip(ANSWERS, scores, strict=True):
        assert list(score.ids) == [
            *gen.tokenizer.encode(answer),
            gen.tokenizer.eos_ids[0],
        ]
        wanted_A = plain(gen, prompt, score.ids)
        np.testing.assert_allclose(score.logprobs, wanted_A, atol=2e-5)
        assert score.total == pytest.approx(wanted_A.sum(), abs=1e-4)
        assert score.mean == pytest.approx(wanted_A.mean(), abs=1e-5)


def test_scores_agree_with_transformers(pair):
    gen, theirs = pair
    prompt = prepared(gen, [tiny.image()], "Who is it?")
    embed = theirs.decoder.get_input_embeddings()
    for score in gen.score(tiny.image(), "Who is it?", ANSWERS):
        x_TD = embed(torch.tensor([*prompt.ids, *score.ids]))
        slots = torch.tensor(np.flatnonzero(prompt.slots))
        x_TD[slots] = theirs.encode_image(np.stack(prompt.pixels))[0]
        logits_TV = theirs.decoder(inputs_embeds=x_TD[None]).logits[0]
        logits_AV = logits_TV[len(prompt.ids) - 1 : -1].log_softmax(-1)
        wanted_A = logits_AV[torch.arange(len(score.ids)), torch.tensor(score.ids)]
        np.testing.assert_allclose(score.logprobs, wanted_A, atol=2e-5)


def test_many_answers_are_split_into_rows_and_score_the_same(pair, monkeypatch):
    gen = pair[0]
    answers = [ANSWERS[i % 3] + str(i) for i in range(20)]
    whole = gen.score(tiny.image(), "Who?", answers)
    monkeypatch.setattr(score_lib, "ROW", 64)
    rows = list(score_lib.groups([list(score.ids) for score in whole]))
    assert len(rows) > 5 and sum(map(len, rows)) == 20
    for one, other in zip(whole, gen.score(tiny.image(), "Who?", answers)):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def test_a_row_has_no_more_answers_than_branches_and_one_that_is_too_long_is_alone():
    short = [[7]] * 600
    assert [len(row) for row in score_lib.groups(short)] == [255, 255, 90]
    long = [[7] * 700, [8], [9] * 511]
    assert [len(row) for row in score_lib.groups(long)] == [1, 2]


def test_the_prompt_is_read_once(pair, monkeypatch):
    gen, read = pair[0], []
    monkeypatch.setattr(score_lib, "ROW", 64)
    real = gen.engine.reader.whole

    def counted(prepared):
        read.append(len(prepared.ids))
        return real(prepared)

    monkeypatch.setattr(gen.engine.reader, "whole", counted)
    gen.score(tiny.image(), "Who?", [ANSWERS[2]] * 5)
    assert len(read) == 1


def test_without_its_end_an_answer_is_a_beginning(pair):
    gen = pair[0]
    whole = gen.score(tiny.image(), "Who?", ANSWERS[:3])
    begun = gen.score(tiny.image(), "Who?", ANSWERS[:3], end=False)
    for one, other in zip(whole, begun):
        assert other.ids == one.ids[:-1]
        np.testing.assert_allclose(other.logprobs, one.logprobs[:-1], atol=2e-5)


def test_what_cannot_be_scored_is_refused(pair):
    gen = pair[0]
    assert gen.score(None, "Who?", []) == []
    with pytest.raises(InputError, match="'' has no token"):
        gen.score(None, "Who?", ["a", ""], end=False)
    with pytest.raises(InputError, match="want a list"):
        gen.score(None, "Who?", "a cat")
    with pytest.raises(InputError, match="the model reads 512"):
        gen.score(None, "Who?", ["x" * 500])
