"""Beam searches for requests: rules into arrays, chunks on the device, hypotheses out.

A Schedule decides which requests are searched together; its Reader reads their prompts.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from minigpt4_jax import beam, compat, hypotheses, sampling
from minigpt4_jax.answer import Answer
from minigpt4_jax.data.stops import Stops, stops, vocabulary
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.models.llama import Cache
from minigpt4_jax.pool import bucket
from minigpt4_jax.reading import Prepared
from minigpt4_jax.request import (
    NONE_LEFT,
    NOT_FINITE,
    TOP_LOGPROBS,
    Event,
    Request,
    Usage,
)

LEAST_BUDGET = 64  # tokens that a search has room for, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that wants a beam search.

    end_ids: tokens that end an answer.
    stop: strings that do.
    rules: the original's, where the request wants those.
    answers: as many as the request wants, empty yet.
    began: when it came (perf_counter).
    """

    prepared: Prepared
    end_ids: tuple[int, ...]
    stop: tuple[str, ...]
    rules: compat.Rules | None
    answers: tuple[Answer, ...]
    began: float

    @property
    def request(self) -> Request:
        return self.prepared.request

    @property
    def kind(self) -> "Kind":
        sampling = self.request.sampling
        tops = TOP_LOGPROBS if sampling.top_logprobs else 0
        return Kind(sampling.num_beams, len(self.end_ids), self.stop, self.rules, tops)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What requests have in common that are searched together.

    ends: tokens that end an answer.
    tops: likeliest tokens that are kept of each place.
    """

    beams: int
    ends: int
    stop: tuple[str, ...]
    rules: compat.Rules | None = None
    tops: int = 0


class Searcher:
    """Searches with one model."""

    def __init__(
        self, graphdef: nnx.GraphDef, weights, tokenizer: Tokenizer, size: int
    ):
        """Args: size of the model's vocabulary."""
        self._programs = beam.programs(graphdef)
        self._weights = weights
        self._tokenizer = tokenizer
        self._size = size
        self._stops = functools.lru_cache(maxsize=16)(self._new_stops)

    def run(
        self, jobs: Sequence[Job], cache: Cache, *, budget: int, chunk: int
    ) -> Iterator[list[Event]]:
        """Events of the jobs as their searches end, after each chunk of tokens.

        Args:
            jobs: of one kind.
            cache: their prompts but for the last token, spare rows behind.
            budget: at least the most tokens that an answer may have.
        """
        search = self._begin(jobs, jobs[0].kind, cache, budget)
        going = set(range(len(jobs)))
        while going:
            search = self._programs.grow(self._weights, search, chunk)
            open_B, failed_B, found = jax.device_get(
                (search.open_B, search.failed_B, search.found)
            )
            ended = sorted(b for b in going if not open_B[b])
            going -= set(ended)
            events = []
            for b in ended:
                mine = jax.tree.map(lambda x_BJ, b=b: x_BJ[b], found)
                events += _events(jobs[b], mine, failed_B[b])
            yield events

    def warm_up(self, kind: Kind, cache: Cache, budget: int) -> None:
        """Compile what searches of this kind and shape need."""
        search = self._begin([], kind, cache, budget)
        jax.block_until_ready(self._programs.grow(self._weights, search, 1))

    def _begin(
        self, jobs: Sequence[Job], kind: Kind, cache: Cache, budget: int
    ) -> beam.Search:
        last_B = np.zeros(len(cache.length_B), np.int32)
        last_B[: len(jobs)] = [job.prepared.ids[-1] for job in jobs]
        rules = self._rules(jobs, kind, len(last_B))
        sizes = dict(beams=kind.beams, budget=budget, tops=kind.tops)
        return self._programs.begin(cache, last_B, rules, **sizes)

    def _rules(self, jobs: Sequence[Job], kind: Kind, batch: int) -> hypotheses.Rules:
        rules = [job.request.sampling for job in jobs]
        table = self._stops(kind.stop)
        spare = batch - len(jobs)
        first_ids = [kind.rules.first_id] * len(jobs) if kind.rules else []

        def column(values, dtype) -> np.ndarray:
            return np.pad(np.array(values, dtype), (0, spare))

        states = [
            table.first if job.request.messages[-1].role == "user" else 0
            for job in jobs
        ]
        return hypotheses.Rules(
            controls=sampling.controls(
                [(job.request.sampling, job.request.seed, 0) for job in jobs],
                batch,
                self._size,
                first_ids,
            ),
            end_ids_BE=np.array(
                [*(job.end_ids for job in jobs), *[(-1,) * kind.ends] * spare], np.int32
            ),
            limit_B=column([rule.max_tokens for rule in rules], np.int32),
            length_penalty_B=column(
                [rule.length_penalty for rule in rules], np.float32
            ),
            early_B=column(
                [hypotheses.EARLY[r.early_stopping] for r in rules], np.int32
            ),
            next_SV=table.next_SV,
            state_B=column(states, np.int32),
            sequences_MN=_sequences(kind.rules.stops if kind.rules else ()),
            reference=kind.rules is not None,
        )

    def _new_stops(self, strings: tuple[str, ...]) -> Stops:
        """Their table, with so many states that few programs are compiled."""
        pieces, dummy = self._vocabulary
        table = stops(strings, pieces, dummy=dummy)
        states = len(table.next_SV)
        spare = bucket(states) - states
        next_SV = np.pad(table.next_SV, ((0, spare), (0, 0)))
        return Stops(jax.device_put(next_SV), table.first)

    @functools.cached_property
    def _vocabulary(self) -> tuple[list[bytes], bool]:
        return vocabulary(self._tokenizer, self._size)


def _sequences(stops: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Of one length, -1 before the short ones."""
    longest = max(map(len, stops), default=0)
    rows = [(-1,) * (longest - len(stop)) + stop for stop in stops]
    return np.array(rows, np.int32).reshape(len(stops), longest)


def _events(job: Job, found: hypotheses.Texts, failed: bool) -> list[Event]:
    """The last events of a job's answers, the best first.

    Args:
        found: of this job: ids_JA and so on.
    """
    now, most = time.perf_counter(), job.request.sampling.top_logprobs
    events = []
    for index, answer in enumerate(job.answers):
        count = int(found.count_BJ[index])
        if failed or count == 0:
            failure = NOT_FINITE if failed else NONE_LEFT
            answer.push([failure], job.end_ids, 1)
            count = 0
        ids = found.ids_BJA[index, :count].tolist()
        both = found.top_ids_BJAU, found.top_logprobs_BJAU
        tops = [x[index, :count] if most else () for x in both]
        answer.push(ids, job.end_ids, job.request.sampling.max_tokens)
        events.append(
            Event(
                request_id=job.request.id,
                index=index,
                piece=answer.piece(),
                ids=tuple(ids),
                logprobs=tuple(found.logprobs_BJA[index, :count].tolist()),
                top_logprobs=tuple(
                    tuple(zip(ids_U[:most].tolist(), logprobs_U[:most].tolist()))
                    for ids_U, logprobs_U in zip(*tops)
                ),
                score=float(found.score_BJ[index]) if count else None,
                finish_reason=answer.finish_reason,
                usage=Usage(
                    prompt_tokens=len(job.prepared.ids),
                    answer_tokens=count,
                    seconds_to_first_token=now - job.began,
                    seconds=now - job.began,
                    dropped_turns=job.prepared.dropped_turns,
                ),
                error=answer.error,
            )
        )
    return events
