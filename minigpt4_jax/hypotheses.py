"""What a beam search keeps: beginnings and hypotheses, their scores, which are the best.

Dimensions as in beam.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from minigpt4_jax import sampling

DEAD = -1e9  # added to the score of what is no beam or no hypothesis
EARLY = {False: 0, True: 1, "never": 2}  # Sampling.early_stopping as a number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What B requests ask of their searches.

    end_ids_BE: tokens that end an answer, as many in each row.
    limit_B: tokens of an answer at most; 0: a spare row.
    early_B: `EARLY`.
    next_SV, state_B: stop strings, and in which state an answer begins.
    sequences_MN: with `reference`: tokens, -1 before a short one, that end a search when
        all of its beams end in them.
    reference: the original's way (`_extend_as_the_reference`); of all B or none.
    """

    controls: sampling.Controls
    end_ids_BE: jax.Array
    limit_B: jax.Array
    length_penalty_B: jax.Array
    early_B: jax.Array
    next_SV: jax.Array
    state_B: jax.Array
    sequences_MN: jax.Array
    reference: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def least(self) -> float:
        """A score that what is no hypothesis is below; divided at each token by a low
        temperature, as the original does, that of one has no bound."""
        return -jnp.inf if self.reference else DEAD / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """J beginnings or hypotheses of each request, the best first.

    logprobs_BJA: of the tokens, before all rules.
    score_BJ: sums of log-probabilities after the rules; of what has ended, over its
        number of tokens to the power of the length penalty.
    state_BJ: of the stop strings.
    top_ids_BJAU, top_logprobs_BJAU: of the likeliest tokens at each place, U = 0 where no
        request asks for them.
    """

    ids_BJA: jax.Array
    logprobs_BJA: jax.Array
    count_BJ: jax.Array
    score_BJ: jax.Array
    state_BJ: jax.Array
    top_ids_BJAU: jax.Array
    top_logprobs_BJAU: jax.Array


def collect(rules: Rules, found: Texts, texts: Texts, new_BC, dummy: int = 0) -> Texts:
    """The best J of the hypotheses so far and of the texts that are new among them.

    Args:
        dummy: tokens that count besides a text's own.
    """
    J = found.ids_BJA.shape[1]
    new_BC &= texts.score_BJ > rules.least
    length_BC = (texts.count_BJ + dummy).astype(jnp.float32)
    score_BC = texts.score_BJ / length_BC ** rules.length_penalty_B[:, None]
    texts = dataclasses.replace(
        texts,
        count_BJ=jnp.where(new_BC, texts.count_BJ, 0),
        score_BJ=jnp.where(new_BC, score_BC, 2 * rules.least),
    )
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), found, texts)
    return take(both, jax.lax.top_k(both.score_BJ, J)[1])


def can_improve(rules: Rules, beams: Texts, found: Texts, dummy: int = 0):
    """Whether a beam may still become a hypothesis that is kept: [B].

    Judged by the best beam as if it ended now; `early_stopping="never"` with a positive
    length penalty judges it as if it ended at the limit without getting less likely.
    """
    patient_B = (rules.early_B == EARLY["never"]) & (rules.length_penalty_B > 0)
    length_B = jnp.where(patient_B, rules.limit_B, beams.count_BJ[:, 0])
    length_B = jnp.maximum(length_B + dummy, 1).astype(jnp.float32)
    best_B = beams.score_BJ[:, 0] / length_B**rules.length_penalty_B
    full_B = (found.count_BJ > 0).all(1)
    worst_B = jnp.where(full_B, found.score_BJ.min(1), 2 * rules.least)
    return (best_B > worst_B) & ~(full_B & (rules.early_B == EARLY[True]))


def first(mask_BC, J: int):
    """Of the first J candidates; the others are there to go on with."""
    return mask_BC & (jnp.arange(mask_BC.shape[1]) < J)


def end_in(ids_BJA, count, sequence_N):
    """Which texts of `count` tokens end in a sequence (-1 before a short one)."""
    N = len(sequence_N)
    at_N = count - N + jnp.arange(N)
    last_BJN = jnp.take(ids_BJA, jnp.maximum(at_N, 0), axis=2)
    same_BJN = (last_BJN == sequence_N) & (at_N >= 0)
    return (same_BJN | (sequence_N < 0)).all(-1)


def take(texts: Texts, index_BJ) -> Texts:
    """Some of each request's texts."""

    def pick(x):
        index = index_BJ.reshape(*index_BJ.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(pick, texts)


def along(x_BC, index_BJ):
    return jnp.take_along_axis(x_BC, index_BJ, axis=1)
