"""Requests become events: the same alone, in any batch, in any slot."""

import dataclasses

import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax import engine as engine_lib
from minigpt4_jax.engine import Engine, bucket
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
    assert len(read) <= 2 * engine.slots
    events.close()


def test_an_image_seen_before_is_not_encoded_again(engine, monkeypatch):
    calls = []
    encode = engine.programs.encode

    def counted(weights, pixels_BHWC):
        calls.append(len(pixels_BHWC))
        return encode(weights, pixels_BHWC)

    counting = dataclasses.replace(engine.programs, encode=counted)
    monkeypatch.setattr(engine, "programs", counting)
    pixels = [engine.prepare(ask("", tiny.image(90 + i))).pixels[0] for i in range(3)]
    first = engine.embed_images(pixels[:2] + pixels[:1])
    again = engine.embed_images(pixels)
    assert calls == [2, 1]
    assert (first[0] == again[0]).all() and (first[0] == first[2]).all()
    monkeypatch.setattr(engine_lib, "IMAGES_KEPT", 2)
    engine.embed_images(pixels)
    assert len(engine._embeddings) == 2


def test_images_encoded_together_are_as_alone(engine):
    pixels = [engine.prepare(ask("", tiny.image(70 + i))).pixels[0] for i in range(3)]
    together = engine.embed_images(pixels)
    engine._embeddings.clear()
    for image_HWC, embedded_QD in zip(pixels, together):
        alone_QD = engine.embed_images([image_HWC])[0]
        np.testing.assert_allclose(embedded_QD, alone_QD, atol=1e-5)


def test_the_same_shapes_compile_nothing_new(engine):
    def sizes():
        programs = engine.programs
        made = (programs.encode, programs.prefill, programs.decode, programs.insert)
        return [program._cache_size() for program in made]

    requests = [ask(QUESTIONS[i % 3], tiny.image(i), id=str(i)) for i in range(6)]
    collect(engine.submit(requests))
    before = sizes()
    other = [ask(QUESTIONS[i % 2], tiny.image(i + 9), id=str(i)) for i in range(6)]
    collect(engine.submit(other))
    assert sizes() == before


def test_an_assistants_words_are_continued(engine):
    messages = [user("What?"), Message("assistant", "A cat")]
    prepared = engine.prepare(Request(messages, sampling=SHORT))
    tail = engine.tokenizer.encode("A cat")
    assert prepared.ids[-len(tail) :].tolist() == tail


def test_buckets_hold_their_size_and_waste_at_most_half():
    assert [bucket(n) for n in (1, 2, 3, 9, 17, 25, 33, 49, 300)] == [
        *(1, 2, 4, 16, 24, 32, 48, 64, 384)
    ]
    assert all(n <= bucket(n) <= 2 * n for n in range(1, 3000))
