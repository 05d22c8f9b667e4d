"""Prompts in pieces, images encoded once, prefixes kept."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from minigpt4_jax import reading
from minigpt4_jax.engine import Engine
from minigpt4_jax.pool import LEAST_PLACES
from minigpt4_jax.reading import padded, pieces
from minigpt4_jax.request import GREEDY, Request, Sampling, user

Q = tiny.CONFIG.num_slots
DRAWN = Sampling(max_tokens=8)


def built(prefix_bytes: int = 1 << 20) -> Engine:
    return Engine(
        tiny.model(), tiny.tokenizer(), slots=4, chunk=3, prefix_bytes=prefix_bytes
    )


@pytest.fixture(scope="module")
def engine():
    return built()


def ask(text, *images, sampling=DRAWN, **kw):
    return Request([user(text, *images)], sampling=sampling, **kw)


def answer(engine, request):
    events = list(engine.submit([request]))
    return [(e.index, e.ids, e.logprobs) for e in events]


class Counted:
    """Stands for a program and counts the tokens or images it was given."""

    def __init__(self, program, position):
        self.program = program
        self.position = position
        self.sizes = []

    def __call__(self, *args, **kw):
        x = args[self.position]
        self.sizes.append(x.shape[1] if self.position == 2 else x.shape[0])
        return self.program(*args, **kw)


@pytest.fixture
def counted(engine, monkeypatch):
    """The reader's programs, counted, with nothing kept at the beginning."""
    made = {
        "encode": Counted(engine.programs.encode, 1),
        "read": Counted(engine.programs.read, 2),
    }
    programs = dataclasses.replace(engine.programs, **made)
    monkeypatch.setattr(engine.reader, "programs", programs)
    engine.reader.prefixes.clear()
    engine.reader.embeddings.clear()
    return made


def test_a_second_question_about_a_photo_skips_vision_and_prefix(engine, counted):
    photo = tiny.image(3)
    answer(engine, ask("Why is it there?", photo))
    assert counted["encode"].sizes == [1]
    first, counted["read"].sizes = counted["read"].sizes, []
    engine.reader.embeddings.clear()
    warm = answer(engine, ask("And who?", photo))
    assert counted["encode"].sizes == [1]
    assert len(counted["read"].sizes) == len(first) - 1 == 1
    engine.reader.prefixes.clear()
    assert answer(engine, ask("And who?", photo)) == warm  # bit by bit
    assert counted["encode"].sizes == [1, 1]


def test_answers_are_the_same_bit_by_bit_with_and_without_what_is_kept(engine):
    without = built(prefix_bytes=0)
    for i in (0, 1, 0):
        request = ask("Why?" * 30, tiny.image(i), tiny.image(i + 1))
        assert answer(engine, request) == answer(without, request)
    assert len(without.reader.prefixes) == 0 < len(engine.reader.prefixes)


def test_another_image_or_another_text_before_it_is_another_prefix(engine, counted):
    photo, other = tiny.image(3), tiny.image(4)
    prompts = [
        engine.prepare(ask("Hm?", photo)),
        engine.prepare(ask("Hm?", other)),
        engine.prepare(ask("Hm?", photo, other)),
        engine.prepare(ask("Hm?", other, photo)),
        engine.prepare(Request([user("Say."), user("Hm?", photo)])),
    ]
    keys = {
        engine.reader._prefix_key(prepared, cut)
        for prepared in prompts
        for cut in engine.reader.cuts(prepared)
    }
    # Those of two images begin as those of one do.
    assert len(keys) == 5
    same = engine.prepare(ask("Something else?", photo))
    assert engine.reader._prefix_key(same, engine.reader.cuts(same)[0]) in keys


def test_a_prefix_ends_behind_each_image_and_samples_share_all(engine):
    prepared = engine.prepare(ask("Hm?", tiny.image(0), tiny.image(1)))
    slots, last = np.flatnonzero(prepared.slots), len(prepared.ids) - 1
    assert engine.reader.cuts(prepared) == (slots[Q - 1] + 1, slots[-1] + 1)
    samples = engine.prepare(ask("Hm?", n=3))
    assert engine.reader.cuts(samples) == (len(samples.ids) - 1,)
    text = engine.prepare(ask("Hm?"))
    assert engine.reader.cuts(text) == ()
    cut = slice(slots[Q - 2], last + 1)  # the first image keeps two slots
    short = dataclasses.replace(
        prepared, ids=prepared.ids[cut], slots=prepared.slots[cut]
    )
    assert engine.reader.cuts(short) == (2, slots[-1] + 1 - slots[Q - 2])
    assert engine.reader._slot(short, 0) == Q - 2


def test_samples_of_one_request_read_its_prompt_once(engine, counted):
    answer(engine, ask("Why is it there?", n=4))
    assert counted["read"].sizes == [64]


def test_a_prompt_that_ends_in_an_image_is_answered(engine):
    """As stage 1 trains: an image and nothing behind it."""
    whole = engine.prepare(ask("", tiny.image(0)))
    end = int(np.flatnonzero(whole.slots)[-1]) + 1
    bare = dataclasses.replace(whole, ids=whole.ids[:end], slots=whole.slots[:end])
    event = next(engine.submit([bare]))
    # The embedding at the last slot is read last, by the decoding program.
    forward = jax.jit(lambda model, *args: jax.nn.log_softmax(model(*args))[0, -1])
    image_1QD = engine.reader.embed_images(bare.pixels, bare.image_keys)[0][None]
    image_1QD = image_1QD.copy()
    args = (bare.ids[None], bare.slots[None])
    logprob_V = forward(engine.model, *args, image_1QD)
    np.testing.assert_allclose(event.logprobs[0], logprob_V[event.ids[0]], atol=1e-5)
    image_1QD[:, -1] += 0.5
    assert abs(forward(engine.model, *args, image_1QD) - logprob_V).max() > 1e-2


def test_a_prefix_is_kept_in_no_more_places_than_it_needs(engine):
    engine.reader.prefixes.clear()
    long = ask("Why? " * 30, tiny.image(7))
    first = answer(engine, long)
    ((kept, size),) = engine.reader.prefixes._values.values()
    assert engine.shapes.room(len(engine.prepare(long).ids)) > LEAST_PLACES
    assert kept.segments_BS.shape == (1, LEAST_PLACES)
    assert size == sum(x.nbytes for x in jax.tree.leaves(kept))
    assert answer(engine, long) == first  # from what was kept, bit by bit


def test_what_is_kept_is_bounded_by_bytes(engine):
    kept = engine.reader.prefixes
    sizes = [size for _, size in kept._values.values()]
    small = built(prefix_bytes=3 * max(sizes))
    for i in range(6):
        answer(small, ask("Hm?", tiny.image(i)))
    assert len(small.reader.prefixes) == 3
    assert small.reader.prefixes.bytes <= 3 * max(sizes)


def test_images_seen_before_are_not_encoded_again(engine, counted):
    prompts = [engine.prepare(ask("", tiny.image(90 + i))) for i in range(3)]
    first = engine.reader.embed_images(
        [p.pixels[0] for p in prompts[:2]] + [prompts[0].pixels[0]],
        [p.image_keys[0] for p in prompts[:2]] + [prompts[0].image_keys[0]],
    )
    again = engine.reader.embed_images(
        [p.pixels[0] for p in prompts], [p.image_keys[0] for p in prompts]
    )
    assert counted["encode"].sizes == [1, 1, 1]
    assert (first[0] == again[0]).all() and (first[0] == first[2]).all()


def test_images_encoded_together_are_as_alone(engine, counted, monkeypatch):
    prompts = [engine.prepare(ask("", tiny.image(70 + i))) for i in range(3)]
    pixels, keys = zip(*((p.pixels[0], p.image_keys[0]) for p in prompts))
    alone = engine.reader.embed_images(pixels, keys)
    engine.reader.embeddings.clear()
    monkeypatch.setattr(engine.reader, "images_at_once", reading.IMAGES_AT_ONCE)
    together = engine.reader.embed_images(pixels, keys)
    assert counted["encode"].sizes == [1, 1, 1, 4]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_long_prompt_is_read_beside_a_running_answer(engine, monkeypatch):
    """It takes many pieces, between which the other answer grows; neither changes."""
    monkeypatch.setattr("minigpt4_jax.schedule.READ_AT_ONCE", 1)
    short = ask("Hm?", sampling=dataclasses.replace(GREEDY, max_tokens=30), id="s")
    long = ask("x" * 400, id="l")
    alone = [answer(engine, request) for request in (short, long)]
    events = []
    before = 0
    for event in engine.submit([short, long]):
        events.append(event)
        if event.request_id == "s" and not any(e.request_id == "l" for e in events):
            before += 1
    assert before >= 4
    for request, wanted in zip((short, long), alone):
        ids = [e.ids for e in events if e.request_id == request.id]
        assert sum(ids, ()) == sum((ids for _, ids, _ in wanted), ())


def test_pieces_cover_a_prompt_and_end_where_prefixes_do():
    assert pieces(0, (), 0) == []
    assert pieces(0, (40, 300), 310) == [
        (0, 40),
        (40, 128),
        (168, 128),
        (296, 4),
        (300, 10),
    ]
    assert pieces(300, (40, 300), 310) == [(300, 10)]
    assert pieces(0, (9,), 9) == [(0, 9)]
    assert [padded(n) for n in (1, 16, 17, 128)] == [16, 16, 32, 128]
