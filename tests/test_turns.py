"""A conversation: what the model is asked and what the page shows."""

import numpy as np
import pytest

from minigpt4_jax.errors import InputError
from minigpt4_jax.request import Sampling, Usage
from minigpt4_jax.serving.photos import Photo
from minigpt4_jax.serving.turns import Conversation, note

GREY, BLACK = (
    Photo(np.full((4, 4, 3), value, np.uint8), f"/shown/{value}.jpg", key=str(value))
    for value in (128, 0)
)


def talked(*questions, photo=GREY):
    conversation = Conversation()
    for question in questions:
        turn = conversation.ask(question, photo)
        turn.answer, turn.note = f"Answer to {question}", "1 token"
    return conversation


def request(conversation, seed=0):
    return conversation.request(Sampling(), seed)


def test_all_turns_are_asked_and_the_last_waits_for_its_answer():
    conversation = talked("One?", "Two?")
    conversation.ask("Three?", GREY)
    messages = request(conversation).messages
    assert [(m.role, m.text) for m in messages] == [
        ("user", "One?"),
        ("assistant", "Answer to One?"),
        ("user", "Two?"),
        ("assistant", "Answer to Two?"),
        ("user", "Three?"),
    ]


def test_a_photo_is_shown_once_until_another_one_comes():
    conversation = talked("One?", "Two?")
    conversation.ask("Three?", BLACK)
    conversation.ask("Four?", None)
    images = [m.images for m in request(conversation).messages if m.role == "user"]
    assert [len(i) for i in images] == [1, 0, 1, 0]
    assert images[2][0] is BLACK.squashed_HWC
    assert conversation.photo is BLACK


def test_no_two_answers_are_drawn_from_one_seed():
    conversation, seeds = Conversation(), set()
    for _ in range(3):  # asked, taken back, asked again
        conversation.ask("Why?", None)
        seeds.add(request(conversation, seed=7).seed)
        conversation.take_back(0)
    assert seeds == {7, 8, 9}
    conversation.ask("Why?", None)
    assert request(conversation, seed=2**32 - 1).seed == 2


@pytest.mark.parametrize(
    "question, complaint", [("  \n", "Type a question"), ("x" * 9000, "9,000 char")]
)
def test_what_cannot_be_asked_changes_nothing(question, complaint):
    conversation = talked("One?")
    with pytest.raises(InputError, match=complaint):
        conversation.ask(question, BLACK)
    assert len(conversation.turns) == 1 and conversation.photo is GREY


def test_a_turn_is_taken_back_with_all_that_followed():
    conversation = talked("One?", "Two?", "Three?")
    assert conversation.take_back(1).question == "Two?"
    assert [turn.question for turn in conversation.turns] == ["One?"]
    for index in (1, -1):
        with pytest.raises(InputError, match="not part of this conversation"):
            conversation.take_back(index)


def test_the_page_shows_photo_question_answer_and_note_and_whose_turn_each_is():
    conversation = talked("One?", "Two?")
    conversation.ask("Three?", None)
    messages, turns = conversation.shown()
    assert turns == [0, 0, 0, 0, 1, 1, 1, 2]
    assert messages[0]["content"][0]["path"] == "/shown/128.jpg"
    assert [m["content"][0].get("text") for m in messages[4:]] == [
        "Two?",
        "Answer to Two?",
        "1 token",
        "Three?",
    ]


def test_a_cleared_conversation_draws_again_from_the_first_seed():
    conversation = talked("One?", "Two?")
    conversation.clear()
    assert conversation.turns == []
    conversation.ask("One?", GREY)
    assert request(conversation, seed=7).seed == 7


def usage(tokens=21, first=0.5, seconds=1.5, dropped=0):
    return Usage(50, tokens, first, seconds, dropped)


@pytest.mark.parametrize(
    "spent, reason, told",
    [
        (usage(), "stop", "21 tokens · 20.0 tokens/s · 1.5 s"),
        (usage(first=1.5), "stop", "21 tokens · 1.5 s"),
        (usage(tokens=1), "stop", "1 token · 1.5 s"),
        (usage(), "cancelled", "21 tokens · 20.0 tokens/s · 1.5 s · stopped"),
        (usage(tokens=0), "cancelled", "0 tokens · 1.5 s · stopped"),
        (
            usage(dropped=2),
            "length",
            "21 tokens · 20.0 tokens/s · 1.5 s · cut off at the most tokens · "
            "the oldest 2 messages were left out",
        ),
    ],
)
def test_the_note_tells_speed_time_and_what_is_unusual(spent, reason, told):
    assert note(spent, reason) == told
