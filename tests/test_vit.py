import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from minigpt4_jax.models.layers import Capture, DTypes, unstack
from minigpt4_jax.models.vit import (
    DINOV2_S,
    EVA_G,
    ViT,
    ViTConfig,
    resize_position_embedding,
)
from tests import parity

EVA = ViTConfig(
    image_size=20,
    patch_size=4,
    width=30,
    num_layers=3,
    num_heads=5,
    mlp_width=43,
    eps=1e-6,
    ln_vision_eps=1e-5,
)
DINO = ViTConfig(
    image_size=22,  # one pixel more than three patches
    patch_size=7,
    width=24,
    num_layers=4,
    num_heads=3,
    mlp_width=72,
    eps=1e-6,
    ln_vision_eps=1e-6,
    k_bias=True,
    layer_scale=True,
)
TOWERS = pytest.mark.parametrize("cfg", [EVA, DINO], ids=["eva", "dinov2"])


def pixels(cfg, batch=2):
    return parity.normal(7, batch, cfg.image_size, cfg.image_size, 3)


@nnx.jit
def see(ours, pixels_BHWC):
    return ours.ln_vision(ours.vit(pixels_BHWC))


@TOWERS
def test_vit_and_ln_vision_agree_with_transformers(cfg):
    ours, theirs = parity.vision(cfg)
    pixels_BHWC = pixels(cfg)
    expected = theirs(parity.channels_first(pixels_BHWC)).last_hidden_state
    parity.assert_close(see(ours, pixels_BHWC), expected)


@TOWERS
def test_each_block_agrees_with_transformers(cfg):
    ours, theirs = parity.vision(cfg)
    seen = parity.record(parity.blocks_of(theirs))
    theirs(parity.channels_first(pixels(cfg)))
    assert len(seen) == cfg.num_layers
    for block, (x_BPD, expected) in zip(unstack(ours.vit.blocks), seen):
        parity.assert_close(parity.call(block, x_BPD.numpy()), expected)


# Five tokens of one block at the width of the published towers.
@pytest.mark.parametrize("preset", [EVA_G, DINOV2_S], ids=["eva_g", "dinov2_s"])
def test_a_block_of_full_width_agrees_with_transformers(preset):
    cfg = dataclasses.replace(preset, num_layers=1, image_size=28)
    ours, theirs = parity.vision(cfg)
    pixels_BHWC = pixels(cfg, batch=1)
    expected = theirs(parity.channels_first(pixels_BHWC)).last_hidden_state
    parity.assert_close(see(ours, pixels_BHWC), expected)


@pytest.mark.parametrize("change", ["gelu", "heads"])
def test_the_weights_are_large_enough_to_see_a_wrong_tower(change):
    _, theirs = parity.vision(EVA)
    pixels_BCHW = parity.channels_first(pixels(EVA))
    right = theirs(pixels_BCHW).last_hidden_state
    for layer in parity.blocks_of(theirs):
        if change == "gelu":
            layer.mlp.activation_fn = torch.nn.GELU(approximate="tanh")
        else:  # heads of q, but not of k and v, one place on
            weight = layer.self_attn.qkv.weight.data
            weight[: EVA.width] = weight[: EVA.width].roll(EVA.head_size, dims=0)
    wrong = theirs(pixels_BCHW).last_hidden_state
    assert parity.error(wrong, right) > 5 * parity.TOLERANCE


@pytest.mark.parametrize("wrong", ["blocks", "ln_vision"])
def test_blocks_have_an_eps_of_1e_6_and_ln_vision_of_1e_5(wrong):
    ours, theirs = parity.vision(EVA, scale=1e-3)
    pixels_BCHW = parity.channels_first(pixels(EVA))
    expected = theirs(pixels_BCHW).last_hidden_state
    parity.assert_close(see(ours, pixels(EVA)), expected)
    if wrong == "ln_vision":
        theirs.post_layernorm.eps = EVA.eps
    else:
        for layer in parity.blocks_of(theirs):
            layer.layer_norm1.eps = layer.layer_norm2.eps = EVA.ln_vision_eps
    other = theirs(pixels_BCHW).last_hidden_state
    assert parity.error(other, expected) > 100 * parity.TOLERANCE


def test_one_layer_at_a_time_equals_the_stack():
    ours, _ = parity.vision(EVA)
    stacked = parity.call(ours.vit, pixels(EVA))
    ours.vit.blocks = unstack(ours.vit.blocks)
    parity.assert_close(parity.call(ours.vit, pixels(EVA)), stacked, 1e-6)


def test_other_images_of_the_batch_change_nothing():
    ours, _ = parity.vision(EVA)
    together_BPD = parity.call(ours.vit, pixels(EVA, batch=3))
    for i in range(3):
        alone_BPD = parity.call(ours.vit, pixels(EVA, batch=3)[i : i + 1])
        parity.assert_close(alone_BPD[0], together_BPD[i], 1e-6)


def test_captured_hidden_states_are_those_of_transformers():
    ours, theirs = parity.vision(EVA)
    capture = Capture("vit/hidden")
    plain_BPD = ours.vit(pixels(EVA))
    captured_BPD = ours.vit(pixels(EVA), capture)
    seen = parity.record(parity.blocks_of(theirs))
    theirs(parity.channels_first(pixels(EVA)))
    expected = torch.stack([output for _, output in seen])
    parity.assert_close(capture.values["vit/hidden"], expected)
    np.testing.assert_array_equal(plain_BPD, captured_BPD)


def test_capture_also_works_one_layer_at_a_time():
    ours, _ = parity.vision(EVA)
    scanned, one_by_one = Capture("vit/hidden"), Capture("vit/hidden")
    ours.vit(pixels(EVA), scanned)
    ours.vit.blocks = unstack(ours.vit.blocks)
    ours.vit(pixels(EVA), one_by_one)
    parity.assert_close(
        one_by_one.values["vit/hidden"], scanned.values["vit/hidden"], 1e-6
    )


def test_without_a_capture_the_program_has_one_output():
    vit = ViT(EVA, rngs=nnx.Rngs(0))
    scans = [
        e for e in parity.equations(vit, pixels(EVA)) if e.primitive.name == "scan"
    ]
    assert [len(scan.outvars) for scan in scans] == [1]


def test_an_image_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="got 24 x 20, want 20 x 20"):
        ViT(EVA, rngs=nnx.Rngs(0))(np.zeros((1, 24, 20, 3), np.float32))


def test_the_residual_stream_is_float32_in_a_bfloat16_tower():
    vit = ViT(EVA, dtypes=DTypes("bfloat16", "bfloat16", "bfloat16"), rngs=nnx.Rngs(0))
    kernels = jax.tree.leaves(nnx.state(vit, nnx.Param))
    assert {w.dtype for w in kernels} == {jnp.dtype("bfloat16")}
    capture = Capture("vit/hidden")
    out_BPD = vit(pixels(EVA), capture)
    assert out_BPD.dtype == capture.values["vit/hidden"].dtype == jnp.float32
    found = parity.equations(vit, pixels(EVA))
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert {e.invars[0].aval.dtype for e in products} == {jnp.dtype("bfloat16")}


# Position embeddings at another resolution


@pytest.mark.parametrize("old, new", [(5, 10), (16, 32), (37, 16), (6, 7), (3, 1)])
def test_position_embeddings_are_resized_as_torch_does(old, new):
    embedding_PD = parity.normal(0, old * old + 1, 6)
    grid = torch.from_numpy(embedding_PD[1:]).reshape(1, old, old, 6)
    resized = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2), size=(new, new), mode="bicubic", align_corners=False
    )
    expected_PD = resized.permute(0, 2, 3, 1).reshape(new * new, 6)
    ours_PD = resize_position_embedding(embedding_PD, new)
    np.testing.assert_array_equal(ours_PD[0], embedding_PD[0])
    parity.assert_close(ours_PD[1:], expected_PD, 1e-5)


def test_position_embeddings_of_the_right_size_stay_as_they_are():
    embedding_PD = parity.normal(0, 26, 6)
    np.testing.assert_array_equal(
        resize_position_embedding(embedding_PD, 5), embedding_PD
    )


def test_position_embeddings_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="28 rows"):
        resize_position_embedding(parity.normal(0, 28, 6), 5)
