"""Ends a run that stands still, or that has lost a process, so that it is started again.

A thread counts the steps that have ended. Of several processes, each tells process 0 how
far it is, over the connections of cluster.py; process 0 judges and names those that lag.
The others judge process 0 alone. JAX's own service is not asked: what has to be found out
here is that it does not answer.
"""

import contextlib
import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minigpt4_jax import alive
from minigpt4_jax.cluster import Team, wait
from minigpt4_jax.errors import ClusterError, say

logger = logging.getLogger(__name__)

# What a process is doing, beside what `other` names.
BEFORE, FIRST, STEP, END = "before its first step", "first step", "step", "closing"
MANY = 10  # times the median step is still no reason
NAMED = 8  # most processes in a message
STDERR = 2  # not sys.stderr, which may be no file
REPORT_S = 4  # for log and stacks, less than cluster._delay_abort gives


class Pace:
    """How many steps have ended, and how long what is under way has taken.

    A step may take limit_s, or ten times the median if that is longer; the first one,
    which compiles, and what is no step, other_s. So may each part of what comes before,
    or the time between two signs of life (alive.py) of one that goes on for hours.
    """

    def __init__(
        self,
        limit_s: float,
        other_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.limit_s, self.other_s, self._clock = limit_s, other_s, clock
        self._lock = threading.Lock()
        self._step, self._phase, self._began = 0, BEFORE, clock()
        self._signs = alive.signs()
        self._seconds: deque[float] = deque(maxlen=100)

    def before(self, what: str) -> None:
        """A part of what comes before the first step begins."""
        with self._lock:
            self._phase, self._began = f"{BEFORE}, {what}", self._clock()

    def begin(self, step: int) -> None:
        """The loop begins, at a step that is counted from 0."""
        with self._lock:
            self._step, self._phase, self._began = step, FIRST, self._clock()

    def ended(self, step: int) -> None:
        """So many steps have ended: the result of the last one is on this host."""
        with self._lock:
            if step == self._step:
                return
            now = self._clock()
            if self._phase == STEP:
                self._seconds.append(now - self._began)
            self._step, self._phase, self._began = step, STEP, now

    def end(self) -> None:
        """The last step has ended; what is left is to save and to close."""
        with self._lock:
            self._phase, self._began = END, self._clock()

    @contextlib.contextmanager
    def other(self, what: str) -> Iterator[None]:
        """Something that is no step, in the middle of one or between two."""
        with self._lock:
            phase, began, since = self._phase, self._began, self._clock()
            self._phase, self._began = what, since
        try:
            yield
        finally:
            with self._lock:
                self._phase, self._began = phase, began + self._clock() - since

    def forgive(self, seconds: float) -> None:
        """Time in which the whole process was stopped."""
        with self._lock:
            self._began += seconds

    def status(self) -> dict[str, Any]:
        """For the others: `step`, `phase`, its `seconds`, and why that is too `late`."""
        with self._lock:
            if self._phase.startswith(BEFORE) and self._signs != alive.signs():
                self._signs, self._began = alive.signs(), self._clock()
            seconds, median = self._clock() - self._began, 0.0
            if self._seconds:
                median = statistics.median(self._seconds)
            step, phase = self._step, self._phase
        late = ""
        if phase == STEP and seconds > max(self.limit_s, MANY * median):
            late = (
                f"no step has ended for {seconds:.0f} s (config.watchdog.limit_s="
                f"{self.limit_s:g}, the median step takes {median:.2g} s)"
            )
        elif phase != STEP and seconds > self.other_s:
            what = f"its {phase} has not ended"
            if phase.startswith(BEFORE):
                what = f"{phase}: no sign of life"
            late = (
                f"{what} for {seconds:.0f} s (config.watchdog.other_s={self.other_s:g})"
            )
        return {"step": step, "phase": phase, "seconds": seconds, "late": late}


@dataclass
class Peer:
    """What is known of a process.

    Attributes:
        status: the last one it told (Pace.status).
        heard: when that was.
        gone: whether it has closed its connection.
        done: whether it has finished.
        failed: exit code and text of what has ended it.
        failed_at: when that was known.
    """

    name: str
    status: Mapping[str, Any]
    heard: float
    gone: bool = False
    done: bool = False
    failed: Mapping[str, Any] | None = None
    failed_at: float = 0.0


@dataclass
class Verdict:
    """With which exit code a run ends, and why.

    Attributes:
        of: the process that an error has ended; None: processes are lost or stand still.
    """

    code: int
    text: str
    of: int | None = None


def judge(peers: Mapping[int, Peer], now: float, limit_s: float) -> Verdict | None:
    """What ends a run, if anything does.

    Args:
        peers: all processes, or those that are known of, this one included.
        limit_s: silence after which a process counts as lost.
    """
    peers = {i: peer for i, peer in peers.items() if not peer.done}
    failed = {i: peer for i, peer in peers.items() if peer.failed}
    said = "; ".join(f"{p.name}: {p.failed['text']}" for p in failed.values())
    for index, peer in peers.items():
        if index not in failed and (peer.gone or now - peer.heard > limit_s):
            text = where(peers, now, limit_s)
            return Verdict(ClusterError.exit_code, f"{text}; {said}" if said else text)
    for index, peer in failed.items():
        # Its error may be that another is lost, which then is not heard of again.
        others = (other for i, other in peers.items() if i != index)
        if all(other.heard > peer.failed_at for other in others):
            return Verdict(peer.failed["code"], said, index)
    late = [peer for peer in peers.values() if peer.status["late"]]
    # A step waits for all: one may still do what takes longer, a save or its first step.
    busy = [p for p in peers.values() if p.status["phase"] != STEP and p not in late]
    if failed or busy or not late:
        return None
    text = f"{late[0].name}: {late[0].status['late']}"
    return Verdict(ClusterError.exit_code, f"{text}; {where(peers, now, limit_s)}")


def where(peers: Mapping[int, Peer], now: float, limit_s: float) -> str:
    """How far the processes are, in a sentence: those that are lost, that lag, the others."""
    said, answering = [], []
    for peer in peers.values():
        silent = now - peer.heard
        if peer.gone:
            said.append(f"{peer.name} is gone, last heard of {_at(peer.status)}")
        elif silent > limit_s / 2:
            last = f"for {silent:.0f} s, last heard of {_at(peer.status)}"
            said.append(f"{peer.name} has not answered {last}")
        else:
            answering.append(peer.status | {"name": peer.name, "at": _at(peer.status)})
    answering.sort(key=lambda s: (not s["phase"].startswith(BEFORE), s["step"]))
    # From the furthest on, which is what most do where there is a tie.
    places = Counter(status["at"] for status in reversed(answering))
    usual = places.most_common(1)[0][0] if places else ""
    said += [
        f"{status['name']} is {status['at']} for {status['seconds']:.0f} s"
        for status in answering
        if status["at"] != usual
    ]
    if len(said) > NAMED:
        said[NAMED:] = [f"{len(said) - NAMED} more"]
    if usual:
        rest = "the others are" if said else "all are" if len(peers) > 1 else "it is"
        said.append(f"{rest} {usual}")
    return "; ".join(said)


def _at(status: Mapping[str, Any]) -> str:
    step, phase = status["step"], status["phase"]
    if phase.startswith(BEFORE):
        return phase
    return f"after step {step}" + ("" if phase == STEP else f" in its {phase}")


class Watchdog:
    """Watches while it is entered, in a thread. The loop tells `pace` of its steps."""

    def __init__(
        self,
        folder: Path,
        limit_s: float,
        other_s: float,
        team: Team | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args: folder for the stacks of all threads; team: the processes, of several."""
        self._folder, self._limit_s, self._clock = Path(folder), limit_s, clock
        self.pace = Pace(limit_s, other_s, clock)
        self._index, self._lines = (team.index, team.lines) if team else (0, {})
        self._peers = {
            i: Peer(
                team.name(i) if team else "this process", self.pace.status(), clock()
            )
            for i in sorted((self._index, *self._lines))
        }
        self._interval = min(max(limit_s / 10, 0.1), 5.0)  # between two messages
        self._told = self._looked = clock()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self._lines:
            self._leave_with(error)
        with self._lock:
            self._send(done=True)
            self._over.set()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Where an error of one of several processes ends it, and the others, at once: not
        by way of what closes files and saves, and waits for those others to come along."""
        try:
            yield
        except BaseException as error:
            if self._lines:
                self._leave_with(error)
            raise

    def _leave_with(self, error: BaseException) -> NoReturn:
        """Tell the others; leave when they go on answering, else it is their error."""
        code = say(error, sys.argv)
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        with self._lock:
            self._fails(self._index, {"code": code, "text": text})
            self._send(failed=self._peers[self._index].failed)
        self._over.wait()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # JAX's way out waits for the others

    # The thread. Nothing in it waits for the network, or for the thread that trains.

    def _run(self) -> None:
        while True:
            if any(line.open for line in self._lines.values()):
                wait(self._lines.values(), self._told + self._interval - self._clock())
            else:
                self._over.wait(self._interval)
            with self._lock:
                if self._over.is_set():
                    return
                self._look()

    def _look(self) -> None:
        now = self._clock()
        stopped = now - self._looked - self._interval
        if stopped > max(1.0, 2 * self._interval):
            # The whole process was, as by Ctrl-Z: no step's time, and no one's silence.
            self.pace.forgive(stopped)
            for peer in self._peers.values():
                peer.heard += stopped
        self._looked = now
        own = self._peers[self._index]
        own.status, own.heard = self.pace.status(), now
        for index, line in self._lines.items():
            for message in line.receive():
                self._hear(index, message)
            self._peers[index].gone = not line.open
        if now - self._told >= self._interval:
            self._told = now
            self._send(status=own.status)
        if (verdict := self._verdict(now)) is not None:
            if self._index == 0:
                self._send(verdict=vars(verdict))
            self._carry_out(verdict)

    def _hear(self, index: int, message: Mapping[str, Any]) -> None:
        peer = self._peers[index]
        peer.heard = self._looked
        peer.status = message.get("status", peer.status)
        peer.done = message.get("done", peer.done)
        if "failed" in message:
            self._fails(index, message["failed"])
        if "verdict" in message:
            self._carry_out(Verdict(**message["verdict"]))

    def _fails(self, index: int, failed: Mapping[str, Any]) -> None:
        self._peers[index].failed = failed
        self._peers[index].failed_at = self._clock()

    def _verdict(self, now: float) -> Verdict | None:
        """Process 0 judges all; the others judge it, and themselves when it has finished."""
        if self._index == 0:
            return judge(self._peers, now, self._limit_s)
        first = self._peers[0]
        if first.done:
            return judge({self._index: self._peers[self._index]}, now, self._limit_s)
        if first.gone or now - first.heard > self._limit_s:
            text = where({0: first}, now, self._limit_s)
            return Verdict(ClusterError.exit_code, text)
        return None

    def _send(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)

    def _carry_out(self, verdict: Verdict) -> None:
        if verdict.of == self._index:
            self._over.set()  # the error goes its way in the thread that trains
            return
        path = self._folder / f"{self._index}.txt"
        parts = [
            threading.Thread(target=part, args=(verdict, path), daemon=True)
            for part in (_say, _write)
        ]
        until = self._clock() + REPORT_S
        for thread in parts:
            thread.start()
        for thread in parts:
            thread.join(max(until - self._clock(), 0))
        os._exit(verdict.code)  # the thread that trains may never come back


# Each may hang by itself: at a pipe that nobody reads, at a disk that is gone.


def _say(verdict: Verdict, path: Path) -> None:
    if verdict.of is not None:
        logger.error("ended by another process: %s", verdict.text)
        return
    logger.error(
        "%s; ends with exit code %d, to be started again; stacks of all threads follow, "
        "and are in %s",
        *(verdict.text, verdict.code, path),
    )
    faulthandler.dump_traceback(STDERR)


def _write(verdict: Verdict, path: Path) -> None:
    if verdict.of is not None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            print(verdict.text, end="\n\n", file=file, flush=True)
            faulthandler.dump_traceback(file)
