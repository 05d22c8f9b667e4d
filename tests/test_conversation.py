"""Conversations: what they remember, and what a turn that fails leaves."""

import dataclasses

import pytest
import tiny

from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.request import GREEDY, Event, Request, user

SHORT = dataclasses.replace(GREEDY, max_tokens=8)


@pytest.fixture(scope="module")
def gen():
    return Generator(tiny.model(), tiny.tokenizer(), batch_size=1, chunk=3)


def test_a_chat_keeps_turns_and_images(gen):
    chat = gen.chat(sampling=SHORT)
    first = chat.ask("What is it?", tiny.image())
    second = chat.ask("Why?")
    whole = Request(
        [
            user("What is it?", tiny.image()),
            dataclasses.replace(chat.messages[1], text=first),
            user("Why?"),
        ],
        sampling=SHORT,
    )
    assert "".join(e.piece for e in gen.submit([whole])) == second
    assert [m.role for m in chat.messages] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.messages == []
    assert chat.ask("What is it?", tiny.image()) == first


def test_a_system_message_survives_reset(gen):
    chat = gen.chat(system="Be brief.", sampling=SHORT)
    chat.ask("Hm?")
    chat.reset()
    assert [m.text for m in chat.messages] == ["Be brief."]


def test_a_turn_that_fails_leaves_a_chat_as_it_was(gen, tmp_path):
    chat = gen.chat(sampling=SHORT)
    chat.ask("Hm?")
    for question, image in (("x" * 600, None), ("Hm?", tmp_path / "gone.jpg")):
        with pytest.raises(InputError):
            chat.ask(question, image)
    assert len(chat.messages) == 2


def test_a_turn_that_fails_on_its_way_leaves_a_chat_as_it_was(gen, monkeypatch):
    chat = gen.chat(sampling=SHORT)
    failing = [Event("a", piece="A "), Event("a", finish_reason="error", error="No.")]
    monkeypatch.setattr(gen, "submit", lambda requests: iter(failing))
    with pytest.raises(InputError, match="No."):
        chat.ask("Hm?")
    assert chat.messages == []


def test_a_chat_can_leave_out_its_oldest_turns_and_says_so(gen):
    chat = gen.chat(sampling=SHORT, overflow="drop_oldest")
    for question in ("x" * 200, "y" * 200, "z" * 200):
        *_, last = chat.events(question)
    assert last.usage.dropped_turns == 2
    assert len(chat.messages) == 6


def test_a_chat_can_be_the_references(gen):
    said = gen.chat(sampling=SHORT, compat="reference").ask("Hm?")
    request = Request([user("Hm?")], sampling=SHORT, compat="reference")
    assert said == "".join(event.piece for event in gen.submit([request]))


def test_what_was_said_before_an_interruption_is_remembered(gen):
    chat = gen.chat(sampling=dataclasses.replace(GREEDY, max_tokens=24))
    stream = chat.stream("Hm?")
    piece = next(stream)
    stream.close()
    assert [m.text for m in chat.messages] == ["Hm?", piece]


def test_a_stopped_answer_frees_the_model_and_is_remembered(gen):
    chat = gen.chat(
        sampling=dataclasses.replace(GREEDY, max_tokens=200, min_tokens=200)
    )
    said, last = [], None
    for event in chat.events("Hm?", tiny.image()):
        said.append(event.piece)
        last = event
        if len(said) == 2:
            chat.stop()
    assert last.finish_reason == "cancelled" and last.usage.answer_tokens < 10
    assert [m.text for m in chat.messages] == ["Hm?", "".join(said)]
    chat.stop()  # nothing is under way: nothing happens
    assert len(chat.ask("And?")) > 0


def test_an_answer_stopped_before_its_first_word_leaves_the_chat_as_it_was(
    gen, monkeypatch
):
    chat = gen.chat(sampling=SHORT)
    prepare = gen.engine.prepare

    def stopped(request):
        chat.stop()
        return prepare(request)

    monkeypatch.setattr(gen.engine, "prepare", stopped)
    (event,) = chat.events("Hm?", tiny.image())
    assert event.finish_reason == "cancelled" and chat.messages == []


def test_a_turn_of_which_nothing_was_heard_is_left_out(gen, monkeypatch):
    """Pieces may be empty, as where a stop string may have begun."""
    chat = gen.chat(sampling=SHORT)
    monkeypatch.setattr(gen, "submit", lambda requests: iter([Event("a", piece="")]))
    events = chat.events("Hm?")
    next(events)
    events.close()
    assert chat.messages == []


def test_a_reset_during_an_answer_stays_one(gen):
    chat = gen.chat(sampling=SHORT)
    stream = chat.stream("Hm?")
    next(stream)
    chat.reset()
    list(stream)
    assert chat.messages == []
