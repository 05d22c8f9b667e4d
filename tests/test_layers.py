import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minigpt4_jax.models.layers import (
    BRANCHES,
    MLP,
    Capture,
    DTypes,
    LayerNorm,
    Linear,
    RMSNorm,
    apply_stack,
    attend,
    attention_map,
    attention_mask,
    linear,
    make_stack,
    unstack,
)
from tests import parity

BF16 = DTypes("bfloat16", "bfloat16", "bfloat16")


def test_linear_joins_the_last_axes_with_the_kernels_first():
    x, kernel, bias = (
        parity.normal(0, 2, 3, 4, 5),
        parity.normal(1, 4, 5, 6, 7),
        parity.normal(2, 6, 7),
    )
    ours = linear(x, kernel, bias, dtypes=DTypes(), axes=2)
    parity.assert_close(ours, np.einsum("abNK,NKcd->abcd", x, kernel) + bias)


def test_linear_multiplies_in_the_compute_dtype_and_keeps_the_sums_if_asked():
    x, kernel = parity.normal(0, 3, 40), parity.normal(1, 40, 5)
    dtypes = DTypes(compute="bfloat16")
    rounded = linear(x, kernel, dtypes=dtypes)
    kept = linear(x, kernel, dtypes=dtypes, out_dtype=jnp.float32)
    x16, kernel16 = jnp.bfloat16(x), jnp.bfloat16(kernel)
    exact = np.asarray(x16, np.float64) @ np.asarray(kernel16, np.float64)
    assert (rounded.dtype, kept.dtype) == (jnp.bfloat16, jnp.float32)
    parity.assert_close(kept, exact, 1e-6)
    assert parity.error(rounded, exact) > 1e-4


# At variance 1e-5 the eps of the ViT's blocks, ln_vision and the Q-Former are far apart.
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_layer_norm_agrees_with_torch_at_each_eps(eps):
    theirs = parity.randomize(torch.nn.LayerNorm(48, eps=eps), seed=0)
    ours = LayerNorm(48, eps, dtypes=DTypes())
    ours.scale[...] = theirs.weight.numpy()
    ours.bias[...] = theirs.bias.numpy()
    x = 3 + math.sqrt(1e-5) * parity.normal(1, 5, 48)
    # Centering 3 +- 0.003 in float32 leaves 1e-4 of the deviation.
    parity.assert_close(ours(x), theirs(torch.from_numpy(x)), 2e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_rms_norm_agrees_with_transformers_at_each_eps(eps):
    theirs = parity.randomize(LlamaRMSNorm(48, eps=eps), seed=0)
    ours = RMSNorm(48, eps, dtypes=DTypes())
    ours.scale[...] = theirs.weight.numpy()
    x = math.sqrt(1e-5) * parity.normal(1, 5, 48)
    parity.assert_close(ours(x), theirs(torch.from_numpy(x)))


def test_the_mlp_uses_the_erf_gelu():
    mlp = MLP(6, 10, dtypes=DTypes(), rngs=nnx.Rngs(0))
    x = parity.normal(0, 7, 6)
    up = torch.from_numpy(np.array(x @ mlp.up.kernel[...]))
    exact = torch.nn.functional.gelu(up) @ np.array(mlp.down.kernel[...])
    tanh = torch.nn.functional.gelu(up, approximate="tanh")
    parity.assert_close(mlp(x), exact)
    assert parity.error(tanh @ np.array(mlp.down.kernel[...]), exact) > 1e-4


# Attention and its mask


@pytest.mark.parametrize("num_kv_heads", [6, 3, 2, 1])
def test_attend_agrees_with_torch_for_grouped_keys(num_kv_heads):
    q_BTNK = parity.normal(0, 2, 5, 6, 4)
    k_BSGK, v_BSGK = parity.normal(1, 2, 2, 7, num_kv_heads, 4)
    mask_BTS = parity.normal(2, 2, 5, 7) > -0.5
    mask_BTS[..., 0] = True
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (q_BTNK, k_BSGK, v_BSGK))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(mask_BTS)[:, None], enable_gqa=True
    )
    ours = attend(q_BTNK, k_BSGK, v_BSGK, mask_BTS)
    parity.assert_close(ours, theirs.transpose(1, 2))


def test_the_attention_map_is_what_attend_uses():
    q_BTNK, k_BSNK = parity.normal(0, 2, 5, 3, 4), parity.normal(1, 2, 7, 3, 4)
    v_BSNK = parity.normal(2, 2, 7, 3, 4)
    map_BNTS = attention_map(q_BTNK, k_BSNK)
    ours = jnp.einsum("BNTS,BSNK->BTNK", map_BNTS, v_BSNK)
    parity.assert_close(ours, attend(q_BTNK, k_BSNK, v_BSNK))


def by_hand(segments_T, positions_T, segments_S, positions_S):
    """The rule of `attention_mask`, in words of Python, for one row."""
    allowed = np.zeros((len(segments_T), len(segments_S)), bool)
    for t, s in itertools.product(range(len(segments_T)), range(len(segments_S))):
        if segments_T[t] == 0 or segments_S[s] == 0:
            continue
        example_t, branch_t = divmod(int(segments_T[t]), BRANCHES)
        example_s, branch_s = divmod(int(segments_S[s]), BRANCHES)
        shared_or_own = branch_s in (0, branch_t)
        earlier = positions_S[s] <= positions_T[t]
        allowed[t, s] = example_t == example_s and shared_or_own and earlier
    return allowed


def test_the_mask_follows_its_rule_on_random_rows():
    draw = np.random.default_rng(0)
    choices = [0, 256, 257, 258, 511, 512, 513, 768]
    segments_BT, segments_BS = (
        draw.choice(choices, (4, 9)),
        draw.choice(choices, (4, 11)),
    )
    positions_BT, positions_BS = (
        draw.integers(0, 8, (4, 9)),
        draw.integers(0, 8, (4, 11)),
    )
    ours = attention_mask(segments_BT, positions_BT, segments_BS, positions_BS)
    rows = zip(segments_BT, positions_BT, segments_BS, positions_BS)
    np.testing.assert_array_equal(ours, [by_hand(*row) for row in rows])


def one_row(segments, positions):
    args = np.array([segments]), np.array([positions])
    return np.asarray(attention_mask(*args, *args)[0]).astype(int).tolist()


def test_plain_text_is_causal_and_padding_sees_and_is_seen_by_nothing():
    assert one_row([256, 256, 256, 0], [0, 1, 2, 3]) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 0],
    ]


def test_examples_packed_in_one_row_do_not_see_each_other():
    assert one_row([256, 256, 512, 512], [0, 1, 0, 1]) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_branches_share_a_prefix_and_not_each_other():
    assert one_row([256, 257, 257, 258], [0, 1, 2, 1]) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 1],
    ]


def test_a_position_that_may_attend_to_nothing_gives_no_nan():
    x_BTNK = parity.normal(0, 1, 3, 2, 4)
    mask_BTS = np.zeros((1, 3, 3), bool)
    gradient = jax.grad(lambda x: attend(x, x, x, mask_BTS).sum())(x_BTNK)
    assert np.isfinite(gradient).all()


# Stacks


def stack(length: int, width: int = 5):
    def make(rngs):
        return Linear(width, width, dtypes=DTypes(), rngs=rngs)

    def run(blocks, x):
        def step(block, x, scale):
            x = jnp.tanh(block(x)) * scale
            return x, x

        scales_L = jnp.arange(1.0, length + 1)
        return apply_stack(blocks, step, x, scales_L)

    return make_stack(make, length, nnx.Rngs(0)), run


def test_scan_equals_one_layer_at_a_time():
    blocks, run = stack(length=4)
    x = parity.normal(0, 3, 5)
    scanned, one_by_one = run(blocks, x), run(unstack(blocks), x)
    assert scanned[1].shape == (4, 3, 5)
    for ours, theirs in zip(scanned, one_by_one):
        parity.assert_close(ours, theirs, 1e-6)


def test_each_block_of_a_stack_is_drawn_apart():
    kernel_LDD = np.asarray(stack(length=3)[0].kernel[...])
    assert len(np.unique(kernel_LDD)) == kernel_LDD.size


def test_a_deeper_stack_is_not_a_longer_program():
    def length(layers):
        blocks, run = stack(layers)
        return len(parity.equations(lambda x: run(blocks, x), np.ones((3, 5))))

    assert length(2) == length(9)


# Capture and number formats


def test_an_unknown_capture_is_named():
    with pytest.raises(ValueError, match="vit/hiden"):
        Capture("vit/hiden")


def test_norms_are_float32_inside_whatever_comes_and_goes():
    for norm in (LayerNorm(8, 1e-6, dtypes=BF16), RMSNorm(8, 1e-6, dtypes=BF16)):
        x = jnp.ones((2, 8), jnp.bfloat16)
        assert norm(x).dtype == jnp.bfloat16
        roots = [e for e in parity.equations(norm, x) if e.primitive.name == "rsqrt"]
        assert [e.invars[0].aval.dtype for e in roots] == [jnp.float32]


def test_softmax_is_float32_on_bfloat16_queries():
    q_BTNK = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    found = parity.equations(attend, q_BTNK, q_BTNK, q_BTNK)
    powers = [e for e in found if e.primitive.name == "exp"]
    assert [e.invars[0].aval.dtype for e in powers] == [jnp.float32]
    assert attend(q_BTNK, q_BTNK, q_BTNK).dtype == jnp.bfloat16
