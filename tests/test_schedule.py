"""Who is read, joins and leaves."""

import dataclasses
import time

import pytest
import tiny

from minigpt4_jax.engine import Engine
from minigpt4_jax.request import GREEDY, Request, user


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.model(), tiny.tokenizer(), slots=4, chunk=3)


@pytest.fixture
def schedule(engine):
    return engine.schedule()


def add(engine, schedule, id, max_tokens=8, text="Why?", n=1, beams=1):
    sampling = dataclasses.replace(GREEDY, max_tokens=max_tokens, num_beams=beams)
    request = Request([user(text)], sampling=sampling, id=id, n=n)
    schedule.add(engine.prepare(request), time.perf_counter())


def test_a_step_takes_as_many_as_there_are_slots(engine, schedule):
    add(engine, schedule, "a", n=6)
    events = list(schedule.step())
    # The token that shows a joined row early, then a chunk.
    assert [len(e.ids) for e in events] == [1] * 4 + [3] * 4
    assert len(schedule.running) == 4 and len(schedule.waiting) == 2


def test_the_batch_follows_its_rows(engine, schedule):
    add(engine, schedule, "a", max_tokens=150)
    list(schedule.step())
    assert (len(schedule.pool.rows), schedule.pool.places) == (1, 128)
    add(engine, schedule, "b")
    list(schedule.step())
    assert len(schedule.pool.rows) == 4
    while any(row.prepared.request.id == "b" for row in schedule.running):
        list(schedule.step())
    list(schedule.step())
    assert len(schedule.pool.rows) == 1
    while schedule.busy:
        largest = schedule.pool.places
        list(schedule.step())
    assert largest == 256
    add(engine, schedule, "c")
    list(schedule.step())
    assert schedule.pool.places == 128


def test_first_come_is_first_read(engine, schedule, monkeypatch):
    monkeypatch.setattr("minigpt4_jax.schedule.READ_AT_ONCE", 1)
    for name in "abc":
        add(engine, schedule, name, text="x" * 150)
    order = []
    while schedule.busy:
        order += [e.request_id for e in schedule.step()]
    order = list(dict.fromkeys(order))
    assert order == ["a", "b", "c"]


def test_cancelled_rows_leave_from_the_line_the_reading_and_the_slots(
    engine, schedule, monkeypatch
):
    monkeypatch.setattr("minigpt4_jax.schedule.READ_AT_ONCE", 1)
    add(engine, schedule, "runs", max_tokens=100)
    list(schedule.step())
    add(engine, schedule, "is read", text="x" * 300)
    list(schedule.step())
    assert len(schedule.reading) == 1 and len(schedule.running) == 1
    add(engine, schedule, "waits")
    for name in ("runs", "is read", "waits"):
        schedule.cancel(name)
    events = list(schedule.step())
    assert {e.request_id: e.finish_reason for e in events} == {
        "runs": "cancelled",
        "is read": "cancelled",
        "waits": "cancelled",
    }
    assert not schedule.busy
    usage = {e.request_id: e.usage for e in events}
    assert usage["runs"].answer_tokens > 0 == usage["waits"].answer_tokens


def test_a_search_runs_beside_the_batch_and_can_be_cancelled(engine, schedule):
    add(engine, schedule, "plain", max_tokens=60)
    add(engine, schedule, "gone", max_tokens=60, beams=2, n=2)
    add(engine, schedule, "kept", max_tokens=6, beams=3)
    for _ in range(2):
        assert {e.request_id for e in schedule.step()} == {"plain"}
    assert [row.request.id for row in schedule.searching] == ["gone"]
    schedule.cancel("gone")
    events = []
    while schedule.busy:
        events += list(schedule.step())
    gone = [(e.index, e.finish_reason) for e in events if e.request_id == "gone"]
    assert gone == [(0, "cancelled"), (1, "cancelled")]
    (kept,) = [e for e in events if e.request_id == "kept"]
    assert kept.finish_reason == "length" and len(kept.ids) == 6
    assert [e.request_id for e in events].index("kept") < len(events) - 1
