"""Requests become events: the same alone, in any batch, in any slot."""

import dataclasses
import threading

import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax import compilations
from minigpt4_jax.engine import Engine
from minigpt4_jax.errors import ConfigError, InputError
from minigpt4_jax.request import GREEDY, Message, Request, Sampling, user

SHORT = dataclasses.replace(GREEDY, max_tokens=8)
# Prompts of one bucket (48 tokens) and answers of another (8), to compile little.
QUESTIONS = ("Why? Why? Why?", "Who is in there?", "What can you see?")


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.model(), tiny.tokenizer(), slots=4, chunk=3)


def ask(text=QUESTIONS[0], *images, id="a", max_tokens=8, temperature=0.0, **kw):
    own = {f.name for f in dataclasses.fields(Sampling)} & set(kw)
    rules = {name: kw.pop(name) for name in own}
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, **rules)
    return Request([user(text, *images)], sampling=sampling, id=id, **kw)


def collect(events) -> dict:
    """(request id, index) -> (ids, text, finish reason)."""
    found = {}
    for event in events:
        assert found.get((event.request_id, event.index), ("", "", None))[2] is None
        ids, text, _ = found.get((event.request_id, event.index), ((), "", None))
        found[event.request_id, event.index] = (
            ids + event.ids,
            text + event.piece,
            event.finish_reason,
        )
    return found


MIXED_RULES = (
    dict(),
    dict(min_p=0.1, presence_penalty=0.5, top_logprobs=2),
    dict(no_repeat_ngram=1, min_tokens=3),
    dict(frequency_penalty=-0.7, banned_ids=list(range(40, 90)), stop_ids=[100]),
)


def test_a_row_is_the_same_alone_in_any_batch_in_any_slot(engine):
    requests = [
        ask(
            QUESTIONS[i % 3],
            *[tiny.image(i), tiny.image(i + 1)][: i % 3],
            id=str(i),
            max_tokens=5 + i % 4,
            temperature=0.9 * (i % 2),
            seed=i,
            **MIXED_RULES[i % 4],
        )
        for i in range(7)
    ]
    together = collect(engine.submit(requests))
    backwards = collect(engine.submit(requests[::-1]))
    alone = {}
    for request in requests:
        alone |= collect(engine.submit([request]))
    assert together == backwards == alone
    assert [len(alone[str(i), 0][0]) for i in range(4)] == [5, 6, 7, 8]


def test_samples_differ_and_the_first_is_the_only_one_of_n_1(engine):
    one = collect(engine.submit([ask(temperature=1.5, seed=3)]))
    three = collect(engine.submit([ask(temperature=1.5, seed=3, n=3)]))
    assert three["a", 0] == one["a", 0]
    assert len(set(three.values())) == 3


def test_a_request_that_cannot_be_answered_stops_nothing(engine, tmp_path):
    bad = tmp_path / "no.jpg"
    bad.write_text("not an image")
    requests = [
        ask(id="1"),
        ask(QUESTIONS[0], bad, id="2"),
        ask("x" * 999, id="3"),
        ask(id="4"),
    ]
    events = list(engine.submit(requests))
    errors = {e.request_id: e.error for e in events if e.finish_reason == "error"}
    assert set(errors) == {"2", "3"}
    assert "no.jpg" in errors["2"]
    found = collect(e for e in events if e.error is None)
    assert found["1", 0] == found["4", 0]
    assert found["1", 0][2] is not None


def test_a_prompt_that_does_not_fit_is_an_error_with_the_counts(engine):
    with pytest.raises(InputError) as error:
        engine.prepare(ask("x" * 520, tiny.image(), max_tokens=9))
    Q = tiny.CONFIG.num_slots
    for part in (f"({Q} of them for 1 images)", "may have 9", "reads 512"):
        assert part in str(error.value)


def test_stop_strings_end_one_row_and_are_cut(engine):
    free = collect(engine.submit([ask()]))["a", 0]
    text = free[1]
    stop = text[2:4]
    assert stop and text.index(stop) == 2
    events = engine.submit([ask(stop=[stop]), ask(id="b")])
    found = collect(events)
    assert found["a", 0][1:] == (text[:2].rstrip(), "stop")
    assert len(found["a", 0][0]) < 8
    assert found["b", 0] == free


def test_an_end_token_ends_a_row_with_stop_and_is_no_text(engine):
    ids, text, _ = collect(engine.submit([ask()]))["a", 0]
    end = ids[5]
    tokenizer = tiny.tokenizer()
    tokenizer.eos_ids = (end,)
    ending = Engine(engine.model, tokenizer, slots=4, chunk=3)
    ended = collect(ending.submit([ask()]))["a", 0]
    count = ids.index(end) + 1
    assert ended[0] == ids[:count]
    assert ended[1] == tokenizer.decode(ids[: count - 1]).strip()
    assert ended[2] == "stop"


class Shell(nnx.Module):
    """A decoder whose layers are not where Llama has them."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x_BTD, segments_BT, positions_BT, cache=None, capture=None):
        return self.inner(x_BTD, segments_BT, positions_BT, cache, capture)

    def embed(self, ids_BT):
        return self.inner.embed(ids_BT)

    def logits(self, hidden_BTD):
        return self.inner.logits(hidden_BTD)

    def new_cache(self, batch, places):
        return self.inner.new_cache(batch, places)


def test_a_decoder_of_another_build_answers_too(engine):
    model = tiny.model()
    model.llama = Shell(model.llama)
    other = Engine(model, tiny.tokenizer(), slots=4, chunk=3)
    assert not isinstance(model.llama.inner.blocks, nnx.List)
    request = ask(QUESTIONS[0], tiny.image())
    assert collect(other.submit([request])) == collect(engine.submit([request]))


def test_a_stop_id_ends_its_own_row_and_a_banned_token_never_comes(engine):
    free = collect(engine.submit([ask()]))["a", 0]
    end = free[0][5]
    count = free[0].index(end) + 1
    requests = [
        ask(id="stop", stop_ids=[end]),
        ask(id="free"),
        ask(id="later", stop_ids=[end], min_tokens=7),
        ask(id="banned", banned_ids=free[0]),
    ]
    found = collect(engine.submit(requests))
    assert found["stop", 0][0] == free[0][:count] and found["stop", 0][2] == "stop"
    assert found["free", 0] == free
    assert end not in found["later", 0][0][:7] and len(found["later", 0][0]) > 6
    assert not set(found["banned", 0][0]) & set(free[0])


def test_events_tell_the_likeliest_tokens_of_rows_that_ask(engine):
    requests = [ask(id="plain"), ask(id="told", top_logprobs=3)]
    for event in engine.submit(requests):
        if event.request_id == "plain":
            assert event.top_logprobs == ()
            continue
        assert len(event.top_logprobs) == len(event.ids) > 0
        for token, logprob, pairs in zip(event.ids, event.logprobs, event.top_logprobs):
            ids, logprobs = zip(*pairs)
            assert len(set(ids)) == 3 and sorted(logprobs, reverse=True) == [*logprobs]
            if token == ids[0]:  # else a penalty chose another
                assert logprob == pytest.approx(logprobs[0], abs=1e-5)
            else:
                assert logprob < logprobs[0]


def test_logits_that_are_not_finite_end_their_request_alone(engine):
    """The projector of this model gives infinite embeddings for every image."""
    model = tiny.model()
    model.projector.kernel.set_value(np.inf * model.projector.kernel[...])
    overflowing = Engine(model, tiny.tokenizer(), slots=4, chunk=3)
    requests = [
        ask(id="0"),
        ask(QUESTIONS[1], tiny.image(), id="1"),
        ask(QUESTIONS[2], id="2", temperature=0.8, seed=4),
    ]
    events = list(overflowing.submit(requests))
    found = collect(events)
    assert found["1", 0] == ((), "", "error")
    (error,) = [event.error for event in events if event.error]
    assert "not finite" in error
    for index in (0, 2):
        assert (
            found[str(index), 0]
            == collect(engine.submit([requests[index]]))[str(index), 0]
        )


def test_rules_that_ban_every_token_end_their_request_with_the_reason(engine):
    banned = ask(id="1", banned_ids=list(range(tiny.VOCABULARY)))
    events = list(engine.submit([ask(id="0"), banned]))
    assert collect(events)["0", 0] == collect(engine.submit([ask(id="0")]))["0", 0]
    (error,) = [event.error for event in events if event.request_id == "1"]
    assert "banned_ids" in error


def test_a_token_out_of_the_vocabulary_is_refused(engine):
    with pytest.raises(InputError, match="stop_ids: got 999, want ids below 265"):
        engine.prepare(ask(stop_ids=[7, 999]))
    with pytest.raises(InputError, match="banned_ids: got 265"):
        engine.prepare(ask(banned_ids=[265]))


def test_the_oldest_turns_are_left_out_where_that_is_asked(engine):
    turns = [
        Message("system", "Be brief."),
        user("What is it?", tiny.image()),
        Message("assistant", "A cat."),
        *[user("x" * 300), Message("assistant", "Well.")],
        *[user("y" * 100), Message("assistant", "Hm.")],
        *[user("z" * 100), Message("assistant", "No.")],
        user("And?"),
    ]

    def prepared(messages, **kw):
        return engine.prepare(Request(messages, sampling=SHORT, **kw))

    kept = prepared(turns, overflow="drop_oldest")
    assert kept.dropped_turns == 2
    assert kept.ids.tolist() == prepared([*turns[:3], *turns[5:]]).ids.tolist()
    assert prepared(turns[5:], overflow="drop_oldest").dropped_turns == 0
    *_, last = engine.submit([kept])
    assert last.usage.dropped_turns == 2
    with pytest.raises(InputError, match="the model reads 512"):
        prepared(turns)
    with pytest.raises(InputError, match="the model reads 512"):
        prepared(
            [user("x" * 600), *turns[1:3], user("y" * 500)], overflow="drop_oldest"
        )


def test_an_image_is_seen_in_whatever_turn_it_comes(engine):
    def first_logprob(first: int, second: int) -> float:
        turns = [
            user("What?", tiny.image(first)),
            Message("assistant", "Hm."),
            user("And?", tiny.image(second)),
        ]
        event = next(engine.submit([Request(turns, sampling=SHORT)]))
        return event.logprobs[0]

    found = [first_logprob(a, b) for a in (0, 1) for b in (0, 1)]
    assert min(np.diff(sorted(found))) > 1e-3


def test_an_answer_that_is_continued_goes_on_as_it_would_have(engine):
    ids, text, _ = collect(engine.submit([ask(QUESTIONS[1])]))["a", 0]
    tokenizer = engine.tokenizer
    whole = [
        n
        for n in range(1, 8)
        if tokenizer.encode(tokenizer.decode(ids[:n])) == [*ids[:n]]
    ]
    begun = max(whole)
    said = Message("assistant", tokenizer.decode(ids[:begun]))
    request = Request(
        [user(QUESTIONS[1]), said],
        sampling=dataclasses.replace(ask().sampling, max_tokens=8 - begun),
        id="b",
    )
    more_ids, more, _ = collect(engine.submit([request]))["b", 0]
    assert more_ids == ids[begun:]
    assert (said.text + more).strip() == text


def test_the_last_event_tells_usage(engine):
    *_, last = engine.submit([ask(QUESTIONS[0], tiny.image())])
    prepared = engine.prepare(ask(QUESTIONS[0], tiny.image()))
    assert last.usage.prompt_tokens == len(prepared.ids)
    assert prepared.slots.sum() == tiny.CONFIG.num_slots
    assert last.usage.answer_tokens == 8
    assert 0 < last.usage.seconds_to_first_token < last.usage.seconds


def test_requests_are_read_as_slots_become_free(engine):
    read = []

    def requests():
        for i in range(50):
            read.append(i)
            yield ask(id=str(i))

    events = engine.submit(requests())
    next(events)
    assert len(read) <= 2 * engine.shapes.slots
    events.close()


def test_an_answer_is_the_same_bit_by_bit_in_any_batch_where_places_are_fixed(engine):
    """Ids and log-probabilities, in batches of 1, 2, 3, 4 and 8, at every position."""
    steady = Engine(engine.model, tiny.tokenizer(), slots=4, chunk=3, places=96)
    kinds = [
        ask(QUESTIONS[i % 3], *[tiny.image(i)] * (i % 2), id=str(i), max_tokens=3 + i)
        for i in range(8)
    ]
    kinds = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=t))
        for r, t in zip(kinds, (0, 0.9) * 4)
    ]

    def exactly(requests):
        found = {}
        for event in steady.submit(requests):
            found.setdefault(event.request_id, []).extend(
                zip(event.ids, event.logprobs)
            )
        return found

    alone = {}
    for request in kinds:
        alone |= exactly([request])
    for size in (2, 3, 4, 8):
        for first in range(0, 8, 3):
            batch = [kinds[(first + i) % 8] for i in range(size)]
            assert exactly(batch) == {r.id: alone[r.id] for r in batch}
    assert [len(alone[str(i)]) for i in range(8)] == list(range(3, 11))


def test_a_batch_that_follows_its_rows_differs_in_last_bits_only(engine):
    """Other shapes, other order of sums: the tokens hold, the bits need not."""
    request, others = ask(QUESTIONS[1]), [ask("x" * 150, id=str(i)) for i in range(3)]
    alone = list(engine.submit([request]))
    beside = [e for e in engine.submit([*others, request]) if e.request_id == "a"]
    assert sum((e.ids for e in alone), ()) == sum((e.ids for e in beside), ())
    logprobs = [sum((e.logprobs for e in events), ()) for events in (alone, beside)]
    np.testing.assert_allclose(*logprobs, atol=1e-5)


def test_a_cancelled_request_ends_within_a_chunk_and_frees_its_slot(engine):
    long = [ask(id=str(i), max_tokens=200, n=2) for i in range(2)]
    events = engine.submit([*long, ask(id="next")])
    for event in events:
        if event.request_id == "1":
            break
    threading.Thread(target=engine.cancel, args=("0",)).start()
    after = []
    for event in events:
        after.append(event)
        if event.request_id == "next":
            break
    ended = [e.index for e in after if e.finish_reason == "cancelled"]
    assert sorted(ended) == [0, 1]
    # Both of its rows had a chunk under way, and no more.
    assert len([e for e in after if e.request_id == "0" and e.ids]) <= 2 * 2
    events.close()


def test_a_request_that_waits_can_be_cancelled_and_an_unknown_one_is_ignored(engine):
    events = engine.submit([ask(id=str(i), max_tokens=30) for i in range(6)])
    first = next(events)
    engine.cancel("5")
    engine.cancel("nobody")
    found = collect([first, *events])
    assert found["5", 0] == ((), "", "cancelled")
    assert [found[str(i), 0][2] for i in range(5)] == ["length"] * 5


def test_closing_the_events_forgets_the_batch(engine):
    events = engine.submit([ask()])
    next(events)
    assert len(engine._schedules) == 1
    events.close()
    assert not engine._schedules


def test_one_long_answer_keeps_no_one_waiting(engine):
    """Others come and go in the free slots while it runs."""
    requests = [ask(id="long", max_tokens=120)] + [ask(id=str(i)) for i in range(12)]
    ended = [e.request_id for e in engine.submit(requests) if e.finish_reason]
    assert ended[-1] == "long"


@pytest.mark.slow
def test_drafts_change_no_answer(engine):
    guessing = Engine(engine.model, tiny.tokenizer(), slots=4, chunk=3, drafts=3)
    requests = [
        ask(QUESTIONS[i % 3], *[tiny.image(i)] * (i % 2), id=str(i), max_tokens=20)
        for i in range(5)
    ]
    requests.append(ask(id="drawn", temperature=0.8, max_tokens=20))
    assert collect(guessing.submit(requests)) == collect(engine.submit(requests))


def test_nothing_is_compiled_after_the_warm_up():
    """Whatever comes: lengths, images, samples, rules, batches that grow and shrink."""
    fresh = Engine(tiny.model(seed=5), tiny.tokenizer(), slots=5, chunk=3)
    assert fresh.warm_up(160) > 0
    requests = [
        ask(
            "x" * (40 * (i % 4)),
            *[tiny.image(i), tiny.image(i + 1)][: i % 3],
            id=str(i),
            max_tokens=4 + 9 * (i % 3),
            temperature=0.9 * (i % 2),
            n=1 + i % 2,
            seed=i,
        )
        for i in range(9)
    ]
    before = compilations.count()
    together = collect(fresh.submit(requests))
    alone = collect(fresh.submit(requests[:1]))
    assert compilations.count() == before
    assert together["0", 0] == alone["0", 0]
    assert fresh.warm_up(160) == 0


def test_an_assistants_words_are_continued(engine):
    messages = [user("What?"), Message("assistant", "A cat")]
    prepared = engine.prepare(Request(messages, sampling=SHORT))
    tail = engine.tokenizer.encode("A cat")
    assert prepared.ids[-len(tail) :].tolist() == tail


def test_fixed_places_and_drafts_are_refused_together():
    with pytest.raises(ConfigError, match="places and drafts: .* give one of them"):
        Engine(tiny.model(), tiny.tokenizer(), places=96, drafts=2)


def test_too_few_places_are_named_as_the_limit(engine):
    small = Engine(engine.model, tiny.tokenizer(), places=40)
    with pytest.raises(InputError, match="there are places=40, of which you can give"):
        small.prepare(ask("x" * 60))
