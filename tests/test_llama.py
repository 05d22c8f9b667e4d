import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from minigpt4_jax.models.layers import BRANCHES, Capture, DTypes, unstack
from minigpt4_jax.models.llama import (
    LLAMA2_7B_CHAT,
    SMOLLM2_135M,
    VICUNA_7B,
    VICUNA_13B,
    Llama,
    LlamaConfig,
    halves_moved,
    rotary_angles,
    rotate,
    turned_by_product,
)
from tests import parity

TINY = LlamaConfig(
    vocab_size=61,
    width=36,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_size=10,
    mlp_width=51,
    eps=1e-6,
    rope_theta=10_000.0,
    max_positions=64,
)
VARIANTS = {
    "grouped": TINY,
    "multi_head": dataclasses.replace(TINY, num_kv_heads=6),
    "multi_query_tied": dataclasses.replace(TINY, num_kv_heads=1, tie_embeddings=True),
    "llama2_eps": dataclasses.replace(TINY, eps=1e-5),
    "theta_500": dataclasses.replace(TINY, rope_theta=500.0),
    "theta_100000": dataclasses.replace(TINY, rope_theta=100_000.0),
}


def text(batch=2, length=9, seed=3):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length))


def one_text(shape):
    """Segments and positions of rows that are one text each."""
    return np.full(shape, BRANCHES), np.broadcast_to(np.arange(shape[1]), shape)


def logits(model, ids_BT, segments_BT=None, positions_BT=None):
    if segments_BT is None:
        segments_BT, positions_BT = one_text(ids_BT.shape)
    return np.asarray(read(model, ids_BT, segments_BT, positions_BT, None)[0])


@nnx.jit
def read(model, ids_BT, segments_BT, positions_BT, cache):
    """(logits_BTV, cache)."""
    hidden_BTD, cache = model(model.embed(ids_BT), segments_BT, positions_BT, cache)
    return model.logits(hidden_BTD), cache


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_llama_agrees_with_transformers(cfg):
    ours, theirs = parity.decoder(cfg)
    expected = theirs(torch.from_numpy(text())).logits
    parity.assert_close(logits(ours, text()), expected)


@pytest.mark.parametrize("name", ["grouped", "multi_head"])
def test_each_block_agrees_with_transformers(name):
    cfg = VARIANTS[name]
    ours, theirs = parity.decoder(cfg)
    seen = parity.record(parity.blocks_of(theirs))
    theirs(torch.from_numpy(text()))
    _, positions_BT = one_text(text().shape)
    angles_BTK = rotary_angles(positions_BT, cfg)
    mask_BTS = np.tril(np.ones((9, 9), bool))[None]
    for block, (x_BTD, expected) in zip(unstack(ours.blocks), seen):
        out_BTD, _ = parity.call(block, x_BTD.numpy(), angles_BTK, mask_BTS)
        parity.assert_close(out_BTD, expected)


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(SMOLLM2_135M, id="smollm2_135m"),
        # Up to 3 GiB and half a minute each.
        pytest.param(VICUNA_7B, id="vicuna_7b", marks=pytest.mark.slow),
        pytest.param(LLAMA2_7B_CHAT, id="llama2_7b_chat", marks=pytest.mark.slow),
        pytest.param(VICUNA_13B, id="vicuna_13b", marks=pytest.mark.slow),
    ],
)
def test_a_block_of_full_width_agrees_with_transformers(preset):
    cfg = dataclasses.replace(preset, num_layers=1, vocab_size=TINY.vocab_size)
    ours, theirs = parity.decoder(cfg)
    ids_BT = text(batch=1, length=5)
    parity.assert_close(logits(ours, ids_BT), theirs(torch.from_numpy(ids_BT)).logits)


def test_the_weights_are_large_enough_to_see_a_wrong_rotation():
    _, theirs = parity.decoder(TINY)
    right = theirs(torch.from_numpy(text())).logits
    shifted = torch.arange(9)[None] * 2
    wrong = theirs(torch.from_numpy(text()), position_ids=shifted).logits
    assert parity.error(wrong, right) > 1000 * parity.TOLERANCE


@pytest.mark.parametrize("eps, other", [(1e-6, 1e-5), (1e-5, 1e-6)])
def test_eps_is_the_presets(eps, other):
    cfg = dataclasses.replace(TINY, eps=eps)
    ours, theirs = parity.decoder(cfg, scale=3e-3)
    expected = theirs(torch.from_numpy(text())).logits
    parity.assert_close(logits(ours, text()), expected)
    for module in theirs.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = other
    wrong = theirs(torch.from_numpy(text())).logits
    assert parity.error(wrong, expected) > 1000 * parity.TOLERANCE


# Rotary positions


@pytest.mark.parametrize("position", [1, 257, 4095])
def test_rotation_is_the_half_rotation_in_float64(position):
    x_K = parity.normal(0, TINY.head_size).astype(np.float64)
    half = TINY.head_size // 2
    angle_K = position * TINY.rope_theta ** (-np.arange(half) / half)
    pairs_K = (x_K[:half] + 1j * x_K[half:]) * np.exp(1j * angle_K)
    expected = np.concatenate([pairs_K.real, pairs_K.imag])
    angles_BTK = rotary_angles(np.array([[position]]), TINY)
    ours = rotate(jnp.asarray(x_K, jnp.float32)[None, None, None], angles_BTK)
    # float32 knows an angle of 4095 to 2e-4, in every implementation of the reference.
    parity.assert_close(ours[0, 0, 0], expected, 1e-6 + 3e-7 * position)


def test_a_product_turns_heads_as_moved_halves_do():
    """To the bit, and so do the gradients."""
    x_BTNK = jax.random.normal(jax.random.key(0), (2, 3, 5, 10)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned_by_product(x_BTNK), halves_moved(x_BTNK))
    _, by_product = jax.vjp(turned_by_product, x_BTNK)
    _, by_moving = jax.vjp(halves_moved, x_BTNK)
    cotangent_BTNK = x_BTNK[::-1].astype(jnp.float32)
    np.testing.assert_array_equal(
        by_product(cotangent_BTNK)[0], by_moving(cotangent_BTNK)[0]
    )


def test_angles_stay_float32_in_a_bfloat16_model():
    angles_BTK = rotary_angles(jnp.array([[256, 257]]), TINY)
    assert angles_BTK.dtype == jnp.float32
    assert float(angles_BTK[0, 1, 0] - angles_BTK[0, 0, 0]) == 1


def test_only_distances_between_positions_matter():
    ours, _ = parity.decoder(TINY)
    segments_BT, positions_BT = one_text(text().shape)
    moved = logits(ours, text(), segments_BT, positions_BT + 20)
    parity.assert_close(moved, logits(ours, text()))


# What must not matter


def test_future_tokens_do_not_change_past_logits():
    ours, _ = parity.decoder(TINY)
    ids_BT = text()
    changed_BT = ids_BT.copy()
    changed_BT[:, 5:] = (changed_BT[:, 5:] + 1) % TINY.vocab_size
    before, after = logits(ours, ids_BT), logits(ours, changed_BT)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert parity.error(before[:, 5:], after[:, 5:]) > 0.01


def test_padding_changes_no_logits_of_the_text():
    ours, _ = parity.decoder(TINY)
    segments_BT, positions_BT = one_text((2, 13))
    segments_BT[:, 9:] = 0
    ids_BT = np.pad(text(), [(0, 0), (0, 4)], constant_values=7)
    padded = logits(ours, ids_BT, segments_BT, positions_BT)
    parity.assert_close(padded[:, :9], logits(ours, text()), 1e-6)


def test_other_rows_and_the_place_in_the_batch_change_nothing():
    ours, _ = parity.decoder(TINY)
    ids_BT = text(batch=4)
    together = logits(ours, ids_BT)
    reversed_rows = logits(ours, ids_BT[::-1])
    for i in range(4):
        parity.assert_close(logits(ours, ids_BT[i : i + 1])[0], together[i], 1e-6)
        parity.assert_close(reversed_rows[3 - i], together[i], 1e-6)


def test_packed_texts_have_the_logits_they_have_alone():
    ours, _ = parity.decoder(TINY)
    one, two = text(1, 4, seed=1), text(1, 6, seed=2)
    segments_BT = np.repeat([1, 2], [4, 6])[None] * BRANCHES
    positions_BT = np.concatenate([np.arange(4), np.arange(6)])[None]
    ids_BT = np.concatenate([one, two], axis=1)
    packed = logits(ours, ids_BT, segments_BT, positions_BT)
    parity.assert_close(packed[:, :4], logits(ours, one), 1e-6)
    parity.assert_close(packed[:, 4:], logits(ours, two), 1e-6)


# Stacks, capture, number formats


def test_one_layer_at_a_time_equals_the_stack():
    ours, _ = parity.decoder(TINY)
    stacked = logits(ours, text())
    ours.blocks = unstack(ours.blocks)
    parity.assert_close(logits(ours, text()), stacked, 1e-6)


@pytest.mark.parametrize("form", ["stacked", "one by one"])
def test_captured_hidden_states_are_those_of_transformers(form):
    ours, theirs = parity.decoder(TINY)
    seen = parity.record(parity.blocks_of(theirs))
    theirs(torch.from_numpy(text()))
    if form == "one by one":
        ours.blocks = unstack(ours.blocks)
    capture = Capture("llama/hidden")
    ours(ours.embed(text()), *one_text(text().shape), capture=capture)
    expected = torch.stack([output for _, output in seen])
    parity.assert_close(capture.values["llama/hidden"], expected)


def test_without_a_capture_the_program_has_one_output():
    model = Llama(TINY, rngs=nnx.Rngs(0))
    segments_BT, positions_BT = one_text((2, 9))

    def run(x_BTD):
        return model(x_BTD, segments_BT, positions_BT)[0]

    found = parity.equations(run, parity.normal(0, 2, 9, TINY.width))
    scans = [e for e in found if e.primitive.name == "scan"]
    assert [len(scan.outvars) for scan in scans] == [1]


def test_a_bfloat16_model_has_float32_norms_softmax_angles_and_logits():
    for tied in (False, True):
        cfg = dataclasses.replace(TINY, tie_embeddings=tied)
        dtypes = DTypes("bfloat16", "bfloat16", "bfloat16")
        model = Llama(cfg, dtypes=dtypes, rngs=nnx.Rngs(0))
        segments_BT, positions_BT = one_text((2, 9))

        def run(ids_BT, model=model, at=(segments_BT, positions_BT)):
            return model.logits(model(model.embed(ids_BT), *at)[0])

        assert run(text()).dtype == jnp.float32
        found = parity.equations(run, text())
        for name in ("exp", "rsqrt", "sin", "cos"):
            used = {e.invars[0].aval.dtype for e in found if e.primitive.name == name}
            assert used == {jnp.dtype("float32")}, name
        [last] = [e for e in found if e.primitive.name == "dot_general"][-1:]
        assert [v.aval.dtype for v in last.invars] == [jnp.bfloat16] * 2
        assert last.outvars[0].aval.dtype == jnp.float32


# The cache


@pytest.mark.parametrize("form", ["stacked", "one by one"])
@pytest.mark.parametrize("chunks", [(9,), (4, 1, 1, 1, 1, 1), (3, 2, 4)], ids=str)
def test_cached_decoding_equals_full_forward(form, chunks):
    ours, _ = parity.decoder(TINY)
    expected = logits(ours, text())
    if form == "one by one":
        ours.blocks = unstack(ours.blocks)
    cache, start, parts = ours.new_cache(batch=2, places=13), 0, []
    for length in chunks:
        ids_BT = text()[:, start : start + length]
        segments_BT, positions_BT = one_text(ids_BT.shape)
        part, cache = read(ours, ids_BT, segments_BT, positions_BT + start, cache)
        parts.append(part)
        start += length
    assert cache.length_B.tolist() == [9, 9]
    parity.assert_close(np.concatenate(parts, axis=1), expected, 2e-6)


def test_rows_of_different_lengths_decode_as_if_alone():
    ours, _ = parity.decoder(TINY)
    lengths = np.array([3, 6, 1])
    ids_BT = text(batch=3, length=6)
    segments_BT, positions_BT = one_text(ids_BT.shape)
    segments_BT = np.where(positions_BT < lengths[:, None], segments_BT, 0)
    cache = ours.new_cache(batch=3, places=12)
    _, cache = read(ours, ids_BT, segments_BT, positions_BT, cache)
    assert cache.length_B.tolist() == lengths.tolist()
    answers_BT = text(batch=3, length=4, seed=8)
    for step in range(4):
        ids_B1, segments_B1 = answers_BT[:, step : step + 1], np.full((3, 1), BRANCHES)
        found_B1V, cache = read(
            ours, ids_B1, segments_B1, cache.length_B[:, None], cache
        )
    for row, length in enumerate(lengths):
        alone = np.concatenate([ids_BT[row, :length], answers_BT[row]])[None]
        parity.assert_close(found_B1V[row, 0], logits(ours, alone)[0, -1], 2e-6)


def test_a_row_that_reads_nothing_keeps_its_cache():
    ours, _ = parity.decoder(TINY)
    segments_BT, positions_BT = one_text((2, 9))
    cache = ours.new_cache(batch=2, places=12)
    _, before = read(ours, text(), segments_BT, positions_BT, cache)
    padding_B1 = np.array([[0], [BRANCHES]])
    ids_B1, positions_B1 = np.array([[1], [2]]), np.array([[9], [9]])
    _, after = read(ours, ids_B1, padding_B1, positions_B1, before)
    assert after.length_B.tolist() == [9, 10]
    np.testing.assert_array_equal(after.k[:, 0, :9], before.k[:, 0, :9])
    assert not after.segments_BS[0, 9:].any()
