"""Answers under way: at most one a session, which can be stopped from elsewhere."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator

from minigpt4_jax.errors import InputError
from minigpt4_jax.loop import Server
from minigpt4_jax.request import Event, Request


@dataclasses.dataclass
class _Answer:
    """request_id: empty before it is submitted. stopped: whether it should end."""

    request_id: str = ""
    stopped: bool = False


class Talks:
    """One server for many people, who are told apart by the name of their session."""

    def __init__(self, server: Server):
        self._server = server
        self._answers: dict[str, _Answer] = {}
        self._lock = threading.Condition()

    def __len__(self) -> int:
        return len(self._answers)

    @contextlib.contextmanager
    def turn(self, session: str) -> Iterator[Callable[[Request], Iterator[Event]]]:
        """The right to ask: gives what turns a request into its events as they come.

        Closing those events ends the answer.

        Raises:
            InputError: this session's last answer is still on its way.
        """
        answer = _Answer()
        with self._lock:
            if session in self._answers:
                raise InputError("An answer is still on its way; stop it first.")
            self._answers[session] = answer
        try:
            yield lambda request: self._events(answer, request)
        finally:
            with self._lock:
                del self._answers[session]
                self._lock.notify_all()

    def _events(self, answer: _Answer, request: Request) -> Iterator[Event]:
        answer.request_id = request.id
        with self._server.submit(request) as stream:
            if answer.stopped:  # before there was something to cancel
                self._server.cancel(request.id)
            yield from stream

    def stop(self, session: str, wait: float = 2.0) -> None:
        """End this session's answer, if any: its last event has reason "cancelled".

        Args:
            wait: seconds, at most, until whoever hears its events has let it go.
        """
        with self._lock:
            answer = self._answers.get(session)
            if answer is None:
                return
            answer.stopped = True
            self._server.cancel(answer.request_id)
            self._lock.wait_for(lambda: self._answers.get(session) is not answer, wait)
