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

T, S, STEPS = 12, 24, 4
LENGTHS = (12, 5, 1, 8)  # the third row is a spare one
LIMITS = (9, 9, 0, 3)
Q, D = tiny.CONFIG.num_slots, tiny.CONFIG.llama.width
RULES = [
    Sampling(temperature=0.0, repetition_penalty=1.0),
    Sampling(temperature=1.2, top_k=9, top_p=0.9, repetition_penalty=1.1),
    Sampling(temperature=0.0, repetition_penalty=1.0),
    Sampling(temperature=0.0, repetition_penalty=1.6),
]
NONE_B = np.zeros(4, bool)


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """ids_BT and slots_BT; those of row 3 end in an image."""
    rng = np.random.default_rng(0)
    slots_BT = np.zeros((4, T), bool)
    slots_BT[0, 2 : 2 + Q] = slots_BT[3, LENGTHS[3] - Q : LENGTHS[3]] = True
    return rng.integers(3, tiny.VOCABULARY, (4, T)).astype(np.int32), slots_BT


def image_embeddings() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, Q, D)).astype(np.float32)


def made(stacked: bool = False):
    model = tiny.model()
    if not stacked:
        model.llama.blocks = unstack(model.llama.blocks)
    graphdef, weights = nnx.split(model)
    return model, decoding.programs(graphdef), weights


@pytest.fixture(scope="module")
def model():
    return made()


def begin(model, end_id: int = -1, seed: int = 3) -> decoding.Decoding:
    """The four prompts read in one piece, but for their last tokens."""
    _, programs, weights = model
    ids_BT, slots_BT = prompts()
    last_B = np.array(LENGTHS) - 1
    tokens_BS = np.zeros((4, S), np.int32)
    tokens_BS[:, :T] = np.where(slots_BT, -1, ids_BT)
    cache = programs.new_cache(weights, batch=4, places=S)
    cache = programs.read(
        weights, cache, ids_BT, slots_BT, last_B.astype(np.int32), image_embeddings()
    )
    return decoding.start(
        cache,
        tokens_BS,
        image_embeddings()[:, -1],
        np.full((4, 1), end_id, np.int32),
        np.array(LIMITS, np.int32),
        sampling.controls([(rule, seed, 0) for rule in RULES], 4, tiny.VOCABULARY),
    )


def grow(model, state, ended_B=NONE_B, steps=STEPS, drafts=0) -> decoding.Decoding:
    _, programs, weights = model
    state = jax.tree.map(jnp.copy, state)  # decode donates its argument
    return programs.decode(weights, state, ended_B, steps, drafts=drafts)


@pytest.fixture(scope="module")
def states(model):
    """After each of four chunks."""
    found = [begin(model)]
    for _ in range(4):
        found.append(grow(model, found[-1]))
    return found


def answers(state) -> list[list[int]]:
    return [
        row[:count].tolist()
        for row, count in zip(np.asarray(state.ids_BA), np.asarray(state.count_B))
    ]


def test_cached_decoding_equals_the_full_forward_pass(model, states):
    """Row by row: one forward pass over prompt and answer predicts every token."""
    (ids_BT, slots_BT), ids_BA = prompts(), np.asarray(states[-1].ids_BA)
    forward = jax.jit(lambda m, *args: m(*args))
    for b in (0, 3):
        count, length = LIMITS[b], LENGTHS[b]
        ids_1T = np.zeros((1, S), np.int32)
        ids_1T[0, :length] = ids_BT[b, :length]
        ids_1T[0, length : length + count] = ids_BA[b, :count]
        slots_1T = np.pad(slots_BT[b, :length], (0, S - length))[None]
        image_1QD = image_embeddings()[b : b + 1]
        logits_AV = forward(model[0], ids_1T, slots_1T, image_1QD)[0]
        logits_AV = logits_AV[length - 1 : length - 1 + count]
        logprob_A = np.asarray(jax.nn.log_softmax(logits_AV))[
            np.arange(count), ids_BA[b, :count]
        ]
        np.testing.assert_allclose(
            states[-1].logprobs_BA[b, :count], logprob_A, atol=1e-4
        )
        if b == 0:  # the other row is penalised
            assert ids_BA[b, :count].tolist() == logits_AV.argmax(-1).tolist()


def test_a_prompt_in_pieces_is_read_as_in_one(model, states):
    _, programs, weights = model
    ids_BT, slots_BT = prompts()
    last_B, image_BQD = np.array(LENGTHS) - 1, image_embeddings()
    cache = programs.new_cache(weights, batch=4, places=S)
    for begin_, end in ((0, 6), (6, 12)):  # row 3's image lies in the second
        used_B = np.clip(last_B - begin_, 0, end - begin_).astype(np.int32)
        piece = (
            ids_BT[:, begin_:end],
            slots_BT[:, begin_:end] & (last_B >= begin_)[:, None],
        )
        seen_B = slots_BT[:, :begin_].sum(1)
        rest_BQD = np.stack([np.roll(x, -n, 0) for x, n in zip(image_BQD, seen_B)])
        cache = programs.read(weights, cache, *piece, used_B, rest_BQD)
    whole = states[0].cache
    assert cache.length_B.tolist() == whole.length_B.tolist() == last_B.tolist()
    for one, two in zip(jax.tree.leaves(whole.k), jax.tree.leaves(cache.k)):
        for b, last in enumerate(last_B):
            np.testing.assert_allclose(one[b, :last], two[b, :last], atol=1e-5)


def test_rows_stop_at_their_own_limits(states):
    assert states[-1].count_B.tolist() == list(LIMITS)
    assert states[-1].done_B.all()


def test_a_chunk_adds_at_most_its_steps(states):
    assert [s.count_B.tolist() for s in states] == [
        [0, 0, 0, 0],
        [4, 4, 0, 3],
        [8, 8, 0, 3],
        [9, 9, 0, 3],
        [9, 9, 0, 3],
    ]


def test_the_cache_of_a_row_that_is_done_stands_still(states):
    # The last token chosen is never read.
    lengths = [n + limit - 1 for n, limit in zip(LENGTHS, LIMITS)]
    assert states[-1].cache.length_B.tolist() == lengths
    used_B = (states[-1].cache.segments_BS > 0).sum(1)
    assert used_B.tolist() == lengths


def test_what_is_read_next_is_the_last_token_chosen(states):
    for state in states[1:3]:
        length_B = np.asarray(state.cache.length_B)
        for b in (0, 1):
            assert state.tokens_BS[b, length_B[b]] == answers(state)[b][-1]


def test_an_end_token_ends_its_row_and_no_other(model, states):
    free = answers(states[-1])
    end = free[0][4]
    state = begin(model, end_id=end)
    for _ in range(3):
        state = grow(model, state)
    for row, ended in zip(free, answers(state)):
        assert ended == (row[: row.index(end) + 1] if end in row else row)


def test_a_row_the_caller_ends_grows_no_more(model, states):
    state = grow(model, states[1], np.array([True, False, False, False]))
    assert state.count_B.tolist() == [4, 8, 0, 3]
    assert answers(state)[1] == answers(states[2])[1]


@pytest.mark.parametrize("stacked", [True, False])
def test_a_row_moved_to_another_batch_goes_on_as_if_alone(stacked, states):
    model = made(stacked)
    _, programs, _ = model
    state = grow(model, begin(model))
    other = programs.resize(begin(model, seed=9), places=2 * S)
    for source, target in ((0, 3), (1, 0)):
        row = programs.resize(programs.extract(state, source), places=2 * S)
        other = programs.insert(other, row, target)
    for _ in range(2):
        other = grow(model, other)
    assert answers(other)[3] == answers(states[-1])[0]
    assert answers(other)[0] == answers(states[-1])[1]
    back = programs.resize(other, places=S)
    assert back.cache.segments_BS.shape == back.ids_BA.shape == (4, S)


def test_drafts_change_no_token_greedy_or_drawn_or_penalised(model, states):
    state = begin(model)
    counts = []
    for _ in range(9):
        state = grow(model, state, steps=1, drafts=3)
        counts.append(state.count_B.tolist())
    assert answers(state) == answers(states[-1])
    lengths = [n + limit - 1 for n, limit in zip(LENGTHS, LIMITS)]
    assert state.cache.length_B.tolist() == lengths


def test_right_drafts_are_taken_in_one_pass(model, states):
    """With the answer already in its prompt, a pass adds all that is guessed."""
    state, wanted = begin(model), answers(states[-1])[0]
    one = grow(model, state, steps=2)
    # Row 0 has read its prompt and two tokens; before them we write them and the rest.
    tokens_BS = np.array(one.tokens_BS)
    tokens_BS[0, 3 : 3 + 5] = wanted[:5]
    one = jax.tree.map(jnp.copy, one)
    one = grow(model, decoding.dataclasses.replace(one, tokens_BS=tokens_BS), steps=0)
    fast = grow(model, one, steps=1, drafts=3)
    assert fast.count_B[0] == 2 + 3 + 1
    assert answers(fast)[0] == wanted[:6]


def test_drafts_follow_the_longest_and_latest_match():
    #           0  1  2  3  4  5  6  7  8  9 10
    tokens_S = [7, 5, 6, 1, 4, 6, 2, 7, 5, 6, 0]
    tokens_BS = np.array([tokens_S, tokens_S, [3, 3, 3, 3, 3, 9, 8, 0, 0, 0, 0]])
    draft_BT = decoding.look_up(tokens_BS, np.array([9, 5, 6]), 3)
    assert draft_BT.tolist() == [[1, 4, 6], [-1, -1, -1], [-1, -1, -1]]
    repeated_BS = np.array([[3, 4, 3, 4, 3, 4, 0, 0]])
    assert decoding.look_up(repeated_BS, np.array([5]), 3).tolist() == [[3, 4, -1]]
