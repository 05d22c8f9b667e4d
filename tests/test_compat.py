"""Answers beside transformers' generate, token for token: ours, and the reference's way.

transformers 5 starts `inputs_embeds` from no ids. Given the dummy id of 4.28 as
`input_ids` it starts from that, as the reference does.
"""

import dataclasses

import jax
import numpy as np
import parity
import pytest
import tiny
import torch
import transformers
from transformers import generation

from minigpt4_jax import beam, compat
from minigpt4_jax.data.prompts import LLAMA2, TEMPLATES, VICUNA_V0
from minigpt4_jax.engine import Engine
from minigpt4_jax.errors import InputError
from minigpt4_jax.request import GREEDY, Request, Sampling, user

COUNT = 16  # tokens of an answer
RULED = dict(
    repetition_penalty=1.3, no_repeat_ngram=3, banned_ids=[40, 50], min_tokens=4
)


@pytest.fixture(scope="module")
def pair():
    """(Engine, the torch peer of its model)."""
    cfg = dataclasses.replace(tiny.CONFIG, template="vicuna_v0")
    ours, theirs = parity.minigpt4(cfg, seed=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other in so small a model
    yield Engine(ours, tiny.tokenizer(), slots=2, chunk=5), theirs
    torch.set_num_threads(threads)


def greedy(**rules) -> Sampling:
    return dataclasses.replace(GREEDY, **{"max_tokens": COUNT, **rules})


def ask(**fields) -> Request:
    fields = {"sampling": greedy(), **fields}
    return Request([user("What can you see?", tiny.image(5))], **fields)


def ours(engine, request) -> tuple[list[int], str, str]:
    """(ids, text, finish reason)."""
    events = list(engine.submit([request]))
    ids = [token for event in events for token in event.ids]
    return ids, "".join(e.piece for e in events), events[-1].finish_reason


def theirs(pair, request, first_id=None, cut=0, **kwargs) -> list[int]:
    """Ids by transformers' generate, its own end included."""
    engine, peer = pair
    prepared = engine.prepare(dataclasses.replace(request, compat=None))
    embed = peer.decoder.get_input_embeddings()
    x_TD = embed(torch.tensor(prepared.ids)).clone()
    pixels_BHWC = np.stack(prepared.pixels)
    image_QD = peer.encode_image(pixels_BHWC).flatten(0, 1)
    x_TD[torch.tensor(prepared.slots)] = image_QD
    x_1TD = x_TD[None, cut:]
    if first_id is not None:
        kwargs["input_ids"] = torch.tensor([[first_id]])
    ids = peer.decoder.generate(
        inputs_embeds=x_1TD,
        attention_mask=torch.ones(x_1TD.shape[:2], dtype=torch.int64),
        max_new_tokens=COUNT,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    return ids[0, first_id is not None :].tolist()


class Stops(generation.StoppingCriteria):
    """The reference's: some sequence of ids ends all rows."""

    def __init__(self, stops):
        self.stops = [torch.tensor(stop) for stop in stops]

    def __call__(self, input_ids, scores, **kwargs):
        ended = [(input_ids[:, -len(s) :] == s).all() for s in self.stops]
        return torch.full((len(input_ids),), bool(any(ended)))


def reference_rules(monkeypatch, **rules) -> compat.Rules:
    """Other ids of the reference than a tiny vocabulary has not."""
    made = compat.Rules(**{"first_id": 0, "end_ids": (1,), "stops": (), **rules})
    monkeypatch.setitem(compat.RULES, "vicuna_v0", made)
    return made


def test_greedy_answers_are_those_of_generate(pair):
    plain = theirs(pair, ask(), eos_token_id=[2])
    assert ours(pair[0], ask())[0] == plain
    ruled = theirs(
        pair,
        ask(),
        eos_token_id=[plain[1], 2],
        min_new_tokens=4,
        repetition_penalty=1.3,
        no_repeat_ngram_size=3,
        suppress_tokens=[40, 50],
    )
    request = ask(sampling=greedy(stop_ids=[plain[1]], **RULED))
    assert ours(pair[0], request)[0] == ruled != plain


def test_the_dummy_first_id_is_penalised_in_the_references_way_alone(pair, monkeypatch):
    first, *_ = ours(pair[0], ask())[0]
    reference_rules(monkeypatch, first_id=first)
    request = ask(sampling=greedy(repetition_penalty=1.8), compat="reference")
    ids, _, _ = ours(pair[0], request)
    assert ids == theirs(pair, request, first, repetition_penalty=1.8)
    assert ids[0] != first
    expected = ours(pair[0], dataclasses.replace(request, compat=None))[0]
    assert expected == theirs(pair, request, repetition_penalty=1.8)
    assert expected[0] == first


def test_a_minimum_of_1_is_none_in_the_references_way_alone(pair, monkeypatch):
    first, *_ = ours(pair[0], ask())[0]
    reference_rules(monkeypatch, end_ids=(first,))
    for least in (1, 3):
        request = ask(sampling=greedy(min_tokens=least), compat="reference")
        # Their own min_length is counted from inputs_embeds since 4.31.
        processor = generation.MinLengthLogitsProcessor(least, [first])
        wanted = theirs(
            pair,
            request,
            first_id=0,
            eos_token_id=[first],
            logits_processor=transformers.LogitsProcessorList([processor]),
        )
        assert ours(pair[0], request)[0] == wanted
        assert (wanted == [first]) == (least == 1)
    default = ask(sampling=greedy(min_tokens=1, stop_ids=[first]))
    assert ours(pair[0], default)[0][0] != first


def test_its_end_ids_and_stop_sequences_end_an_answer_and_ours_do_not(
    pair, monkeypatch
):
    plain, _, _ = ours(pair[0], ask())
    assert plain[4] not in plain[:4] and plain[7:9] != plain[6:8]
    rules = reference_rules(monkeypatch, end_ids=(plain[4],))
    ids, _, reason = ours(pair[0], ask(compat="reference"))
    assert ids == theirs(pair, ask(), 0, eos_token_id=[plain[4]]) == plain[:5]
    assert reason == "stop"

    rules = reference_rules(monkeypatch, stops=((999,), tuple(plain[7:9])))
    ids, _, reason = ours(pair[0], ask(compat="reference"))
    stops = transformers.StoppingCriteriaList([Stops(rules.stops)])
    assert ids == theirs(pair, ask(), 0, stopping_criteria=stops)
    assert len(ids) <= 9 and ids[-2:] == plain[7:9] and reason == "stop"

    # Ours: the end is `</s>`, as users expect, and the reference's is a token like any.
    model_end = dataclasses.replace(greedy(), stop_ids=[plain[4]])
    reference_rules(monkeypatch)
    assert ours(pair[0], ask(compat="reference"))[0] == plain
    assert ours(pair[0], ask(sampling=model_end))[0] == plain[:5]


def original_search(pair, request, rules, noise=None) -> tuple[list[int], float]:
    """(ids, score) of the best hypothesis by the rules of transformers 4.28 and 4.30.

    Written anew from what its BeamSearchScorer and beam_sample do, whole texts at each
    token; today's transformers has other rules.
    """
    engine, peer = pair
    asked, J = request.sampling, request.sampling.num_beams
    prepared = engine.prepare(request)
    embed = peer.decoder.get_input_embeddings()
    x_TD = embed(torch.tensor(prepared.ids)).clone()
    image_QD = peer.encode_image(np.stack(prepared.pixels)).flatten(0, 1)
    x_TD[torch.tensor(prepared.slots)] = image_QD
    processors = [
        generation.RepetitionPenaltyLogitsProcessor(asked.repetition_penalty),
        generation.MinLengthLogitsProcessor(asked.min_tokens, list(rules.end_ids)),
    ]
    if asked.no_repeat_ngram:
        processors.append(
            generation.NoRepeatNGramLogitsProcessor(asked.no_repeat_ngram)
        )
    keep = dict(min_tokens_to_keep=2)
    warpers = []
    if noise:
        warpers.append(generation.TemperatureLogitsWarper(asked.temperature))
        warpers.append(generation.TopKLogitsWarper(asked.top_k, **keep))
        warpers.append(generation.TopPLogitsWarper(asked.top_p, **keep))
    beams = torch.full((J, 1), rules.first_id)
    scores_J = torch.tensor([0.0] + [0.0 if noise else -1e9] * (J - 1))
    ended: list[tuple[float, list[int]]] = []
    done = False

    def add(ids, score):
        ended.append((score / len(ids) ** asked.length_penalty, ids.tolist()))
        ended.sort(key=lambda pair: pair[0])
        del ended[:-J]

    for count in range(asked.max_tokens):
        text_JTD = torch.cat([x_TD.expand(J, -1, -1), embed(beams[:, 1:])], dim=1)
        logits_JV = peer.decoder(inputs_embeds=text_JTD).logits[:, -1].float()
        order_JV = torch.log_softmax(logits_JV, dim=-1)
        for process in processors:
            order_JV = process(beams, order_JV)
        order_JV = order_JV + scores_J[:, None]
        for warp in warpers:
            order_JV = warp(beams, order_JV)
        flat_X = order_JV.flatten()
        drawn_X = flat_X + noise(count, len(flat_X)) if noise else flat_X
        chosen = drawn_X.topk(2 * J).indices
        chosen = chosen[flat_X[chosen].argsort(descending=True, stable=True)].tolist()
        next_ids, next_scores = [], []
        for rank, x in enumerate(chosen):
            ids, token = beams[x // logits_JV.shape[1]], x % logits_JV.shape[1]
            if token in rules.end_ids:
                if rank < J:
                    add(ids, float(flat_X[x]))
            elif len(next_ids) < J:
                next_ids.append(torch.cat([ids, torch.tensor([token])]))
                next_scores.append(float(flat_X[x]))
        best = float(flat_X[chosen[0]]) / (beams.shape[1] + 1) ** asked.length_penalty
        done = len(ended) == J and (asked.early_stopping or ended[0][0] >= best)
        beams, scores_J = torch.stack(next_ids), torch.tensor(next_scores)
        alike = [(beams[:, -len(s) :] == torch.tensor(s)).all() for s in rules.stops]
        if done or any(alike):
            break
    if not done:
        for ids, score in zip(beams, next_scores):
            add(ids, score)
    score, ids = ended[-1]
    return ids[1:], score


def test_beams_are_those_of_the_original(pair, monkeypatch):
    """With end ids that come early, late and never, and its rules."""
    plain, lengths = ours(pair[0], ask())[0], set()
    for changes in (
        dict(length_penalty=1.0),
        dict(length_penalty=-0.5, repetition_penalty=1.4, min_tokens=4),
        dict(length_penalty=2.0, no_repeat_ngram=2, early_stopping=True),
    ):
        sampling = greedy(num_beams=3, **changes)
        request = ask(sampling=sampling, compat="reference")
        for end in (1, plain[0], plain[3], plain[6]):
            rules = reference_rules(monkeypatch, end_ids=(end,), first_id=plain[1])
            ids, score = original_search(pair, request, rules)
            (event,) = pair[0].submit([request])
            # Theirs lacks the end, which their generate puts behind it.
            got = event.ids[:-1] if event.ids[-1] == end else event.ids
            assert list(got) == ids
            assert event.score == pytest.approx(score, rel=1e-5)
            lengths.add(len(ids))
    assert len(lengths) > 2


def test_drawn_beams_are_those_of_the_original_with_the_same_noise(pair, monkeypatch):
    plain = ours(pair[0], ask())[0]
    rules = reference_rules(monkeypatch, end_ids=(plain[3],), first_id=plain[1])
    # At 0.2 scores grow 5 times a token.
    drawn = dict(top_k=20, top_p=0.8, repetition_penalty=1.05)

    def noise(count, size):
        return torch.from_numpy(np.array(beam.gumbel(key_1, count, size)[0]))

    found = set()
    for seed in range(4):
        key_1 = jax.random.key(seed)[None]
        temperature = (0.7, 1.0, 1.5, 0.2)[seed]
        sampling = greedy(num_beams=3, temperature=temperature, **drawn)
        request = ask(sampling=sampling, compat="reference", seed=seed)
        ids, score = original_search(pair, request, rules, noise)
        (event,) = pair[0].submit([request])
        got = event.ids[:-1] if event.ids[-1] == plain[3] else event.ids
        assert list(got) == ids
        assert event.score == pytest.approx(score, rel=1e-4)
        found.add(event.ids)
    assert len(found) > 1


def test_what_does_not_fit_is_cut_from_the_left_with_its_image(pair, monkeypatch):
    """Here through the image: one of its 3 slots is left."""
    engine, _ = pair
    reference_rules(monkeypatch)
    whole = engine.prepare(ask())
    cut = int(np.flatnonzero(whole.slots)[2])
    monkeypatch.setattr(compat, "MAX_LENGTH", len(whole.ids) - cut + COUNT)
    request = ask(compat="reference")
    prepared = engine.prepare(request)
    assert prepared.ids.tolist() == whole.ids[cut:].tolist()
    assert prepared.slots.sum() == 1
    ids, _, _ = ours(engine, request)
    assert ids == theirs(pair, request, 0, cut=cut)
    assert ids != ours(engine, ask())[0]


def test_an_answer_that_leaves_no_room_is_refused(pair):
    with pytest.raises(InputError, match="max_tokens: 512 leaves no room"):
        pair[0].prepare(ask(sampling=greedy(max_tokens=512), compat="reference"))


def test_the_default_refuses_what_the_reference_cuts(pair):
    sampling = greedy(max_tokens=500)
    prepared = pair[0].prepare(ask(sampling=sampling, compat="reference"))
    assert len(prepared.ids) == 12
    with pytest.raises(InputError, match="shorten the conversation"):
        pair[0].prepare(ask(sampling=sampling))


def test_its_text_comes_whole_at_the_end(pair, monkeypatch):
    reference_rules(monkeypatch)
    events = list(pair[0].submit([ask(compat="reference")]))
    assert len(events) > 2
    assert [event.piece for event in events[:-1]] == [""] * (len(events) - 1)
    ids = [token for event in events for token in event.ids]
    assert events[-1].piece == compat.said(pair[0].tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("generated", "text"),
    [
        (" a cat ###Human: hi", "a cat"),
        ("Human: hm Assistant: a cat", "a cat"),
        ("a cat##", "a cat##"),
        ("###a cat", ""),
    ],
)
def test_an_answer_is_cut_out_of_what_was_generated(generated, text):
    assert compat.said(generated) == text


def test_every_template_has_the_ids_of_its_decoder():
    assert set(compat.RULES) == set(TEMPLATES)
    vicuna, llama2 = map(compat.find_rules, (VICUNA_V0, LLAMA2))
    assert (vicuna.first_id, vicuna.end_ids) == (0, (1,))
    assert vicuna.stops == ((835,), (2277, 29937))
    assert (llama2.first_id, llama2.end_ids, llama2.stops) == (1, (2,), ((2,),))
    with pytest.raises(InputError, match="no template 'mine'"):
        compat.find_rules(dataclasses.replace(VICUNA_V0, name="mine"))
