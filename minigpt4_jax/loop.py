"""One model for many threads: requests from any of them, one batch that answers all.

with Server(Generator.load("demo")) as server:
    for event in server.submit(request):
        ...
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator

from minigpt4_jax import memory
from minigpt4_jax.errors import InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.reading import Prepared
from minigpt4_jax.request import Event, Request


class BusyError(RuntimeError):
    """As many requests wait as may; try again later."""


class ClosedError(RuntimeError):
    """The server was closed, or its thread ended by an error (`__cause__`)."""


@dataclasses.dataclass
class _Open:
    """A request under way: where its events go, and how many answers have not ended."""

    events: "queue.SimpleQueue[Event | ClosedError]"
    left: int


class Stream(Iterator[Event]):
    """Events of one request as they come; closing it cancels what is left of it."""

    def __init__(self, server: "Server", request: Request):
        self.request_id = request.id
        self.events: queue.SimpleQueue[Event | ClosedError] = queue.SimpleQueue()
        self._server = server
        self._left = request.n

    def __next__(self) -> Event:
        if self._left <= 0:  # below 0: closed by another thread, which then heard more
            raise StopIteration
        event = self.events.get()
        if isinstance(event, ClosedError):
            self._left = 0
            raise event
        self._left -= event.finish_reason is not None
        return event

    def close(self) -> None:
        """Hear no more; the slots of the request become free with the next chunk."""
        if self._left:
            self._left = 0
            self._server._forget(self)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Server:
    """Runs a generator's engine in a thread of its own.

    Args:
        waiting: answers that may wait for a slot; one more is refused.

    Its methods are for any thread. A server that is left by `with` is closed.
    """

    def __init__(self, generator: Generator, *, waiting: int = 64):
        self._engine, self._need = generator.engine, generator.need
        self._schedule = self._engine.schedule()
        self._waiting = waiting
        self._inbox: list[tuple[Prepared, float]] = []
        self._cancelled: set[str] = set()
        self._open: dict[str, _Open] = {}
        self._wake = threading.Condition()
        self._closed: ClosedError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a request waits, is answered, or still holds slots."""
        return bool(self._open or self._schedule.busy)

    def submit(self, request: Request) -> Stream:
        """Put a request into the line.

        Raises:
            InputError: it cannot be answered, or its id is that of one under way.
            BusyError: the line is full.
            ClosedError: nothing is answered any more.
        """
        began = time.perf_counter()
        if request.n > self._waiting:
            raise InputError(
                f"n: {request.n} answers are wanted, and {self._waiting} may wait; ask "
                "for fewer or give the server a larger `waiting`"
            )
        prepared = self._engine.prepare(request)  # in the caller's thread: many at once
        with self._wake:
            if self._closed:
                raise ClosedError(str(self._closed)) from self._closed.__cause__
            if request.id in self._open:
                raise InputError(f"id: {request.id!r} is being answered; give another")
            line = sum(p.request.n for p, _ in self._inbox)
            line += len(self._schedule.waiting)
            if line + request.n > self._waiting:
                raise BusyError(
                    f"{line} answers wait and {self._waiting} may, so {request.n} more "
                    "are refused; try again later"
                )
            stream = Stream(self, request)
            self._open[request.id] = _Open(stream.events, request.n)
            self._inbox.append((prepared, began))
            self._wake.notify()
        return stream

    def cancel(self, request_id: str) -> None:
        """End a request; its stream gives a last event with reason "cancelled".

        Its slots are free after the chunk that is running. An unknown id is ignored.
        """
        with self._wake:
            if request_id in self._open:
                self._cancelled.add(request_id)

    def _forget(self, stream: Stream) -> None:
        """Cancel the request of a stream, unless another one has its id by now."""
        with self._wake:
            request = self._open.get(stream.request_id)
            if request is not None and request.events is stream.events:
                self._cancelled.add(stream.request_id)

    def close(self) -> None:
        """Stop after the running chunk; streams that are open raise ClosedError."""
        self._end(ClosedError("the server was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with memory.told(self._need):
                while self._take():
                    for event in self._schedule.step():
                        self._send(event)
        except BaseException as error:
            stopped = ClosedError(
                f"the engine stopped: {type(error).__name__}: {error}"
            )
            stopped.__cause__ = error
            self._end(stopped)

    def _take(self) -> bool:
        """Wait for work and put it into the schedule's line; False when closed."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._closed or self._inbox or self._schedule.busy
            )
            for prepared, began in self._inbox:
                self._schedule.add(prepared, began)
            self._inbox.clear()
            for request_id in self._cancelled:
                self._schedule.cancel(request_id)
            self._cancelled.clear()
            return self._closed is None

    def _send(self, event: Event) -> None:
        with self._wake:
            request = self._open.get(event.request_id)
            if request is None:
                return  # closed meanwhile
            request.events.put(event)
            request.left -= event.finish_reason is not None
            if not request.left:
                del self._open[event.request_id]
                self._cancelled.discard(event.request_id)

    def _end(self, reason: ClosedError) -> None:
        with self._wake:
            self._closed = self._closed or reason
            for request in self._open.values():
                request.events.put(self._closed)
            self._open.clear()
            self._wake.notify()
