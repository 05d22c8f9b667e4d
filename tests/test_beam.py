"""Beam search: hypothesis for hypothesis what Hugging Face's generate finds."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from minigpt4_jax import beam
from minigpt4_jax.engine import Engine
from minigpt4_jax.errors import InputError
from minigpt4_jax.request import GREEDY, Request, Sampling, user
from tests import parity

LIMIT = 11
BEAMS = dataclasses.replace(GREEDY, max_tokens=LIMIT, num_beams=3)
# Prompts of one bucket, ragged, with one image, none and two.
PROMPTS = (
    ("What is in there?", (0,)),
    ("Why? And who else? Tell me, please.", ()),
    ("Is it?", (1, 2)),
)


@pytest.fixture(scope="module")
def pair():
    """(an engine with our model, the peer that has its weights)."""
    ours, theirs = parity.minigpt4(tiny.CONFIG, seed=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # more of them wait for each other longer than they compute
    yield Engine(ours, tiny.tokenizer(), slots=12, chunk=4), theirs
    torch.set_num_threads(threads)


def ask(number: int, sampling: Sampling = BEAMS, **kw) -> Request:
    text, images = PROMPTS[number]
    turn = user(text, *map(tiny.image, images))
    return Request([turn], sampling=sampling, id=f"{number}", **kw)


def answers(engine, requests) -> dict:
    """(request id, index) -> its one event."""
    found = {}
    for event in engine.submit(requests):
        assert event.error is None and event.finish_reason
        assert (event.request_id, event.index) not in found
        found[event.request_id, event.index] = event
    return found


def their_embeddings(pair, request: Request) -> torch.Tensor:
    engine, theirs = pair
    prepared = engine.prepare(request)
    x_TD = theirs.decoder.get_input_embeddings()(torch.tensor(prepared.ids))
    if prepared.pixels:
        image_BQD = theirs.encode_image(np.stack(prepared.pixels))
        x_TD[torch.tensor(prepared.slots)] = image_BQD.flatten(0, 1)
    return x_TD[None]


def their_answers(pair, request: Request) -> list[tuple[list[int], float]]:
    """(ids up to the end token, score) of the n best, by transformers' generate."""
    engine, theirs = pair
    rules = request.sampling
    ends = list(engine.endings.ids(request))
    found = theirs.decoder.generate(
        inputs_embeds=their_embeddings(pair, request),
        generation_config=transformers.GenerationConfig(
            num_beams=rules.num_beams,
            num_return_sequences=request.n,
            do_sample=not rules.greedy,
            temperature=rules.temperature,
            top_k=rules.top_k,
            top_p=rules.top_p,
            max_new_tokens=rules.max_tokens,
            min_new_tokens=rules.min_tokens or None,
            length_penalty=rules.length_penalty,
            early_stopping=rules.early_stopping,
            repetition_penalty=rules.repetition_penalty,
            no_repeat_ngram_size=rules.no_repeat_ngram,
            eos_token_id=ends,
            pad_token_id=tiny.VOCABULARY - 1,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    rows = []
    for ids_A, score in zip(found.sequences.tolist(), found.sequences_scores.tolist()):
        stops = [i + 1 for i, token in enumerate(ids_A) if token in ends]
        rows.append((ids_A[: min(stops, default=rules.max_tokens)], score))
    return rows


def compare(pair, requests, after_each=lambda: None):
    """Raise unless the answers to all requests, asked together, are theirs."""
    ours = answers(pair[0], requests)
    for request in requests:
        for index, (ids, score) in enumerate(their_answers(pair, request)):
            event = ours[request.id, index]
            assert event.ids == tuple(ids)
            assert event.score == pytest.approx(score, rel=1e-5)
            ended = ids[-1] in pair[0].endings.ids(request)
            assert event.finish_reason == ("stop" if ended else "length")
        after_each()
    return ours


@pytest.fixture(scope="module")
def likely_ends(pair) -> tuple[int, ...]:
    """Tokens that end some answers early, some late and some not at all."""
    found = answers(pair[0], [ask(i, n=3) for i in range(3)])
    return tuple(found[f"{i}", i].ids[at] for i, at in ((0, 3), (1, 6)))


def test_answers_without_an_end_are_hugging_faces_at_the_limit(pair):
    found = compare(pair, [ask(i, n=3) for i in range(3)])
    assert {event.finish_reason for event in found.values()} == {"length"}


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_searches_end_as_hugging_faces_do(pair, likely_ends, early_stopping):
    """Requests of one batch: each with its own length penalty, images and length."""
    lengths = set()
    for penalties in ((1.0, 0.0, 2.5), (-1.0, 0.4, 1.0)):
        requests = [
            ask(
                i,
                dataclasses.replace(
                    BEAMS,
                    stop_ids=likely_ends,
                    length_penalty=penalty,
                    early_stopping=early_stopping,
                ),
                n=3,
            )
            for i, penalty in enumerate(penalties)
        ]
        found = compare(pair, requests)
        lengths |= {len(event.ids) for event in found.values()}
    assert min(lengths) < 5 and len(lengths) > 3


@pytest.mark.filterwarnings("ignore:Passing `.*` with `inputs_embeds`")
def test_rules_change_beams_as_they_do_hugging_faces(pair, likely_ends):
    ruled = [
        dict(repetition_penalty=1.7, min_tokens=6),
        dict(no_repeat_ngram=2, repetition_penalty=1.1),
        dict(min_tokens=4, length_penalty=2.0),
    ]
    requests = [
        ask(i, dataclasses.replace(BEAMS, stop_ids=likely_ends, **rules), n=2)
        for i, rules in enumerate(ruled)
    ]
    found = compare(pair, requests)
    assert all(len(found["0", i].ids) >= 7 for i in range(2))


def test_many_beams_are_hugging_faces(pair, likely_ends):
    sampling = dataclasses.replace(BEAMS, num_beams=10, stop_ids=likely_ends)
    compare(pair, [ask(0, sampling, n=10)])


def test_drawn_beams_are_hugging_faces_with_the_same_noise(
    pair, likely_ends, monkeypatch
):
    """Their multinomial, which draws without replacement, gets our noise."""
    drawn = dict(temperature=1.3, top_k=20, top_p=0.8)
    rules = dataclasses.replace(BEAMS, stop_ids=likely_ends, **drawn)
    requests = [ask(i, rules, n=3, seed=7) for i in range(3)]
    counts = [itertools.count() for _ in requests]

    def multinomial(probabilities, num_samples):
        size = probabilities.shape[-1]
        noise = beam.gumbel(jax.random.key(7)[None], next(counts[0]), size)
        order = probabilities.log() + torch.from_numpy(np.array(noise))
        return order.topk(num_samples).indices

    monkeypatch.setattr(torch, "multinomial", multinomial)
    compare(pair, requests, after_each=lambda: counts.pop(0))
    assert not counts


def test_log_probabilities_are_the_models_own_and_scores_those_after_the_rules(pair):
    repeating = dataclasses.replace(BEAMS, repetition_penalty=0.5)
    ruled = dataclasses.replace(ask(0, repeating), id="ruled")
    found = answers(pair[0], [ask(0, n=3), ruled, ask(2)])
    means = {key: sum(e.logprobs) / len(e.ids) for key, e in found.items()}
    for index in range(3):
        assert found["0", index].score == pytest.approx(means["0", index])
    assert found["ruled", 0].score > means["ruled", 0] + 0.1


def test_one_answer_more_than_beams_is_refused():
    with pytest.raises(InputError, match="n: got 4, want at most num_beams=3"):
        ask(0, n=4)
