"""One answer a session, which others can stop."""

import threading
import time

import pytest
import tiny

from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.loop import Server
from minigpt4_jax.request import Request, Sampling, user
from minigpt4_jax.serving.talks import Talks


@pytest.fixture(scope="module")
def server():
    generator = Generator(tiny.model(), tiny.tokenizer(), chunk=3, places=400)
    with Server(generator) as made:
        yield made


def ask(max_tokens=300, **rules):
    sampling = Sampling(temperature=0.9, max_tokens=max_tokens, **rules)
    return Request([user("Why?")], sampling=sampling)


def idle_within(server, seconds) -> bool:
    return holds_within(lambda: not server.busy, seconds)


def holds_within(holds, seconds=60.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)
    return bool(holds())


def test_a_session_gets_one_answer_at_a_time_and_another_its_own(server):
    talks = Talks(server)
    with talks.turn("a") as events_of:
        events = events_of(ask(9))
        next(events)
        with pytest.raises(InputError, match="still on its way"):
            with talks.turn("a"):
                pass
        with talks.turn("b") as others:
            assert list(others(ask(5)))[-1].finish_reason == "length"
        assert list(events)[-1].finish_reason == "length"
    with talks.turn("a") as events_of:
        assert len(list(events_of(ask(3)))) >= 1
    assert len(talks) == 0


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_frees_the_model_within_a_second(server, beams):
    talks, heard = Talks(server), []
    going = threading.Event()

    def hear():
        with talks.turn("a") as events_of:
            going.set()
            heard.extend(events_of(ask(num_beams=beams)))

    list(server.submit(ask(num_beams=beams)))  # compiled before it is timed
    thread = threading.Thread(target=hear)
    thread.start()
    going.wait(30)
    assert holds_within(lambda: server.busy)
    began = time.monotonic()
    talks.stop("a")
    assert idle_within(server, 1.0)
    assert time.monotonic() - began < 1.0
    thread.join(timeout=30)
    assert heard[-1].finish_reason == "cancelled" and len(talks) == 0


def test_a_stop_before_the_request_is_submitted_counts(server):
    talks = Talks(server)
    with talks.turn("a") as events_of:
        talks.stop("a", wait=0)
        assert list(events_of(ask()))[-1].finish_reason == "cancelled"
    talks.stop("nobody")


def test_a_hearer_who_leaves_ends_the_answer(server):
    talks = Talks(server)
    with talks.turn("a") as events_of:
        events = events_of(ask())
        next(events)
        events.close()
    assert idle_within(server, 1.0)


def test_a_stop_waits_until_the_session_may_ask_again(server):
    talks = Talks(server)

    def hear():
        with talks.turn("a") as events_of:
            for _ in events_of(ask()):
                time.sleep(0.01)

    thread = threading.Thread(target=hear)
    thread.start()
    assert holds_within(lambda: server.busy)
    talks.stop("a", wait=30)
    with talks.turn("a"):
        pass
    thread.join(timeout=30)
