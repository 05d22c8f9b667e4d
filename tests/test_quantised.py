"""Weights in few bits: how far they are off, and what is multiplied by them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax.errors import ConfigError
from minigpt4_jax.generator import Generator
from minigpt4_jax.models import quantised
from minigpt4_jax.models.layers import DTypes, linear
from minigpt4_jax.models.llama import Llama
from minigpt4_jax.models.quantised import Int8, Quantisation
from minigpt4_jax.request import GREEDY, Request, user

FLOATS = DTypes()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def dequantised(kernel, scale):
    if kernel.dtype == jnp.uint8:
        return np.asarray(quantised.unpacked(kernel, scale, jnp.float32))
    return np.asarray(kernel * scale)


def test_int8_is_off_by_half_a_step_of_its_output_at_most():
    kernel = normal(24, 5, 7) * 10.0 ** np.arange(-3, 4)  # outputs of all sizes
    whole, scale = quantised.int8(kernel)
    assert whole.shape == (24, 5, 7) and whole.dtype == jnp.int8
    off = np.abs(dequantised(whole, scale) - kernel)
    assert (off <= 0.501 * np.abs(kernel).max(0) / 127).all()


def test_int4_is_off_by_less_than_a_step_of_its_group():
    kernel = normal(128, 11)
    packed, scale = quantised.int4(kernel)
    assert (
        packed.shape == (64, 11) and packed.nbytes + scale.nbytes == 128 * 11 * 5 // 8
    )
    groups = kernel.reshape(4, 32, 11)
    step = (groups.max(1) - groups.min(1)) / 15
    off = np.abs(dequantised(packed, scale) - kernel).reshape(4, 32, 11)
    assert (
        off.max(1) <= 1.6 * step
    ).all()  # a range may be cut by a fifth, for the rest
    assert (np.sqrt((off**2).mean(1)) <= 0.33 * step).all()  # even rounding: 0.29


def test_weights_that_were_16_even_steps_come_back_as_they_were():
    step = (1 + np.arange(6, dtype=np.float32)).reshape(2, 1, 3) / 256
    ladder = np.random.default_rng(0).permuted(
        np.tile(np.arange(16.0), (2, 3, 2)), axis=2
    )
    kernel = (ladder.swapaxes(1, 2) * step - 5 / 128).astype(np.float32).reshape(64, 3)
    np.testing.assert_allclose(
        dequantised(*quantised.int4(kernel)), kernel, atol=1e-6, rtol=0
    )


def test_weights_that_are_all_one_number_or_none_come_back():
    kernel = np.stack([np.zeros(64), np.full(64, 0.25)], 1).astype(np.float32)
    for make in (quantised.int8, quantised.int4):
        np.testing.assert_allclose(dequantised(*make(kernel)), kernel, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_product_is_that_of_the_weights_that_were_kept(kind, monkeypatch):
    heads, wide = normal(3, 8, 10), normal(24, 5, 7)
    x = normal(2, 1, 24, seed=1)
    for pieces in (1e9, 500.0):  # at once, and piece by piece
        monkeypatch.setattr(quantised, "PIECE", pieces)
        for kernel, axes in ((wide, 1), (heads, 2)):
            stored, scale = getattr(quantised, kind)(kernel, axes=axes)
            outs = kernel.shape[axes:]
            ours = linear(
                x.reshape(2, 1, *kernel.shape[:axes]),
                stored,
                jnp.ones(outs),
                dtypes=FLOATS,
                axes=axes,
                outs=outs,
                scale=scale,
            )
            want = x @ dequantised(stored, scale).reshape(24, -1)
            want = want.reshape(2, 1, *outs) + 1
            np.testing.assert_allclose(ours, want, atol=2e-5)


def test_rows_that_are_outputs_are_multiplied_as_they_lie():
    config = dataclasses.replace(tiny.CONFIG.llama, tie_embeddings=True)
    llama = Llama(config, rngs=nnx.Rngs(0))
    llama.embed.quantise("int8")
    table_VD = llama.embed.embedding[...] * llama.embed.embedding_scale[...][:, None]
    hidden_BTD = normal(2, 3, 24)
    np.testing.assert_allclose(
        llama.logits(hidden_BTD), hidden_BTD @ table_VD.T, atol=2e-5
    )


def test_a_product_in_digits_is_as_exact_as_one_of_floats():
    stored, scale = quantised.int8(normal(300, 7))
    x = normal(5, 300, seed=1) * np.array([[1e-9], [1.0], [30.0], [1e9], [0.0]])
    x[1, 0] = 100.0  # what else is in a row counts against its largest
    x = x.astype(np.float32)
    want = x.astype(np.float64) @ dequantised(stored, scale).astype(np.float64)
    got = linear(x, stored, dtypes=FLOATS, outs=(7,), scale=scale)
    most = np.abs(want).max(1, keepdims=True)
    assert (np.abs(got - want) <= 2e-6 * most).all() and most[3] > 1e9
    # Nothing of a row is in another, and what is not a number stays none.
    x[2, 4], x[0, 1] = np.nan, np.inf
    bad = linear(x, stored, dtypes=FLOATS, outs=(7,), scale=scale)
    np.testing.assert_array_equal(bad[jnp.array([1, 3, 4])], got[jnp.array([1, 3, 4])])
    assert not np.isfinite(np.asarray(bad)[[0, 2]]).any()


def test_tiles_of_int8_are_read_as_the_training_step_holds_them():
    whole, scale = quantised.int8(normal(6, 8))
    x = normal(20, 6, seed=1)
    tiles = whole.reshape(3, 2, 2, 4).swapaxes(1, 2).reshape(-1, 1, 2, 4)
    outs = dict(dtypes=FLOATS, outs=(8,), scale=scale)
    np.testing.assert_allclose(
        linear(x, tiles, **outs), linear(x, whole, **outs), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_gradient_of_x_is_that_of_the_weights_that_were_kept(kind):
    stored, scale = getattr(quantised, kind)(normal(24, 5))
    x, cotangent = normal(3, 24, seed=1), normal(3, 5, seed=2)

    def total(x):
        y = linear(x, stored, dtypes=FLOATS, outs=(5,), scale=scale)
        return (y * cotangent).sum()

    want = cotangent @ dequantised(stored, scale).T
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), want, atol=2e-5)


def test_keys_in_eight_bits_are_off_by_half_a_step_of_their_head():
    x = normal(2, 3, 4, 10)
    kept = Int8.of(x)
    off = np.abs(np.asarray(kept.floats(jnp.float32)) - x)
    assert (off.max(-1) <= 0.501 * np.abs(x).max(-1) / 127).all()


def test_logits_with_weights_and_cache_in_eight_bits_are_close():
    ids = np.arange(3, 11)[None]
    plain = tiny.model()
    want = np.asarray(plain(ids))
    model = tiny.model()
    model.quantise(Quantisation("int8", vision="int8", kv="int8"))
    got, cache = model(ids, cache=model.llama.new_cache(1, 9))
    assert cache.k.values.dtype == jnp.int8
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
    pixels = normal(1, 12, 12, 3)
    seen, wanted = model.encode_image(pixels), plain.encode_image(pixels)
    assert 0 < np.abs(seen - wanted).max() < 0.05 * np.abs(wanted).max()


def test_answers_are_the_same_alone_and_in_a_batch():
    model = tiny.model()
    model.quantise(Quantisation("int8", vision="int8", kv="int8"))
    gen = Generator(model, tiny.tokenizer(), batch_size=2, chunk=3)
    short = dataclasses.replace(GREEDY, max_tokens=6)
    asked = [
        Request([user(text, tiny.image())], sampling=short, id=text)
        for text in ("Hm?", "What is it?")
    ]
    said = {"Hm?": "", "What is it?": ""}
    for event in gen.submit(asked):
        said[event.request_id] += event.piece
    assert said["Hm?"] and said["Hm?"] == gen("Hm?", tiny.image(), sampling=short)


def test_an_unknown_format_is_an_error_with_the_known_ones():
    for wrong, name in (
        (("int5",), "quantize"),
        (("int8", "int4"), "vision"),
        (("", "", "int4"), "kv"),
    ):
        with pytest.raises(ConfigError, match=f"unknown {name} .*int8"):
            Quantisation(*wrong)


def test_a_weight_that_is_no_number_stays_seen_in_four_bits():
    x_IO = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    x_IO[3, 1], x_IO[5, 2] = np.nan, np.inf
    y_IO = np.asarray(quantised.unpacked(*quantised.int4(x_IO), np.float32))
    assert np.isfinite(y_IO[:, [0, 3]]).all()
    assert not np.isfinite(y_IO[3, 1]) and not np.isfinite(y_IO[5, 2])
