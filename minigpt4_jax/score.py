"""How likely given answers are: log-probabilities of their tokens after a prompt.

The prompt is read once. Answers lie behind one another in rows, each a branch that sees
the prompt and itself (attention_mask in models/layers.py). A is an answer token, and T
one that is read: the prompt's last, then all answers but for their own last tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax import compilations
from minigpt4_jax.data.prompts import training_answer
from minigpt4_jax.data.tokens import lay_out
from minigpt4_jax.decoding import spread
from minigpt4_jax.engine import Engine
from minigpt4_jax.errors import InputError
from minigpt4_jax.models.layers import BRANCHES
from minigpt4_jax.models.llama import Cache
from minigpt4_jax.pool import bucket
from minigpt4_jax.reading import PIECES
from minigpt4_jax.request import Message, Request, Sampling

ROW = 512  # tokens of a row, unless one answer alone is longer
LOGITS = 64  # positions whose logits are held at once


@dataclass(frozen=True)
class Score:
    """Log-likelihood of an answer: `logprobs` of its tokens `ids`, natural logarithms."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Of the whole answer."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """A token, so that answers of different lengths compare."""
        return self.total / len(self.ids)


def score(
    engine: Engine, messages: Sequence[Message], answers: Sequence[str], *, end: bool
) -> list[Score]:
    """Scores of the answers to a conversation; `Generator.score` says more."""
    if isinstance(answers, str):
        raise InputError("answers: got one string, want a list of them")
    ids = [_ids(engine, answer, end) for answer in answers]
    if not ids:
        return []
    longest = max(map(len, ids))
    prepared = engine.prepare(Request(messages, sampling=Sampling(max_tokens=longest)))
    cache = engine.reader.whole(prepared)
    program = _program(nnx.graphdef(engine.model))
    scores: list[Score] = []
    for group in groups(ids):
        row = lay_row(group, prepared.ids)
        logprobs = np.asarray(program(engine.weights, cache, *row)).tolist()
        for answer in group:
            own, logprobs = logprobs[: len(answer)], logprobs[len(answer) :]
            scores.append(Score(tuple(answer), tuple(own)))
    return scores


def _ids(engine: Engine, answer: str, end: bool) -> list[int]:
    """Tokens of an answer as training has them."""
    segments = training_answer(engine.template, answer, end=end)
    ids, _ = lay_out(segments, engine.tokenizer, engine.cfg.num_slots, bos=False)
    if not ids:
        raise InputError("answers: '' has no token to score without its end")
    return ids


def groups(answers: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Neighbouring answers that share a row."""
    group: list[list[int]] = []
    tokens = 0
    for answer in answers:
        tokens += len(answer)
        if group and (tokens > ROW or len(group) == BRANCHES - 1):
            yield group
            group, tokens = [], len(answer)
        group.append(answer)
    yield group


def lay_row(answers: Sequence[list[int]], prompt: np.ndarray) -> tuple[np.ndarray, ...]:
    """ids_1T, segments_1T, positions_1T, answer_ids_A and answer_from_A, as in data/rows.py."""
    read, branches, positions = [int(prompt[-1])], [0], [len(prompt) - 1]
    wanted: list[int] = []
    predicted_from: list[int] = []
    for branch, answer in enumerate(answers, start=1):
        own = range(len(answer) - 1)
        predicted_from += [0, *(len(read) + i for i in own)]
        wanted += answer
        read += answer[:-1]
        branches += [branch for _ in own]
        positions += [len(prompt) + i for i in own]
    size = bucket(len(wanted), LOGITS)  # for both, so that few programs are compiled

    def padded(values: Sequence[int]) -> np.ndarray:
        return np.pad(np.array(values, np.int32), (0, size - len(values)))

    segments = [BRANCHES + branch for branch in branches]
    tokens = [padded(values)[None] for values in (read, segments, positions)]
    return (*tokens, padded(wanted), padded(predicted_from))


def warm_up(engine: Engine, tokens: int) -> int:
    """Compile what scores need of prompts and answers of up to `tokens` tokens together.

    Returns how many programs that were.
    """
    before, program = compilations.count(), _program(nnx.graphdef(engine.model))
    sizes = [LOGITS]
    while sizes[-1] < max(ROW, tokens):
        sizes.append(2 * sizes[-1])
    for places in engine.shapes.rooms(tokens + PIECES[-1]):
        cache = engine.reader.blank(places)
        for size in sizes:
            row = lay_row([[0] * size], np.zeros(1, np.int32))
            jax.block_until_ready(program(engine.weights, cache, *row))
    return compilations.count() - before


@functools.lru_cache(maxsize=8)
def _program(graphdef: nnx.GraphDef) -> Callable:
    """`logprobs` of models of this structure, jitted; compiled once for each shape."""
    return jax.jit(lambda weights, *args: logprobs(nnx.merge(graphdef, weights), *args))


def logprobs(
    model,
    cache: Cache,
    ids_1T,
    segments_1T,
    positions_1T,
    answer_ids_A,
    answer_from_A,
):
    """Of the answer tokens, float32, each predicted from a token T.

    Args:
        cache: of one row, the prompt but for its last token.
    """
    cache = spread(cache, jnp.zeros(1, int), ids_1T.shape[1])
    x_1TD = model.llama.embed(ids_1T)
    hidden_1TD, _ = model.llama(x_1TD, segments_1T, positions_1T, cache)

    def some(inputs):
        ids_A, from_A = inputs
        logits_AV = model.llama.logits(hidden_1TD[0, from_A])
        chosen_A = jnp.take_along_axis(logits_AV, ids_A[:, None], axis=1)[:, 0]
        return chosen_A - jax.nn.logsumexp(logits_AV, axis=-1)

    parts = (answer_ids_A.reshape(-1, min(LOGITS, len(answer_ids_A))),)
    parts += (answer_from_A.reshape(parts[0].shape),)
    return jax.lax.map(some, parts).reshape(-1)
