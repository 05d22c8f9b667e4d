"""One engine loop for many threads."""

import gc
import threading
import time

import pytest
import tiny

from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.loop import BusyError, ClosedError, Server
from minigpt4_jax.request import Request, Sampling, user


@pytest.fixture(scope="module")
def gen():
    return Generator(tiny.model(), tiny.tokenizer(), batch_size=4, chunk=3)


@pytest.fixture
def server(gen):
    with Server(gen) as made:
        yield made


def ask(number=0, max_tokens=6, id=None, **kw):
    return Request(
        [user("Why? " * (1 + number % 3), *[tiny.image(number)] * (number % 2))],
        sampling=Sampling(temperature=0.9, max_tokens=max_tokens),
        seed=number,
        id=id or f"request {number}",
        **kw,
    )


def said(events):
    ids, reasons = {}, {}
    for event in events:
        ids[event.index] = ids.get(event.index, ()) + event.ids
        reasons[event.index] = event.finish_reason
    return ids, reasons


def wait_until(holds):
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("did not come to hold in 10 s")


def idle(server):
    return not server.busy


def test_no_answer_of_16_threads_is_lost_or_mixed(gen, server):
    wanted = {i: said(gen.submit([ask(i, n=1 + i % 2)])) for i in range(32)}
    found = {}

    def talk(thread):
        for number in (thread, 31 - thread):
            stream = server.submit(ask(number, id=f"{number}", n=1 + number % 2))
            events = list(stream)
            assert {e.request_id for e in events} == {f"{number}"}
            found[number] = said(events)

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == wanted
    assert idle(server)


def test_a_full_line_refuses_with_the_counts(gen):
    with Server(gen, waiting=3) as server:
        streams = []
        with pytest.raises(BusyError, match=r"\d answers wait and 3 may, so 2 more"):
            for i in range(20):
                streams.append(server.submit(ask(max_tokens=200, id=str(i), n=2)))
        assert len(streams) >= 1
        for stream in streams:
            stream.close()
        wait_until(lambda: idle(server))
        assert said(server.submit(ask()))[1] == {0: "length"}


def test_cancelling_from_another_thread_ends_a_stream(server):
    stream = server.submit(ask(max_tokens=400, id="long", n=2))
    next(stream)
    threading.Thread(target=server.cancel, args=("long",)).start()
    assert said(stream)[1] == {0: "cancelled", 1: "cancelled"}
    server.cancel("nobody")
    waits = [server.submit(ask(max_tokens=400, id=f"w{i}")) for i in range(6)]
    server.cancel("w5")
    assert said(waits[5]) == ({0: ()}, {0: "cancelled"})


def test_a_stream_that_is_closed_or_forgotten_frees_its_slots(server):
    with server.submit(ask(max_tokens=400, id="left")) as stream:
        next(stream)
    assert list(stream) == []
    forgotten = server.submit(ask(max_tokens=400, id="forgotten"))
    next(forgotten)
    assert "forgotten" in server._open and server.busy
    del forgotten
    gc.collect()
    wait_until(lambda: idle(server))
    assert list(server.submit(ask(id="forgotten")))[-1].finish_reason == "length"


def test_what_cannot_be_answered_raises_where_it_is_submitted(server):
    with pytest.raises(InputError, match="reads 512"):
        server.submit(ask(max_tokens=600))
    stream = server.submit(ask(max_tokens=300, id="twice"))
    with pytest.raises(InputError, match="'twice' is being answered"):
        server.submit(ask(id="twice"))
    gc.collect()  # what was refused must not end what runs
    assert said(stream)[1] == {0: "stop"}
    with pytest.raises(InputError, match="n: 999 answers .* 64 may wait"):
        server.submit(ask(n=999))


def test_cancelling_an_id_that_is_not_under_way_ends_no_later_request(server):
    server.cancel("later")
    stream = server.submit(ask(id="later"))
    assert said(stream)[1] == {0: "length"}
    old = server.submit(ask(id="again"))
    wait_until(lambda: "again" not in server._open)
    new = server.submit(ask(max_tokens=40, id="again"))
    old.close()  # heard to no end; its id is another's now
    assert said(new)[1] == {0: "length"}


def test_a_stream_closed_by_another_thread_ends_its_reader(server):
    stream = server.submit(ask(max_tokens=400, id="read"))
    next(stream)
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    stream.close()
    reader.join(timeout=30)
    assert not reader.is_alive()


def test_closing_ends_open_streams_with_an_error(gen):
    server = Server(gen)
    stream = server.submit(ask(max_tokens=400))
    next(stream)
    server.close()
    with pytest.raises(ClosedError, match="was closed"):
        list(stream)
    assert list(stream) == []
    with pytest.raises(ClosedError, match="was closed"):
        server.submit(ask())
    assert not server._thread.is_alive()


def test_an_error_of_the_engine_reaches_every_stream_with_its_cause(gen, monkeypatch):
    server = Server(gen)

    def broken():
        raise MemoryError("no room")
        yield

    monkeypatch.setattr(server._schedule, "step", broken)
    stream = server.submit(ask())
    with pytest.raises(ClosedError, match="MemoryError: no room") as error:
        next(stream)
    assert isinstance(error.value.__cause__, MemoryError)
    with pytest.raises(ClosedError, match="no room"):
        server.submit(ask())
    server.close()
