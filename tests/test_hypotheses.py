"""What a search keeps: the best of what has ended, and whether more may come."""

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import hypotheses, sampling
from minigpt4_jax.hypotheses import DEAD, Rules, Texts


def texts(scores, counts) -> Texts:
    """Of one request; a text of so many tokens is its number, over and over."""
    count_BJ = jnp.array([counts])
    J, A = len(counts), 4
    ids_BJA = jnp.broadcast_to(jnp.arange(J)[None, :, None], (1, J, A))
    return Texts(
        ids_BJA=ids_BJA,
        logprobs_BJA=ids_BJA / 7,
        count_BJ=count_BJ,
        score_BJ=jnp.array([scores], jnp.float32),
        state_BJ=jnp.zeros((1, J), jnp.int32),
        top_ids_BJAU=jnp.zeros((1, J, A, 0), jnp.int32),
        top_logprobs_BJAU=jnp.zeros((1, J, A, 0)),
    )


def rules(penalty=1.0, early=False, reference=False) -> Rules:
    return Rules(
        controls=sampling.controls([], 1, 5),
        end_ids_BE=jnp.array([[2]]),
        limit_B=jnp.array([8]),
        length_penalty_B=jnp.array([penalty]),
        early_B=jnp.array([hypotheses.EARLY[early]]),
        next_SV=jnp.zeros((1, 5), jnp.int32),
        state_B=jnp.zeros(1, jnp.int32),
        sequences_MN=jnp.zeros((0, 0), jnp.int32),
        reference=reference,
    )


@pytest.mark.parametrize("penalty, kept", [(1.0, [1, 0]), (0.0, [0, 1])])
def test_the_best_by_score_over_length_are_kept(penalty, kept):
    none = texts([DEAD, DEAD], [0, 0])
    new_BC = jnp.array([[True, True, False]])
    found = texts([-2.0, -3.0, -0.1], [2, 4, 1])
    best = hypotheses.collect(rules(penalty), none, found, new_BC)
    assert best.ids_BJA[0, :, 0].tolist() == kept
    want = [[-2.0, -3.0][i] / [2, 4][i] ** penalty for i in kept]
    np.testing.assert_allclose(best.score_BJ[0], want)
    dummy = hypotheses.collect(rules(penalty), none, found, new_BC, dummy=1)
    want = [[-2.0, -3.0][i] / [3, 5][i] ** penalty for i in kept]
    np.testing.assert_allclose(dummy.score_BJ[0], want)


def test_a_search_goes_on_while_its_best_beam_beats_the_worst_that_ended():
    full = texts([-0.5, -1.0], [3, 3])
    for best, more in ((-1.9, True), (-2.1, False)):  # of two tokens: -0.95, -1.05
        beams = texts([best, -9.0], [2, 2])
        assert bool(hypotheses.can_improve(rules(), beams, full)[0]) == more
        assert not hypotheses.can_improve(rules(early=True), beams, full)[0]
        assert hypotheses.can_improve(rules(early="never"), beams, full)[0]
    open_slot = texts([-0.5, DEAD], [3, 0])
    assert hypotheses.can_improve(rules(early=True), texts([-99.0], [2]), open_slot)[0]


def test_a_score_without_bound_is_a_hypothesis_of_the_original_alone():
    far, new_BC = texts([-1e12, -2e12], [2, 2]), jnp.ones((1, 2), bool)
    for reference in (False, True):
        how = rules(reference=reference)
        none = texts([2 * how.least] * 2, [0, 0])
        found = hypotheses.collect(how, none, far, new_BC)
        assert (found.count_BJ > 0).all() == reference


def test_texts_that_end_in_a_sequence_are_told():
    ids_BJA = jnp.array([[[5, 6, 7, 0], [6, 7, 7, 0], [7, 0, 0, 0]]])
    for sequence, count, ends in (
        ([6, 7], 3, [True, False, False]),
        ([-1, 7], 3, [True, True, False]),
        ([6, 7], 1, [False, False, False]),
        ([-1, 7], 1, [False, False, True]),
    ):
        found = hypotheses.end_in(ids_BJA, count, jnp.array(sequence))
        assert found[0].tolist() == ends
