"""Learning rate, decay, clipping, and which parameters train."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import checkpoint, optim
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.minigpt4 import PRESETS
from tests.training import config

PATHS = [
    "llama/blocks/attn/q/kernel",
    "projector/bias",
    "projector/kernel",
    "qformer/layers/attn_norm/scale",
    "qformer/query_tokens",
]
STAGE_1 = dict(
    schedule="linear_warmup_cosine_lr",
    peak_lr=1e-4,
    end_lr=8e-5,
    warmup_lr=1e-6,
    warmup_steps=5000,
    epoch_steps=5000,
    total_steps=20_000,
)
STAGE_2 = STAGE_1 | dict(
    peak_lr=3e-5, end_lr=1e-5, warmup_steps=200, epoch_steps=200, total_steps=1000
)


def knobs(**changes):
    changes = {f"optim__{name}": value for name, value in changes.items()}
    return config("unused", **changes).optim


def test_the_rate_rises_from_0_and_falls_on_a_cosine_that_ends_with_the_run():
    rate = optim.schedule(
        knobs(peak_lr=4e-4, end_lr=2e-5, warmup_steps=50, total_steps=2_000)
    )
    assert float(rate(0)) == 0
    assert float(rate(10)) == pytest.approx(10 / 50 * 4e-4)
    assert float(rate(50)) == pytest.approx(4e-4)
    # Half of the way down in time is half of the way down in rate.
    assert float(rate((50 + 2_000) // 2)) == pytest.approx((4e-4 + 2e-5) / 2, rel=1e-5)
    quarter = 2e-5 + (4e-4 - 2e-5) * (1 + np.cos(np.pi / 4)) / 2
    assert float(rate(50 + 1_950 // 4)) == pytest.approx(quarter, rel=2e-3)
    assert float(rate(2_000)) == pytest.approx(2e-5)


@pytest.mark.parametrize(
    "published, step, want",
    [
        # The sheet's numbers: at the end of the warmup the rate falls at once.
        (STAGE_1, 0, 1e-6),
        (STAGE_1, 4_999, 9.99802e-5),
        (STAGE_1, 5_000, 9.707107e-5),
        (STAGE_1, 10_000, 9e-5),
        (STAGE_1, 19_999, 8e-5),
        (STAGE_2, 0, 1e-6),
        (STAGE_2, 199, 2.98550e-5),
        (STAGE_2, 200, 2.809017e-5),
        (STAGE_2, 500, 2e-5),
        (STAGE_2, 999, 1.000005e-5),
    ],
)
def test_the_references_cosine_has_the_published_rates(published, step, want):
    rate = optim.schedule(knobs(**published))
    assert float(rate(step)) == pytest.approx(want, rel=2e-6)


def test_the_references_warmup_begins_anew_in_each_epoch_that_it_outlasts():
    rate = optim.schedule(knobs(**STAGE_2 | dict(warmup_steps=250, epoch_steps=100)))
    rising = [float(rate(step)) for step in (0, 60, 99, 100, 160, 200, 249)]
    slope = (3e-5 - 1e-6) / 250
    want = [1e-6 + slope * i for i in (0, 60, 99, 0, 60, 0, 49)]
    np.testing.assert_allclose(rising, want, rtol=1e-5)
    falling = 1e-5 + 1e-5 * (1 + math.cos(math.pi * 250 / 1000))
    assert float(rate(250)) == pytest.approx(falling, rel=1e-5)


def test_a_warmup_of_no_steps_begins_at_the_peak():
    rate = optim.schedule(knobs(**STAGE_2 | dict(warmup_steps=0)))
    assert float(rate(0)) == pytest.approx(3e-5)


def test_the_references_stairs_warm_up_in_the_first_epoch_and_fall_with_each():
    values = STAGE_2 | dict(schedule="linear_warmup_step_lr", decay_rate=0.5)
    rate = optim.schedule(knobs(**values | dict(warmup_steps=80)))
    first = [float(rate(step)) for step in (0, 40, 80, 199)]
    np.testing.assert_allclose(first, [1e-6, 1.55e-5, 3e-5, 3e-5], rtol=1e-6)
    later = [float(rate(step)) for step in (200, 399, 400, 999)]
    np.testing.assert_allclose(later, [1.5e-5, 1.5e-5, 1e-5, 1e-5], rtol=1e-6)
    # A warmup that is longer than the epoch is never finished.
    rate = optim.schedule(knobs(**values | dict(warmup_steps=400)))
    assert float(rate(199)) == pytest.approx(1e-6 + 2.9e-5 * 199 / 400)
    assert float(rate(200)) == pytest.approx(1.5e-5)


@pytest.mark.parametrize("name", ["demo", "minigpt4_vicuna_7b"])
def test_biases_norms_and_layer_scale_do_not_decay_and_all_else_does(name):
    paths = checkpoint.parameter_shapes(PRESETS[name])
    decaying = optim.decays(paths)
    kinds = {path.rpartition("/")[2]: hit for path, hit in decaying.items()}
    assert {kind: hit for kind, hit in kinds.items() if "layer_scale" not in kind} == {
        "kernel": True,
        "embedding": True,
        "query_tokens": True,
        "class_token": True,
        "position_embedding": True,
        "bias": False,
        "scale": False,
    }
    assert not any(kinds[kind] for kind in kinds if "layer_scale" in kind)


def test_an_update_is_to_be_scaled_by_the_rate_and_subtracted():
    params = {path: jnp.full((2, 3), 2.0) for path in PATHS}
    optimizer = optim.make_optimizer(knobs(weight_decay=0.5))
    no_grads = {path: jnp.zeros((2, 3)) for path in PATHS}
    updates, _ = optimizer.update(no_grads, optimizer.init(params), params)
    for path, update in updates.items():
        want = 0.5 * 2.0 if path.endswith(("kernel", "query_tokens")) else 0.0
        np.testing.assert_allclose(update, want, rtol=1e-6)
    grads = {path: jnp.full((2, 3), 1e-3) for path in PATHS}
    optimizer = optim.make_optimizer(knobs(weight_decay=0.0, eps=1e-3))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(
        updates["projector/bias"], 0.5, rtol=1e-5
    )  # g / (g + eps)


def test_clipping_scales_all_gradients_by_one_factor_and_0_is_off():
    params = {"a/kernel": jnp.zeros(2), "b/kernel": jnp.zeros(1)}
    grads = {"a/kernel": jnp.array([3.0, 0.0]), "b/kernel": jnp.array([4.0])}
    first_moments = {}
    for clip_norm in (0.0, 1.0, 10.0):
        optimizer = optim.make_optimizer(knobs(clip_norm=clip_norm, b1=0.5))
        _, state = optimizer.update(grads, optimizer.init(params), params)
        moments = [s.mu for s in flat(state) if hasattr(s, "mu")]
        first_moments[clip_norm] = [2 * m for m in moments[0].values()]
    np.testing.assert_allclose(np.concatenate(first_moments[0.0]), [3, 0, 4])
    np.testing.assert_allclose(np.concatenate(first_moments[1.0]), [0.6, 0, 0.8])
    np.testing.assert_allclose(np.concatenate(first_moments[10.0]), [3, 0, 4])


def flat(state):
    """The named parts of a chained optimizer's state."""
    if hasattr(state, "_fields"):
        return [state]
    return [part for inner in state for part in flat(inner)]


def test_patterns_select_whole_paths_in_order():
    assert optim.select(PATHS, [r"qformer/.*", r"projector/kernel"]) == PATHS[2:]
    assert optim.select(PATHS, [r".*/kernel"]) == [PATHS[0], PATHS[2]]


@pytest.mark.parametrize(
    "pattern, complaint",
    [
        (r"qfromer/.*", r"did you mean 'qformer/\.\*'"),
        (r"projector/kernels", "did you mean 'projector/kernel'"),
        (r"projector", "'projector' matches no parameter"),  # not the whole path
        (r"x", "paths look like 'llama/blocks/attn/q/kernel'"),
        (r"qformer/(", "no regular expression"),
    ],
)
def test_a_pattern_that_hits_nothing_is_refused_with_the_nearest(pattern, complaint):
    with pytest.raises(ConfigError, match=complaint):
        optim.select(PATHS, [r"projector/.*", pattern])
