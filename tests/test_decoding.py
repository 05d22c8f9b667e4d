"""The compiled programs: cached and chunked decoding against the plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax import decoding, sampling
from minigpt4_jax.models.layers import unstack
from minigpt4_jax.request import Sampling

T, BUDGET, STEPS = 12, 9, 4
LENGTHS = (12, 5, 0, 8)  # the third row is a spare one
LIMITS = (9, 9, 1, 3)
Q = tiny.CONFIG.num_slots
RULES = [
    Sampling(temperature=0.0, repetition_penalty=1.0),
    Sampling(temperature=1.2, top_k=9, top_p=0.9, repetition_penalty=1.1),
    Sampling(temperature=0.0, repetition_penalty=1.0),
    Sampling(temperature=0.0, repetition_penalty=1.6),
]


def prompts(end_id: int = -1) -> decoding.Prompts:
    rng = np.random.default_rng(0)
    slots_BT = np.zeros((4, T), bool)
    slots_BT[[0, 3], 2 : 2 + Q] = True
    return decoding.Prompts(
        ids_BT=rng.integers(3, tiny.VOCABULARY, (4, T)).astype(np.int32),
        slots_BT=slots_BT,
        length_B=np.array(LENGTHS, np.int32),
        end_ids_BE=np.full((4, 1), end_id, np.int32),
        limit_B=np.array(LIMITS, np.int32),
        controls=sampling.controls(
            [(rule, 3, 0) for rule in RULES], 4, tiny.VOCABULARY
        ),
    )


def image_embeddings() -> np.ndarray:
    shape = (4, Q, tiny.CONFIG.llama.width)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    made = tiny.model()
    made.llama.blocks = unstack(made.llama.blocks)
    return made


@pytest.fixture(scope="module")
def run(model):
    """Decode prompts to their ends; returns the state after each chunk."""
    graphdef, weights = nnx.split(model)
    programs = decoding.programs(graphdef)

    def run(prompts, ended=(False,) * 4, steps=STEPS):
        states = [
            programs.prefill(
                weights, prompts, image_embeddings(), places=T + BUDGET, budget=BUDGET
            )
        ]
        for _ in range(3):
            before = jax.tree.map(jnp.copy, states[-1])  # decode donates its argument
            states.append(
                programs.decode(weights, before, np.array(ended), steps=steps)
            )
        return states

    return run


@pytest.fixture(scope="module")
def states(run):
    return run(prompts())


def test_cached_decoding_equals_the_full_forward_pass(model, states):
    """Row by row: one forward pass over prompt and answer predicts every token."""
    made, ids_BA = prompts(), np.asarray(states[-1].ids_BA)
    pad = T + BUDGET
    forward = jax.jit(lambda m, *args: m(*args))
    for b in (0, 3):
        count, length = LIMITS[b], LENGTHS[b]
        ids_1T = np.zeros((1, pad), np.int32)
        ids_1T[0, :length] = made.ids_BT[b, :length]
        ids_1T[0, length : length + count] = ids_BA[b, :count]
        slots_1T = np.pad(made.slots_BT[b], (0, BUDGET))[None]
        logits_AV = forward(model, ids_1T, slots_1T, image_embeddings()[b : b + 1])[0]
        logits_AV = logits_AV[length - 1 : length - 1 + count]
        logprob_A = np.asarray(jax.nn.log_softmax(logits_AV))[
            np.arange(count), ids_BA[b, :count]
        ]
        np.testing.assert_allclose(
            states[-1].logprobs_BA[b, :count], logprob_A, atol=1e-4
        )
        if b == 0:  # the other row is penalised
            assert ids_BA[b, :count].tolist() == logits_AV.argmax(-1).tolist()


def test_rows_stop_at_their_own_limits(states):
    assert states[-1].count_B.tolist() == [9, 9, 0, 3]
    assert states[-1].done_B.all()


def test_a_chunk_adds_at_most_its_steps(states):
    assert [s.count_B.tolist() for s in states] == [
        [1, 1, 0, 1],
        [5, 5, 0, 3],
        [9, 9, 0, 3],
        [9, 9, 0, 3],
    ]


def test_the_cache_of_a_row_that_is_done_stands_still(states):
    # The last token chosen is never read.
    lengths = [n + max(limit - 1, 0) for n, limit in zip(LENGTHS, LIMITS)]
    assert states[-1].cache.length_B.tolist() == lengths
    used_B = (states[-1].cache.segments_BS > 0).sum(1)
    assert used_B.tolist() == lengths


def test_an_end_token_ends_its_row_and_no_other(run, states):
    ids_BA = np.asarray(states[-1].ids_BA)
    end = int(ids_BA[0, 4])
    wanted = [row.tolist().index(end) + 1 if end in row else 99 for row in ids_BA]
    ended = run(prompts(end_id=end))[-1]
    found = np.minimum(wanted, np.array([9, 9, 0, 3]))
    assert ended.count_B.tolist() == found.tolist()
    for b, count in enumerate(found):
        assert ended.ids_BA[b, :count].tolist() == ids_BA[b, :count].tolist()


def test_a_row_the_caller_ends_grows_no_more(run, states):
    ended = run(prompts(), ended=(True, False, False, False))[-1]
    assert ended.count_B.tolist() == [1, 9, 0, 3]
    assert ended.ids_BA[1].tolist() == states[-1].ids_BA[1].tolist()


@pytest.mark.parametrize("stacked", [True, False])
def test_inserted_rows_go_on_as_if_alone(stacked, states):
    model = tiny.model()
    if not stacked:
        model.llama.blocks = unstack(model.llama.blocks)
    graphdef, weights = nnx.split(model)
    programs = decoding.programs(graphdef)
    shape = dict(places=T + BUDGET, budget=BUDGET)
    new = programs.prefill(weights, prompts(), image_embeddings(), **shape)
    old = programs.prefill(weights, prompts(), image_embeddings()[::-1], **shape)
    row_B = np.array([3, 99, 1, 0])  # 99: dropped
    state = programs.insert(old, new, row_B)
    for _ in range(2):
        state = programs.decode(weights, state, np.zeros(4, bool), steps=STEPS)
    wanted = states[2]
    for source, row in ((0, 3), (3, 0)):
        count = int(wanted.count_B[source])
        assert int(state.count_B[row]) == count
        assert (
            state.ids_BA[row, :count].tolist() == wanted.ids_BA[source, :count].tolist()
        )
