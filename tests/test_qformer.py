import dataclasses

import numpy as np
import pytest
import torch
from flax import nnx

from minigpt4_jax.models.layers import Capture, unstack
from minigpt4_jax.models.qformer import BLIP2, QFormer, QFormerConfig
from tests import parity

TINY = QFormerConfig(
    num_queries=7,
    width=20,
    num_layers=5,
    num_heads=4,
    mlp_width=33,
    encoder_width=26,
    cross_attention_freq=2,
    eps=1e-12,
)
PATCHES = 11


def patches(cfg, batch=2, seed=5):
    return parity.normal(seed, batch, PATCHES, cfg.encoder_width)


@nnx.jit
def one_layer(layer, look, x_BQD, patches_BPE):
    """A layer as transformers counts them, with or without cross-attention."""
    x_BQD = layer.attend(x_BQD)
    if look is not None:
        x_BQD, _ = look(x_BQD, patches_BPE, keep_map=False)
    return layer.think(x_BQD)


# The last group of layers is complete, short, or the only one.
@pytest.mark.parametrize(
    "freq, num_layers", [(1, 3), (2, 4), (2, 5), (3, 4), (3, 2)], ids=str
)
def test_qformer_agrees_with_transformers(freq, num_layers):
    cfg = dataclasses.replace(TINY, cross_attention_freq=freq, num_layers=num_layers)
    ours, theirs = parity.queries(cfg)
    capture = Capture("qformer/hidden", "qformer/cross_attention")
    out_BQD = ours(patches(cfg), capture)
    seen = parity.record(parity.blocks_of(theirs))
    expected = theirs(torch.from_numpy(patches(cfg)), output_attentions=True)
    parity.assert_close(out_BQD, expected.last_hidden_state)
    parity.assert_close(
        capture.values["qformer/hidden"], torch.stack([output for _, output in seen])
    )
    parity.assert_close(
        capture.values["qformer/cross_attention"],
        torch.stack(expected.cross_attentions),
    )


def test_each_block_agrees_with_transformers():
    ours, theirs = parity.queries(TINY)
    seen = parity.record(parity.blocks_of(theirs))
    theirs(torch.from_numpy(patches(TINY)))
    cross = iter(unstack(ours.cross))
    for i, layer in enumerate(unstack(ours.layers)):
        x_BQD, expected = seen[i]
        look = next(cross) if i % TINY.cross_attention_freq == 0 else None
        out_BQD = one_layer(layer, look, x_BQD.numpy(), patches(TINY))
        parity.assert_close(out_BQD, expected)


def test_blocks_of_full_width_agree_with_transformers():
    cfg = dataclasses.replace(BLIP2, num_layers=2)
    ours, theirs = parity.queries(cfg)
    expected = theirs(torch.from_numpy(patches(cfg))).last_hidden_state
    parity.assert_close(parity.call(ours, patches(cfg)), expected)


def test_every_norm_has_an_eps_of_1e_12():
    ours, theirs = parity.queries(TINY, scale=1e-3)
    patches_BPE = torch.from_numpy(patches(TINY))
    expected = theirs(patches_BPE).last_hidden_state
    parity.assert_close(parity.call(ours, patches(TINY)), expected)
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-8
            other = theirs(patches_BPE).last_hidden_state
            assert parity.error(other, expected) > 10 * parity.TOLERANCE
            module.eps = TINY.eps


def test_other_images_of_the_batch_change_nothing():
    ours, _ = parity.queries(TINY)
    together_BQD = parity.call(ours, patches(TINY, batch=3))
    for i in range(3):
        alone_BQD = parity.call(ours, patches(TINY, batch=3)[i : i + 1])
        parity.assert_close(alone_BQD[0], together_BQD[i], 1e-6)


def test_the_order_of_the_patches_does_not_matter():
    ours, _ = parity.queries(TINY)
    patches_BPE = patches(TINY)
    turned, straight = patches_BPE[:, ::-1], patches_BPE
    parity.assert_close(parity.call(ours, turned), parity.call(ours, straight), 1e-5)


def test_cross_attention_maps_are_probabilities():
    ours, _ = parity.queries(TINY)
    capture = Capture("qformer/cross_attention")
    ours(patches(TINY), capture)
    maps_LBNQP = capture.values["qformer/cross_attention"]
    assert maps_LBNQP.shape == (3, 2, TINY.num_heads, TINY.num_queries, PATCHES)
    np.testing.assert_allclose(maps_LBNQP.sum(-1), 1, rtol=1e-5)


def test_without_a_capture_nothing_is_computed_for_it():
    ours = QFormer(TINY, rngs=nnx.Rngs(0))

    def captured(patches_BPE):
        capture = Capture("qformer/cross_attention")
        return ours(patches_BPE, capture), capture.values

    def softmaxes(function):
        found = parity.equations(function, patches(TINY))
        return len([e for e in found if e.primitive.name == "exp"])

    [scan] = [
        e for e in parity.equations(ours, patches(TINY)) if e.primitive.name == "scan"
    ]
    assert len(scan.outvars) == 1
    # One more in the body of the scan, one more in the unfinished last group.
    assert softmaxes(captured) == softmaxes(ours) + 2
