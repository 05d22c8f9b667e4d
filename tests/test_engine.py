"""Requests become events: the same alone, in any batch, in any slot."""

import dataclasses
import threading

import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax import compilations
from minigpt4_jax.engine import Engine
from minigpt4_jax.errors import InputError
from minigpt4_jax.request import GREEDY, Message, Request, Sampling, user

SHORT = dataclasses.replace(GREEDY, max_tokens=8)
# Prompts of one bucket (48 tokens) and answers of another (8), to compile little.
QUESTIONS = ("Why? Why? Why?", "Who is in there?", "What can you see?")


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.model(), tiny.tokenizer(), slots=4, chunk=3)


def ask(text=QUESTIONS[0], *images, id="a", max_tokens=8, temperature=0.0, **kw):
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
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


def test_a_row_is_the_same_alone_in_any_batch_in_any_slot(engine):
    requests = [
        ask(
            QUESTIONS[i % 3],
            *[tiny.image(i), tiny.image(i + 1)][: i % 3],
            id=str(i),
            max_tokens=5 + i % 4,
            temperature=0.9 * (i % 2),
            seed=i,
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
