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
from minigpt4_jax.endings import Endings
from minigpt4_jax.pool import Pool, bucket
from minigpt4_jax.reading import Prepared, Reader, Reading
from minigpt4_jax.request import Event, Request, Usage
from minigpt4_jax.searches import LEAST_BUDGET, Job, Searcher

# Tokens of prompts that running rows wait for, at most, plus a piece.
READ_AT_ONCE = 256


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
    def request(self) -> Request:
        return self.prepared.request

    @property
    def limit(self) -> int:
        return self.request.sampling.max_tokens

    @property
    def searched(self) -> bool:
        """Whether it stands for all answers of a beam search."""
        return self.request.sampling.num_beams > 1

    def needs(self, more: int) -> int:
        """Places for `more` further tokens; the last one chosen is never read."""
        return len(self.prepared.ids) + min(self.answer.count + more, self.limit) - 1


class Schedule:
    """One running batch and the rows that wait for it.

    Beam searches run beside it, those of one kind at a time, as many as their beams
    would fill the slots, once their prompts are read. `add`, `step` and `busy` are for one thread, `cancel` for any.
    """

    def __init__(
        self, reader: Reader, pool: Pool, searcher: Searcher, endings: Endings
    ):
        self.reader = reader
        self.pool = pool
        self.shapes = pool.shapes
        self.searcher = searcher
        self.endings = endings
        self.waiting: deque[Row] = deque()
        self.searching: list[Row] = []
        self.search: Iterator[list[Event]] | None = None
        self.reading: deque[Row] = deque()
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()

    @property
    def running(self) -> list[Row]:
        return [self.pool.rows[b] for b in self.pool.taken]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.searching or self.pool.taken)

    def add(self, prepared: Prepared, began: float) -> None:
        """Put the rows of a request that came at `began` (perf_counter) into the line."""
        request = prepared.request
        rows = [
            Row(prepared, index, self.endings.answer(request), began)
            for index in range(request.n)
        ]
        self.waiting += rows[:1] if rows[0].searched else rows

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; an unknown one is ignored."""
        with self._lock:
            self._cancelled.add(request_id)

    def step(self) -> Iterator[Event]:
        """Read some of the prompts that wait, let the running rows grow by a chunk."""
        yield from self._drop()
        budget = self._read_searches(READ_AT_ONCE)
        yield from self._search()
        self._read(budget)
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
        for line in (self.waiting, self.reading, self.searching):
            dropped += [row for row in line if row.request.id in gone]
            kept = [row for row in line if row.request.id not in gone]
            line.clear()
            line.extend(kept)
        for b in self.pool.taken:
            if self.pool.rows[b].request.id in gone:
                dropped.append(self.pool.rows[b])
                self.pool.rows[b] = None
        for row in dropped:
            usage = self._usage(row, time.perf_counter())
            for index in range(row.request.n) if row.searched else [row.index]:
                yield Event(
                    row.request.id, index, finish_reason="cancelled", usage=usage
                )

    def _read_searches(self, budget: int) -> int:
        """Read pieces of the prompts of the search that comes; what is left of `budget`."""
        if not self.searching:
            self.search = None  # of requests that were all cancelled
            self._choose_searches()
        for row in () if self.search else self.searching:
            if row.reading is None:
                row.reading = self.reader.begin(row.prepared)
            while row.reading.pieces:
                if budget <= 0:
                    return 0
                budget -= self.reader.advance(row.reading)
        return budget

    def _search(self) -> Iterator[Event]:
        """Let the search grow by a chunk; it begins when its prompts are read."""
        if self.searching and not self.search and all(map(_is_read, self.searching)):
            self.search = self._begin_search()
        if not self.search:
            return
        open_ids = {row.request.id for row in self.searching}
        events = [e for e in next(self.search, []) if e.request_id in open_ids]
        ended = {event.request_id for event in events}
        self.searching = [r for r in self.searching if r.request.id not in ended]
        if not self.searching:
            self.search = None  # and its cache, also when nothing comes next
        yield from events

    def _choose_searches(self) -> None:
        """Those that wait and are of one kind, first come first served."""
        jobs = {id(row): self._job(row) for row in self.waiting if row.searched}
        if not jobs:
            return
        kind = next(iter(jobs.values())).kind
        rows = [row for row in self.waiting if row.searched]
        rows = [row for row in rows if jobs[id(row)].kind == kind]
        self.searching = rows[: self.shapes.searches(kind.beams)]
        for row in self.searching:
            self.waiting.remove(row)
        self.reader.embed([row.prepared for row in self.searching])

    def _begin_search(self) -> Iterator[list[Event]]:
        rows = self.searching
        readings = [row.reading for row in rows if row.reading is not None]
        cache = self.reader.joined(readings, bucket(len(rows)))
        for row in rows:
            row.reading = None
        return self.searcher.run(
            [self._job(row) for row in rows],
            cache,
            budget=bucket(max(row.limit for row in rows), LEAST_BUDGET),
            chunk=self.shapes.chunk,
        )

    def _job(self, row: Row) -> Job:
        request = row.request
        return Job(
            row.prepared,
            self.endings.ids(request),
            self.endings.strings(request),
            self.endings.rules(request),
            tuple(self.endings.answer(request) for _ in range(request.n)),
            row.began,
        )

    def _read(self, budget: int) -> None:
        """Read pieces of prompts, first come first served; finished rows stay in line."""
        free = self.shapes.slots - len(self.reading) - len(self.pool.taken)
        admitted = [row for row in self.waiting if not row.searched][: max(free, 0)]
        for row in admitted:
            self.waiting.remove(row)
        self.reader.embed([row.prepared for row in admitted])
        self.reading += admitted
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
            arrays = self.reader.finish(row.reading, self.endings, row.index)
            self.pool.add(row, arrays)
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
        told = any(row.request.sampling.top_logprobs for row in self.running)
        ids_BA, logprobs_BA, count_B, *tops = self.pool.look(tops=told)
        now = time.perf_counter()
        for b in self.pool.taken:
            row = self.pool.rows[b]
            new = slice(row.answer.count, int(count_B[b]))
            if new.start == new.stop:
                continue
            if row.first_token is None:
                row.first_token = now
            new_tops = [top_BAU[b, new] for top_BAU in tops]
            event = self._event(row, ids_BA[b, new], logprobs_BA[b, new], new_tops, now)
            if row.answer.finish_reason:
                self.pool.rows[b] = None
            yield event

    def _event(self, row: Row, ids_A, logprobs_A, tops: list, now: float) -> Event:
        """What its new tokens tell; `tops` is empty, or ids and logprobs of the likeliest."""
        answer, request = row.answer, row.request
        ids = ids_A.tolist()
        taken = answer.push(ids, self.endings.ids(request), row.limit)
        pairs: list[tuple] = []
        if k := request.sampling.top_logprobs:
            ids_AU, logprobs_AU = (top_AU[:taken, :k].tolist() for top_AU in tops)
            pairs = [tuple(zip(*likeliest)) for likeliest in zip(ids_AU, logprobs_AU)]
        return Event(
            request_id=request.id,
            index=row.index,
            piece=answer.piece(),
            ids=tuple(ids[:taken]),
            logprobs=tuple(logprobs_A[:taken].tolist()),
            top_logprobs=tuple(pairs),
            finish_reason=answer.finish_reason,
            usage=self._usage(row, now) if answer.finish_reason else None,
            error=answer.error,
        )

    def _usage(self, row: Row, now: float) -> Usage:
        first = now if row.first_token is None else row.first_token
        return Usage(
            prompt_tokens=len(row.prepared.ids),
            answer_tokens=row.answer.count,
            seconds_to_first_token=first - row.began,
            seconds=now - row.began,
            dropped_turns=row.prepared.dropped_turns,
        )


def _is_read(row: Row) -> bool:
    return row.reading is not None and not row.reading.pieces
