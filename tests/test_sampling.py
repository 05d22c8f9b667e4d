"""Tokens are chosen by Hugging Face's rules, and by seed and number alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import sampling
from minigpt4_jax.request import GREEDY, Sampling

V = 37
RULES = {
    "temperature": Sampling(temperature=0.7, top_k=0, top_p=1, repetition_penalty=1),
    "top_k": Sampling(temperature=1, top_k=5, top_p=1, repetition_penalty=1),
    "top_p": Sampling(temperature=1, top_k=0, top_p=0.6, repetition_penalty=1),
    "penalty": Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1.7),
    "all": Sampling(temperature=1.6, top_k=20, top_p=0.9, repetition_penalty=1.3),
    "tiny top_p": Sampling(temperature=1, top_k=0, top_p=1e-6, repetition_penalty=1),
    "large top_k": Sampling(temperature=1, top_k=99, top_p=1, repetition_penalty=1),
}


def random_logits(rows: int, seed: int = 0):
    logits = 3 * np.random.default_rng(seed).standard_normal((rows, V), np.float32)
    return jnp.asarray(logits)


def choose(rules, logits_BV, ids_BA=None, count_B=None):
    """`sampling.choose`, jitted; rules are (Sampling, seed, index of the sample)."""
    batch = len(logits_BV)
    if ids_BA is None:
        ids_BA = jnp.zeros((batch, 4), jnp.int32)
    if count_B is None:
        count_B = jnp.zeros(batch, jnp.int32)
    controls = sampling.controls(rules, batch)
    return jax.jit(sampling.choose)(logits_BV, controls, ids_BA, count_B)


def probabilities(rule: Sampling, logits_BV, ids_BA, count_B):
    """What `draw` draws from."""
    controls = sampling.controls([(rule, 0, 0)] * len(logits_BV), len(logits_BV))
    penalised_BV = sampling.penalise(logits_BV, ids_BA, count_B, controls.penalty_B)
    weight_BV = sampling.weights(penalised_BV, controls)
    return np.asarray(weight_BV / weight_BV.sum(-1, keepdims=True))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_probabilities_are_hugging_faces(rule):
    import torch
    from transformers import generation

    logits_BV = random_logits(6)
    ids_BA = np.random.default_rng(1).integers(0, V, (6, 4))
    processors = [
        generation.RepetitionPenaltyLogitsProcessor(float(rule.repetition_penalty)),
        generation.TemperatureLogitsWarper(float(rule.temperature)),
        generation.TopPLogitsWarper(float(rule.top_p)),
    ]
    if rule.top_k:
        processors.insert(2, generation.TopKLogitsWarper(rule.top_k))
    theirs = torch.tensor(np.asarray(logits_BV))
    for processor in processors:
        theirs = processor(torch.tensor(ids_BA), theirs)
    ours = probabilities(
        rule, logits_BV, jnp.asarray(ids_BA, jnp.int32), jnp.full(6, 4)
    )
    theirs = theirs.softmax(-1).numpy()
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_top_1_equals_greedy():
    logits_BV = random_logits(5)
    top_1 = Sampling(temperature=2.0, top_k=1, top_p=1.0, repetition_penalty=1.0)
    token_B, _ = choose([(top_1, seed, 0) for seed in range(5)], logits_BV)
    greedy_B, _ = choose([(GREEDY, 0, 0)] * 5, logits_BV)
    assert token_B.tolist() == greedy_B.tolist() == logits_BV.argmax(-1).tolist()


def test_greedy_takes_the_first_of_equal_logits_and_survives_nan():
    logits_BV = jnp.zeros((2, V)).at[0, 9].set(3.0).at[0, 4].set(3.0)
    logits_BV = logits_BV.at[1].set(jnp.nan)
    token_B, _ = choose([(GREEDY, 0, 0)] * 2, logits_BV)
    assert token_B[0] == 4
    assert 0 <= token_B[1] < V


def test_draws_follow_the_distribution():
    draws = 4000
    logits_BV = jnp.repeat(random_logits(1), draws, axis=0)
    rule = RULES["all"]
    ids_BA = jnp.tile(jnp.array([3, 1, 4, 1], jnp.int32), (draws, 1))
    count_B = jnp.full(draws, 4)
    token_B, _ = choose(
        [(rule, seed, 0) for seed in range(draws)], logits_BV, ids_BA, count_B
    )
    expected_V = draws * probabilities(rule, logits_BV[:1], ids_BA[:1], count_B[:1])[0]
    found_V = np.bincount(np.asarray(token_B), minlength=V)
    kept_V = expected_V > 0
    assert found_V[~kept_V].sum() == 0
    chi_squared = ((found_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum()
    freedom = kept_V.sum() - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_a_token_depends_on_seed_sample_and_number_but_not_on_batch_or_slot():
    rule = Sampling(temperature=1.5, top_k=0, top_p=1.0, repetition_penalty=1.0)
    logits_BV = jnp.repeat(random_logits(1), 12, axis=0)
    count_B = jnp.arange(12) % 4
    rules = [(rule, 7 + b // 8, (b // 4) % 2) for b in range(12)]
    token_B, _ = choose(rules, logits_BV, count_B=count_B)
    back_B, _ = choose(rules[::-1], logits_BV, count_B=count_B[::-1])
    alone = [
        int(choose([rules[b]], logits_BV[:1], count_B=count_B[b : b + 1])[0][0])
        for b in range(12)
    ]
    assert token_B.tolist() == back_B[::-1].tolist() == alone
    assert len(set(alone)) > 3
    by_sample = np.asarray(token_B).reshape(3, 4).tolist()
    assert by_sample[0] != by_sample[1] != by_sample[2] != by_sample[0]


def test_the_first_sample_draws_from_the_seed_itself():
    controls = sampling.controls([(GREEDY, 5, 0), (GREEDY, 5, 1)], 2)
    assert (
        jax.random.key_data(controls.key_B[0]).tolist()
        == jax.random.key_data(jax.random.key(5)).tolist()
        != jax.random.key_data(controls.key_B[1]).tolist()
    )


def test_rows_with_other_rules_do_not_change_a_row():
    logits_BV = random_logits(7)
    rules = [(rule, 3, 0) for rule in RULES.values()]
    together_B, logprob_B = choose(rules, logits_BV)
    for b, rule in enumerate(rules):
        token, logprob = choose([rule], logits_BV[b : b + 1])
        assert (int(token[0]), float(logprob[0])) == (
            int(together_B[b]),
            pytest.approx(float(logprob_B[b]), abs=1e-6),
        )


def test_the_penalty_counts_generated_tokens_only():
    logits_BV = jnp.array([[2.0, -2.0, 1.9, -1.0]] * 2)
    ids_BA = jnp.array([[0, 1, 2], [0, 1, 2]], jnp.int32)
    penalised_BV = sampling.penalise(
        logits_BV, ids_BA, jnp.array([2, 0]), jnp.array([2.0, 2.0])
    )
    assert penalised_BV.tolist() == [
        [1.0, -4.0, pytest.approx(1.9), -1.0],
        [2.0, -2.0, pytest.approx(1.9), -1.0],
    ]


def test_logprobs_are_those_of_the_logits_before_any_rule():
    logits_BV = random_logits(7)
    token_B, logprob_B = choose([(r, 0, 0) for r in RULES.values()], logits_BV)
    wanted_BV = jax.nn.log_softmax(logits_BV)
    wanted_B = np.asarray(wanted_BV)[np.arange(7), np.asarray(token_B)]
    np.testing.assert_allclose(logprob_B, wanted_B, atol=1e-5)
