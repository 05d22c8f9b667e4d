"""Which rows are read, join, grow and leave: one running batch, step by step.

Rows (one for each sample of a request) wait in line, are read in pieces beside the
running ones, join as slots are free, and leave when they end or are cancelled.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator

from minigpt4_jax.answer import Answer
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.pool import Pool
from minigpt4_jax.reading import Prepared, Reader, Reading
from minigpt4_jax.request import Event, Usage

READ_AT_ONCE = (
    256  # tokens of prompts that running rows wait for, at most, plus a piece
)


@dataclasses.dataclass(eq=False)
class Row:
    """One answer on its way."""

    prepared: Prepared
    index: int
    answer: Answer
    began: float
    first_token: float | None = None
    reading: Reading | None = None

    @property
    def limit(self) -> int:
        return self.prepared.request.sampling.max_tokens

    def needs(self, more: int) -> int:
        """Places for `more` further tokens; the last one chosen is never read."""
        return len(self.prepared.ids) + min(self.answer.count + more, self.limit) - 1


class Schedule:
    """One running batch and the rows that wait for it.

    `add`, `step` and `busy` are for one thread, `cancel` for any.

    Args:
        stop: strings that end every answer, those of the template.
    """

    def __init__(
        self, reader: Reader, pool: Pool, tokenizer: Tokenizer, stop: tuple[str, ...]
    ):
        self.reader = reader
        self.pool = pool
        self.shapes = pool.shapes
        self.tokenizer = tokenizer
        self.stop = stop
        self.waiting: deque[Row] = deque()
        self.reading: deque[Row] = deque()
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()

    @property
    def running(self) -> list[Row]:
        return [self.pool.rows[b] for b in self.pool.taken]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.pool.taken)

    def add(self, prepared: Prepared, began: float) -> None:
        """Put the rows of a request that came at `began` (perf_counter) into the line."""
        request = prepared.request
        for index in range(request.n):
            answer = Answer(
                self.tokenizer,
                stop=(*request.stop, *self.stop),
                starts=request.messages[-1].role == "user",
            )
            self.waiting.append(Row(prepared, index, answer, began))

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; an unknown one is ignored."""
        with self._lock:
            self._cancelled.add(request_id)

    def step(self) -> Iterator[Event]:
        """Read some of the prompts that wait, let the running rows grow by a chunk."""
        yield from self._drop()
        self._read()
        if self._join():
            yield from self._decode(1)
        if self.pool.taken:
            yield from self._decode(self.shapes.chunk)

    def _drop(self) -> Iterator[Event]:
        """Take out the rows of cancelled requests, wherever they are."""
        with self._lock:
            gone, self._cancelled = self._cancelled, set()
        if not gone:
            return
        dropped = []
        for line in (self.waiting, self.reading):
            kept = [row for row in line if row.prepared.request.id not in gone]
            dropped += [row for row in line if row.prepared.request.id in gone]
            line.clear()
            line.extend(kept)
        for b in self.pool.taken:
            if self.pool.rows[b].prepared.request.id in gone:
                dropped.append(self.pool.rows[b])
                self.pool.rows[b] = None
        for row in dropped:
            yield Event(
                row.prepared.request.id,
                row.index,
                finish_reason="cancelled",
                usage=self._usage(row, time.perf_counter()),
            )

    def _read(self) -> None:
        """Read pieces of prompts, first come first served; finished rows stay in line."""
        free = self.shapes.slots - len(self.reading) - len(self.pool.taken)
        admitted = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        self.reader.embed([row.prepared for row in admitted])
        self.reading += admitted
        budget = READ_AT_ONCE
        for row in self.reading:
            if row.reading is None:
                row.reading = self.reader.begin(row.prepared)
            while row.reading.pieces and budget > 0:
                budget -= self.reader.advance(row.reading)
            if budget <= 0:
                return

    def _join(self) -> bool:
        """Give slots to rows that are read; whether there were any."""
        ready = []
        while self.reading and self.reading[0].reading is not None:
            if self.reading[0].reading.pieces:
                break
            ready.append(self.reading.popleft())
        if not (ready or self.pool.taken):
            return False
        self._fit(ready)
        for row in ready:
            assert row.reading is not None
            self.pool.add(
                row,
                self.reader.finish(row.reading, self.tokenizer.eos_ids, row.index),
            )
            row.reading = None
        return bool(ready)

    def _fit(self, ready: list[Row]) -> None:
        """Choose the batch's shape for the rows that run and those that join."""
        pool, rows = self.pool, [*self.running, *ready]
        a_pass = 1 + self.shapes.drafts
        more = (1 + self.shapes.chunk) * a_pass
        width = self.shapes.width(len(rows))
        places = self.shapes.room(max(row.needs(more) for row in rows) + a_pass)
        if self.running:  # moving them costs more than a small gain
            if width < len(pool.rows) and (self.waiting or self.reading):
                width = len(pool.rows)
            if pool.places // 4 < places < pool.places and width == len(pool.rows):
                places = pool.places
        pool.fit(width, places)

    def _decode(self, steps: int) -> Iterator[Event]:
        """Let the running rows grow; those that ended give up their slots."""
        self.pool.decode(steps)
        ids_BA, logprobs_BA, count_B = self.pool.look()
        now = time.perf_counter()
        for b in self.pool.taken:
            row = self.pool.rows[b]
            if row.first_token is None:
                row.first_token = now
            new = slice(row.answer.count, int(count_B[b]))
            if new.start == new.stop:
                continue
            event = self._event(row, ids_BA[b, new], logprobs_BA[b, new], now)
            if row.answer.finish_reason:
                self.pool.rows[b] = None
            yield event

    def _event(self, row: Row, ids_A, logprobs_A, now: float) -> Event:
        ids = ids_A.tolist()
        taken = row.answer.push(ids, self.tokenizer.eos_ids, row.limit)
        event = Event(
            request_id=row.prepared.request.id,
            index=row.index,
            piece=row.answer.piece(),
            ids=tuple(ids[:taken]),
            logprobs=tuple(logprobs_A[:taken].tolist()),
        )
        reason = row.answer.finish_reason
        if reason is None:
            return event
        usage = self._usage(row, now)
        return dataclasses.replace(event, finish_reason=reason, usage=usage)

    def _usage(self, row: Row, now: float) -> Usage:
        first = now if row.first_token is None else row.first_token
        return Usage(
            prompt_tokens=len(row.prepared.ids),
            answer_tokens=row.answer.count,
            seconds_to_first_token=first - row.began,
            seconds=now - row.began,
        )
