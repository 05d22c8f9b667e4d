"""Requests are checked when made, so that nothing behind them has to."""

import dataclasses

import numpy as np
import pytest

from minigpt4_jax.errors import InputError
from minigpt4_jax.request import GREEDY, Message, Request, Sampling, user


def test_defaults_are_those_of_the_reference_chat():
    theirs = dict(
        temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.05, max_tokens=300
    )
    off = dict(
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        no_repeat_ngram=0,
        min_tokens=0,
        banned_ids=(),
        stop_ids=(),
        top_logprobs=0,
        num_beams=1,
        length_penalty=1.0,
        early_stopping=False,
    )
    assert dataclasses.asdict(Sampling()) == theirs | off
    assert not Sampling().greedy


def test_greedy_filters_and_penalises_nothing():
    assert GREEDY.greedy
    assert (GREEDY.top_k, GREEDY.top_p, GREEDY.repetition_penalty) == (0, 1.0, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature="1"),
        dict(top_k=-1),
        dict(top_k=1.5),
        dict(top_k=True),
        dict(top_p=0.0),
        dict(top_p=1.01),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=float("inf")),
        dict(max_tokens=0),
        dict(min_p=1.5),
        dict(presence_penalty=float("nan")),
        dict(frequency_penalty="0.5"),
        dict(no_repeat_ngram=-2),
        dict(min_tokens=301),
        dict(banned_ids=5),
        dict(stop_ids="<s>"),
        dict(top_logprobs=21),
    ],
    ids=str,
)
def test_a_wrong_sampling_knob_is_named_with_its_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=name) as error:
        Sampling(**wrong)
    given = repr(value) in str(error.value)
    assert given or type(value).__name__ in str(error.value)


@pytest.mark.parametrize("name", ["banned_ids", "stop_ids"])
def test_token_ids_are_whole_numbers_each_once(name):
    assert getattr(Sampling(**{name: [7, np.int32(3), 7]}), name) == (7, 3)
    for wrong in ([-1], [1.5], ["a"]):
        with pytest.raises(InputError, match=f"{name}: got {wrong[0]!r}"):
            Sampling(**{name: wrong})


def test_more_stop_ids_than_there_is_room_for_are_refused():
    with pytest.raises(InputError, match="stop_ids: got 17 tokens, want at most 16"):
        Sampling(stop_ids=list(range(17)))


def test_a_message_takes_images_of_the_user_only():
    assert user("What is it?", "a.jpg", b"png").images == ("a.jpg", b"png")
    with pytest.raises(InputError, match="'assistant' cannot show images"):
        Message("assistant", "Look", ("a.jpg",))
    with pytest.raises(InputError, match="list or tuple"):
        Message("user", "One path is not a list of paths", "a.jpg")


def test_an_unknown_role_gets_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'assistant'"):
        Message("assistent", "Hello")


def test_images_stay_out_of_the_repr_and_out_of_equality():
    image_HWC = np.zeros((2, 2, 3), np.uint8)
    assert "array" not in repr(user("Look", image_HWC))
    assert user("Look", image_HWC) == user("Look", image_HWC.copy())


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        ["Hello"],
        [Message("system", "Be brief.")],
        [user("Hello"), Message("system", "Be brief.")],
    ],
    ids=str,
)
def test_messages_that_ask_nothing_are_refused(messages):
    with pytest.raises(InputError, match="messages"):
        Request(messages)


def test_an_answer_can_be_continued():
    request = Request([user("Hello"), Message("assistant", "Hi the")])
    assert request.messages[-1].text == "Hi the"


@pytest.mark.parametrize(
    "wrong",
    [
        dict(stop=[""]),
        dict(stop=[3]),
        dict(seed=-1),
        dict(seed=2**32),
        dict(n=0),
        dict(sampling={"temperature": 0}),
        dict(id=""),
        dict(overflow="drop"),
        dict(compat="original"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_request_is_named(wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(InputError, match=name):
        Request([user("Hello")], **wrong)


def test_one_stop_string_need_not_be_a_list():
    assert Request([user("Hello")], stop="END").stop == ("END",)


def test_requests_get_ids_of_their_own():
    assert Request([user("Hello")]).id != Request([user("Hello")]).id


def test_text_that_utf_8_cannot_hold_is_refused():
    with pytest.raises(InputError, match="character 2 is half of a surrogate pair"):
        user("a \ud83d")


@pytest.mark.parametrize(
    "wrong",
    [
        dict(n=2),
        dict(stop="END"),
        dict(sampling=Sampling(stop_ids=[5])),
        dict(overflow="drop_oldest"),
    ],
    ids=str,
)
def test_what_the_original_could_not_do_is_refused_beside_compat(wrong):
    with pytest.raises(InputError, match="compat 'reference'"):
        Request([user("Hello")], compat="reference", **wrong)
