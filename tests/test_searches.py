"""Beam searches as requests: events, stop strings, failures, groups."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax import compilations
from minigpt4_jax.engine import Engine
from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.reading import PIECES
from minigpt4_jax.request import GREEDY, Message, Request, user
from minigpt4_jax.schedule import READ_AT_ONCE

BEAMS = dataclasses.replace(GREEDY, max_tokens=8, num_beams=2)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.model(), tiny.tokenizer(), slots=4, chunk=3)


def ask(id="a", sampling=BEAMS, messages=(user("What is it?"),), **kw) -> Request:
    return Request(messages, sampling=sampling, id=id, **kw)


def submit(engine, *requests) -> dict:
    return {(e.request_id, e.index): e for e in engine.submit(requests)}


def test_answers_come_whole_the_best_first(engine):
    first, second = engine.submit([ask(n=2)])
    assert (first.index, second.index) == (0, 1)
    assert first.score > second.score
    for event in (first, second):
        assert event.piece == engine.tokenizer.decode(event.ids).strip()
        assert event.usage.answer_tokens == len(event.ids) == len(event.logprobs)
        assert event.usage.prompt_tokens == len(engine.prepare(ask()).ids)


def test_a_stop_string_ends_a_hypothesis_and_is_cut_off(engine):
    free = submit(engine, ask())["a", 0]
    text = engine.tokenizer.decode(free.ids)
    stop = next(text[i : i + 2] for i in range(2, 7) if "\ufffd" not in text[i : i + 2])
    for messages in (ask().messages, (*ask().messages, Message("assistant", "A"))):
        events = submit(engine, ask(messages=messages, stop=stop, n=2))
        for event in events.values():
            whole = engine.tokenizer.decode(event.ids)
            assert stop not in event.piece
            if event.finish_reason == "stop":
                assert stop in whole
                assert stop not in engine.tokenizer.decode(event.ids[:-1])
        if messages == ask().messages:
            assert "stop" in {event.finish_reason for event in events.values()}


def test_requests_beside_others_and_plain_ones_are_answered_as_alone(engine):
    wide = dataclasses.replace(BEAMS, num_beams=4)
    plain = dataclasses.replace(BEAMS, num_beams=1)
    requests = [ask("1", n=2), ask("2", wide, n=3), ask("3", plain)]
    together = collect(engine, *requests)
    assert [len(together[id]) for id in "123"] == [2, 3, 1]
    assert together == collect(engine, *requests[::-1])
    alone: dict = {}
    for request in requests:
        alone |= collect(engine, request)
    assert together == alone


def collect(engine, *requests) -> dict[str, dict[int, tuple[int, ...]]]:
    """Ids of each request's answers by index."""
    found: dict = {request.id: {} for request in requests}
    for event in engine.submit(requests):
        ids = found[event.request_id].get(event.index, ())
        found[event.request_id][event.index] = ids + event.ids
    return found


def test_more_beams_than_slots_are_one_search(engine):
    one = Engine(engine.model, engine.tokenizer, slots=1, chunk=3)
    wide = dataclasses.replace(BEAMS, num_beams=4)
    assert submit(one, ask("1", wide), ask("2", wide)).keys() == {("1", 0), ("2", 0)}


def test_a_search_whose_rules_ban_every_token_is_an_error(engine):
    none = dataclasses.replace(BEAMS, banned_ids=[*range(tiny.VOCABULARY)])
    event = submit(engine, ask(sampling=none))["a", 0]
    assert event.finish_reason == "error" and "banned" in event.error


def test_logits_that_are_not_finite_end_that_search_alone(engine):
    model = tiny.model()
    embedding = model.llama.embed.embedding
    bad = engine.tokenizer.encode("~")[0]
    embedding.set_value(embedding[...].at[bad].set(np.nan))
    broken = Engine(model, tiny.tokenizer(), slots=4, chunk=3)
    rules = dataclasses.replace(BEAMS, banned_ids=[bad])
    requests = [
        ask("1", rules),
        ask("2", rules, messages=[user("~")], n=2),
    ]
    found = submit(broken, *requests)
    assert found["1", 0].error is None
    for index in range(2):
        assert "not finite" in found["2", index].error
        assert found["2", index].ids == ()


def test_the_same_shapes_compile_nothing_new(engine):
    def sizes():
        programs = engine.searcher._programs
        made = (programs.begin, programs.grow, engine.programs.read)
        return [program._cache_size() for program in made]

    submit(engine, ask("1"), ask("2"))
    before = sizes()
    other = dataclasses.replace(BEAMS, length_penalty=0.0, early_stopping=True)
    submit(engine, ask("1", other), ask("2", messages=[user("What, then?")]))
    assert sizes() == before


def test_the_likeliest_tokens_are_told_at_each_place(engine):
    told = dataclasses.replace(BEAMS, top_logprobs=3)
    plain, found = submit(engine, ask(n=2)), submit(engine, ask("a", told, n=2))
    forward = nnx.jit(lambda model, ids_1T: jax.nn.log_softmax(model(ids_1T)[0]))
    prompt = engine.prepare(ask()).ids
    for index in range(2):
        event = found["a", index]
        assert event.ids == plain["a", index].ids
        ids_1T = np.array([[*prompt, *event.ids[:-1]]])
        logprobs_TV = np.asarray(forward(engine.model, ids_1T))[len(prompt) - 1 :]
        assert len(event.top_logprobs) == len(event.ids)
        for pairs, logprobs_V in zip(event.top_logprobs, logprobs_TV):
            assert [i for i, _ in pairs] == np.argsort(-logprobs_V)[:3].tolist()
            want = np.sort(logprobs_V)[::-1][:3]
            np.testing.assert_allclose([p for _, p in pairs], want, atol=1e-5)
        assert plain["a", index].top_logprobs == ()


def test_a_long_prompt_of_a_search_does_not_hold_up_what_runs(engine):
    """Its pieces come between chunks."""
    schedule = engine.schedule()
    running = dataclasses.replace(BEAMS, num_beams=1, max_tokens=60)
    schedule.add(engine.prepare(ask("plain", running)), 0.0)
    list(schedule.step())
    long = ask("search", messages=[user("Why? " * 80)])
    assert len(engine.prepare(long).ids) > READ_AT_ONCE + PIECES[-1]
    schedule.add(engine.prepare(long), 0.0)
    events = list(schedule.step())
    assert schedule.searching and schedule.search is None  # not all of it is read
    assert [event.request_id for event in events] == ["plain"]
    while schedule.busy:
        events += schedule.step()
    (found,) = [event for event in events if event.request_id == "search"]
    assert found.ids == submit(engine, long)["search", 0].ids


def test_a_search_that_is_cancelled_while_it_is_read_leaves_room_for_the_next(engine):
    schedule = engine.schedule()
    long = ask("search", messages=[user("Why? " * 80)])
    for request in (long, ask("next")):
        schedule.add(engine.prepare(request), 0.0)
    list(schedule.step())
    schedule.cancel("search")
    events = []
    while schedule.busy:
        events += schedule.step()
    reasons = {event.request_id: event.finish_reason for event in events}
    assert reasons == {"search": "cancelled", "next": "length"}


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up_for_searches_and_scores(engine):
    gen = Generator(engine.model, engine.tokenizer, batch_size=4, chunk=3)
    assert gen.warm_up(60, beams=(2,), scores=True) > 0
    before = compilations.count()
    photo = tiny.image(0)
    requests = [ask("1"), ask("2", messages=[user("Is it?", photo)], n=2), ask("3")]
    assert len(submit(gen.engine, *requests)) == 4
    gen.score(photo, "Is it?", ["Yes.", "No, it is not.", "A dog"])
    assert compilations.count() == before


def test_knobs_of_a_search_are_checked():
    for wrong in (
        dict(num_beams=0),
        dict(length_penalty=float("nan")),
        dict(early_stopping="always"),
        dict(early_stopping=1),
    ):
        with pytest.raises(InputError, match=[*wrong][-1]):
            dataclasses.replace(GREEDY, **wrong)


class Stacked(nnx.Module):
    """A decoder whose blocks stay stacked, as on an accelerator."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x_BTD, segments_BT, positions_BT, cache=None, capture=None):
        return self.inner(x_BTD, segments_BT, positions_BT, cache, capture)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_a_decoder_of_stacked_blocks_finds_the_same(engine):
    model = tiny.model()
    model.llama = Stacked(model.llama)
    other = Engine(model, tiny.tokenizer(), slots=4, chunk=3)
    assert not isinstance(model.llama.inner.blocks, nnx.List)
    ours, theirs = submit(engine, ask(n=2)), submit(other, ask(n=2))
    assert [e.ids for e in ours.values()] == [e.ids for e in theirs.values()]
