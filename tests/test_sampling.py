"""Tokens are chosen by Hugging Face's rules, and by seed and number alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import generation

from minigpt4_jax import sampling
from minigpt4_jax.request import (
    GREEDY,
    NONE_LEFT,
    NOT_FINITE,
    TOP_LOGPROBS,
    Sampling,
)

V = 37
ENDS = (4, 2)  # tokens that end a row
PLAIN = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1)
RULES = {
    name: dataclasses.replace(PLAIN, **rules)
    for name, rules in {
        "temperature": dict(temperature=0.7),
        "top_k": dict(top_k=5),
        "top_p": dict(top_p=0.6),
        "min_p": dict(min_p=0.1),
        "penalty": dict(repetition_penalty=1.7),
        "presence": dict(presence_penalty=1.5),
        "frequency": dict(frequency_penalty=0.8),
        "once each": dict(no_repeat_ngram=1),
        "no pair twice": dict(no_repeat_ngram=2),
        "no triple twice": dict(no_repeat_ngram=3),
        "longer than the answer": dict(no_repeat_ngram=2**31 - 1),
        "minimum": dict(min_tokens=3),
        "banned": dict(banned_ids=[36, 0, 7]),
        "all": dict(
            temperature=1.6,
            top_k=20,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.3,
            presence_penalty=-0.4,
            frequency_penalty=0.3,
            no_repeat_ngram=2,
            min_tokens=6,
            banned_ids=[5],
        ),
        "tiny top_p": dict(top_p=1e-6),
        "large top_k": dict(top_k=99),
        "min_p of 1": dict(min_p=1.0),
    }.items()
}


def random_logits(rows: int, seed: int = 0):
    logits = 3 * np.random.default_rng(seed).standard_normal((rows, V), np.float32)
    return jnp.asarray(logits)


def some_ids(rows: int, generated: int = 12):
    """Tokens of few kinds, so that pairs and triples come back."""
    ids_BA = np.random.default_rng(1).integers(0, 4, (rows, generated))
    return jnp.asarray(ids_BA, jnp.int32)


def choose(rules, logits_BV, ids_BA=None, count_B=None, first_ids=()):
    """`sampling.choose`, jitted; rules are (Sampling, seed, index of the sample)."""
    batch = len(logits_BV)
    if ids_BA is None:
        ids_BA = jnp.zeros((batch, 4), jnp.int32)
    if count_B is None:
        count_B = jnp.zeros(batch, jnp.int32)
    controls = sampling.controls(rules, batch, V, first_ids)
    return jitted_choose(logits_BV, controls, ids_BA, count_B, ends(batch))


jitted_choose = jax.jit(sampling.choose)


def ends(batch: int):
    return jnp.tile(jnp.array([*ENDS, -1, -1], jnp.int32), (batch, 1))


def probabilities(rules, logits_BV, ids_BA, count_B, first_ids=()):
    """What `draw` draws from."""
    batch = len(logits_BV)
    controls = sampling.controls([(r, 0, 0) for r in rules], batch, V, first_ids)
    ruled_BV, _ = jitted_rule(logits_BV, controls, ids_BA, count_B, ends(batch))
    weight_BV = jitted_weights(ruled_BV, controls)
    return np.asarray(weight_BV / weight_BV.sum(-1, keepdims=True))


jitted_rule, jitted_weights = jax.jit(sampling.rule), jax.jit(sampling.weights)


def openai_penalties(rule: Sampling):
    """The definition: logit - count * frequency - (count > 0) * presence."""

    def process(ids, scores):
        count_V = np.bincount(ids[0].numpy(), minlength=V)
        taken_V = count_V * rule.frequency_penalty
        taken_V += (count_V > 0) * rule.presence_penalty
        return scores - torch.tensor(taken_V, dtype=torch.float32)

    return process


def their_processors(rule: Sampling) -> list:
    """In the order of Hugging Face's generate."""
    made = [generation.RepetitionPenaltyLogitsProcessor(float(rule.repetition_penalty))]
    made.append(openai_penalties(rule))
    if rule.no_repeat_ngram:
        made.append(generation.NoRepeatNGramLogitsProcessor(rule.no_repeat_ngram))
    if rule.min_tokens:
        made.append(generation.MinLengthLogitsProcessor(rule.min_tokens, list(ENDS)))
    if rule.banned_ids:
        made.append(generation.SuppressTokensLogitsProcessor(list(rule.banned_ids)))
    made.append(generation.TemperatureLogitsWarper(float(rule.temperature)))
    if rule.top_k:
        made.append(generation.TopKLogitsWarper(rule.top_k))
    made.append(generation.TopPLogitsWarper(float(rule.top_p)))
    if rule.min_p:
        made.append(generation.MinPLogitsWarper(float(rule.min_p)))
    return made


def their_probabilities(rule: Sampling, logits_V, ids_A) -> np.ndarray:
    scores = torch.tensor(np.asarray(logits_V))[None]
    ids = torch.tensor(np.asarray(ids_A), dtype=torch.int64)[None]
    for processor in their_processors(rule):
        scores = processor(ids, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("first", [sampling.NONE, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_probabilities_are_hugging_faces(rule, first):
    """Rows of all lengths in one program; a first id is a token before the others."""
    counts = [0, 1, 2, 5, 9, 12]
    logits_BV, ids_BA = random_logits(6), some_ids(6)
    given = [] if first == sampling.NONE else [first]
    ours = probabilities([rule] * 6, logits_BV, ids_BA, jnp.array(counts), [first] * 6)
    theirs = np.stack(
        [
            their_probabilities(
                rule, logits_BV[b], [*given, *ids_BA[b, :count].tolist()]
            )
            for b, count in enumerate(counts)
        ]
    )
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_every_rule_changes_something():
    """Else the comparison above would not see that it is ignored."""
    logits_BV, ids_BA = random_logits(6), some_ids(6)
    count_B = jnp.array([0, 1, 2, 5, 9, 12])
    plain = probabilities([PLAIN] * 6, logits_BV, ids_BA, count_B)
    for name, rule in RULES.items():
        ruled = probabilities([rule] * 6, logits_BV, ids_BA, count_B)
        changes = not np.allclose(plain, ruled, atol=1e-6)
        assert changes == (name not in ("longer than the answer", "large top_k")), name


def test_rows_with_other_rules_have_the_probabilities_they_have_alone():
    rules, count = list(RULES.values()), 9
    logits_BV, ids_BA = random_logits(len(rules)), some_ids(len(rules))
    count_B = jnp.full(len(rules), count)
    ours = probabilities(rules, logits_BV, ids_BA, count_B)
    for b, rule in enumerate(rules):
        theirs = their_probabilities(rule, logits_BV[b], ids_BA[b, :count])
        np.testing.assert_allclose(ours[b], theirs, atol=1e-6)


def test_top_1_equals_greedy():
    logits_BV = random_logits(6)
    top_1 = Sampling(temperature=2.0, top_k=1, top_p=1.0, repetition_penalty=1.0)
    token_B, _ = choose([(top_1, seed, 0) for seed in range(6)], logits_BV)
    greedy_B, _ = choose([(GREEDY, 0, 0)] * 6, logits_BV)
    assert token_B.tolist() == greedy_B.tolist() == logits_BV.argmax(-1).tolist()


def test_greedy_takes_the_first_of_equal_logits():
    logits_BV = jnp.zeros((1, V)).at[0, 9].set(3.0).at[0, 4].set(3.0)
    token_B, _ = choose([(GREEDY, 0, 0)], logits_BV)
    assert token_B[0] == 4


@pytest.mark.parametrize("rule", [GREEDY, RULES["all"]], ids=["greedy", "drawn"])
def test_logits_without_a_distribution_choose_no_token_and_harm_no_other_row(rule):
    logits_BV = random_logits(6)
    masked_BV = logits_BV.at[4, :30].set(-jnp.inf)  # a probability of 0 is none
    wanted_B, _ = choose([(rule, 1, 0)] * 6, masked_BV)
    broken_BV = (
        masked_BV.at[0, 7].set(jnp.nan).at[2, 0].set(jnp.inf).at[3].set(-jnp.inf)
    )
    token_B, _ = choose([(rule, 1, 0)] * 6, broken_BV)
    assert token_B.tolist() == [
        NOT_FINITE if b in (0, 2, 3) else token
        for b, token in enumerate(wanted_B.tolist())
    ]
    assert 30 <= token_B[4] < V


def test_a_row_whose_rules_leave_no_token_says_so():
    none = dataclasses.replace(PLAIN, banned_ids=list(range(V)))
    most = dataclasses.replace(PLAIN, banned_ids=list(range(V - 1)))
    ended = dataclasses.replace(
        PLAIN, banned_ids=[i for i in range(V) if i not in ENDS], min_tokens=1
    )
    rules = [(rule, 0, 0) for rule in (none, most, ended, GREEDY)]
    token_B, _ = choose(rules, random_logits(6))
    assert token_B[:3].tolist() == [NONE_LEFT, V - 1, NONE_LEFT]
    assert token_B[3] == random_logits(6)[3].argmax()


@pytest.mark.parametrize("name", ["all", "min_p", "temperature"])
def test_draws_follow_the_distribution(name):
    """Chi-squared of 4,000 seeds within 4 standard deviations of its mean."""
    draws, rule = 4000, RULES[name]
    logits_BV = jnp.repeat(random_logits(1), draws, axis=0)
    ids_BA = jnp.tile(jnp.array([3, 1, 4, 1], jnp.int32), (draws, 1))
    count_B = jnp.full(draws, 4)
    token_B, _ = choose(
        [(rule, seed, 0) for seed in range(draws)], logits_BV, ids_BA, count_B
    )
    expected_V = draws * their_probabilities(rule, logits_BV[0], ids_BA[0])
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
    controls = sampling.controls([(GREEDY, 5, 0), (GREEDY, 5, 1)], 2, V)
    assert (
        jax.random.key_data(controls.key_B[0]).tolist()
        == jax.random.key_data(jax.random.key(5)).tolist()
        != jax.random.key_data(controls.key_B[1]).tolist()
    )


def test_rows_with_other_rules_do_not_change_a_row():
    logits_BV, ids_BA = random_logits(len(RULES)), some_ids(len(RULES))
    count_B = jnp.arange(len(RULES)) % 12
    rules = [(rule, 3, 0) for rule in RULES.values()]
    together_B, logprob_B = choose(rules, logits_BV, ids_BA, count_B)
    for b, rule in enumerate(rules):
        row = slice(b, b + 1)
        token, logprob = choose([rule], logits_BV[row], ids_BA[row], count_B[row])
        assert (int(token[0]), float(logprob[0])) == (
            int(together_B[b]),
            pytest.approx(float(logprob_B[b]), abs=1e-6),
        )


def test_the_penalty_counts_generated_tokens_only():
    logits_BV = jnp.array([[2.0, -2.0, 1.9, -1.0]] * 2)
    ids_BA = jnp.array([[0, 1, 2], [0, 1, 2]], jnp.int32)
    twice = dataclasses.replace(PLAIN, repetition_penalty=2.0)
    controls = sampling.controls([(twice, 0, 0)] * 2, 2, 4)
    penalised_BV = sampling.penalise(logits_BV, controls, ids_BA, jnp.array([2, 0]))
    assert penalised_BV.tolist() == [
        [1.0, -4.0, pytest.approx(1.9), -1.0],
        [2.0, -2.0, pytest.approx(1.9), -1.0],
    ]


def test_logprobs_are_those_of_the_logits_before_any_rule():
    logits_BV, ids_BA = random_logits(len(RULES)), some_ids(len(RULES))
    rules = [(rule, 0, 0) for rule in RULES.values()]
    token_B, logprob_B = choose(rules, logits_BV, ids_BA)
    wanted_BV = jax.nn.log_softmax(logits_BV)
    wanted_B = np.asarray(wanted_BV)[np.arange(len(RULES)), np.asarray(token_B)]
    np.testing.assert_allclose(logprob_B, wanted_B, atol=1e-5)


def test_the_likeliest_tokens_are_told_where_a_row_asks():
    logits_BV = random_logits(2)
    rules = [(GREEDY, 0, 0), (dataclasses.replace(GREEDY, top_logprobs=3), 0, 0)]
    ids_BU, logprobs_BU = sampling.likeliest(logits_BV, sampling.controls(rules, 2, V))
    wanted_BV = np.asarray(jax.nn.log_softmax(logits_BV))
    order_BU = np.argsort(-wanted_BV, axis=-1)[:, :TOP_LOGPROBS]
    assert ids_BU.tolist() == order_BU.tolist()
    wanted_BU = np.take_along_axis(wanted_BV, order_BU, axis=-1)
    np.testing.assert_allclose(logprobs_BU, wanted_BU, atol=1e-5)
    idle = sampling.controls(rules[:1] * 2, 2, V)
    assert not sampling.likeliest(logits_BV, idle)[1].any()
