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

from minigpt4_jax import beam, sampling
from minigpt4_jax.answer import Answer
from minigpt4_jax.data.stops import Stops, stops, vocabulary
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.models.llama import Cache
from minigpt4_jax.pool import bucket
from minigpt4_jax.reading import Prepared
from minigpt4_jax.request import NONE_LEFT, NOT_FINITE, Event, Request, Usage


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that wants a beam search.

    end_ids: tokens that end an answer.
    stop: strings that do.
    answers: as many as the request wants, empty yet.
    began: when it came (perf_counter).
    """

    prepared: Prepared
    end_ids: tuple[int, ...]
    stop: tuple[str, ...]
    answers: tuple[Answer, ...]
    began: float

    @property
    def request(self) -> Request:
        return self.prepared.request


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
        last_B = np.zeros(len(cache.length_B), np.int32)
        last_B[: len(jobs)] = [job.prepared.ids[-1] for job in jobs]
        search = self._programs.begin(
            cache,
            last_B,
            self._rules(jobs, len(last_B)),
            beams=jobs[0].request.sampling.num_beams,
            budget=budget,
        )
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

    def _rules(self, jobs: Sequence[Job], batch: int) -> beam.Rules:
        rules = [job.request.sampling for job in jobs]
        table = self._stops(jobs[0].stop)
        spare = batch - len(jobs)

        def column(values, dtype) -> np.ndarray:
            return np.pad(np.array(values, dtype), (0, spare))

        states = [
            table.first if job.request.messages[-1].role == "user" else 0
            for job in jobs
        ]
        return beam.Rules(
            controls=sampling.controls(
                [(job.request.sampling, job.request.seed, 0) for job in jobs],
                batch,
                self._size,
            ),
            end_ids_BE=np.array(
                [*(job.end_ids for job in jobs), *[jobs[0].end_ids] * spare], np.int32
            ),
            limit_B=column([rule.max_tokens for rule in rules], np.int32),
            length_penalty_B=column(
                [rule.length_penalty for rule in rules], np.float32
            ),
            early_B=column([beam.EARLY[r.early_stopping] for r in rules], np.int32),
            next_SV=table.next_SV,
            state_B=column(states, np.int32),
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


def _events(job: Job, found: beam.Texts, failed: bool) -> list[Event]:
    """The last events of a job's answers, the best first.

    Args:
        found: of this job: ids_JA and so on.
    """
    now = time.perf_counter()
    events = []
    for index, answer in enumerate(job.answers):
        count = int(found.count_BJ[index])
        if failed or count == 0:
            failure = NOT_FINITE if failed else NONE_LEFT
            answer.push([failure], job.end_ids, 1)
            count = 0
        ids = found.ids_BJA[index, :count].tolist()
        answer.push(ids, job.end_ids, job.request.sampling.max_tokens)
        events.append(
            Event(
                request_id=job.request.id,
                index=index,
                piece=answer.piece(),
                ids=tuple(ids),
                logprobs=tuple(found.logprobs_BJA[index, :count].tolist()),
                score=float(found.score_BJ[index]) if count else None,
                finish_reason=answer.finish_reason,
                usage=Usage(
                    prompt_tokens=len(job.prepared.ids),
                    answer_tokens=answer.count,
                    seconds_to_first_token=now - job.began,
                    seconds=now - job.began,
                    dropped_turns=job.prepared.dropped_turns,
                ),
                error=answer.error,
            )
        )
    return events
