"""Learning rate, decay, clipping, and which parameters train."""

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import optim
from minigpt4_jax.errors import ConfigError
from tests.training import config

PATHS = [
    "llama/blocks/attn/q/kernel",
    "projector/bias",
    "projector/kernel",
    "qformer/layers/attn_norm/scale",
    "qformer/query_tokens",
]


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


def test_only_kernels_decay():
    decaying = optim.decays(dict.fromkeys(PATHS))
    assert [path for path, decays in decaying.items() if decays] == [
        "llama/blocks/attn/q/kernel",
        "projector/kernel",
    ]
    params = {path: jnp.full((2, 3), 2.0) for path in PATHS}
    optimizer = optim.make_optimizer(
        knobs(peak_lr=0.1, warmup_steps=0, total_steps=10, weight_decay=0.5)
    )
    no_grads = {path: jnp.zeros((2, 3)) for path in PATHS}
    updates, _ = optimizer.update(no_grads, optimizer.init(params), params)
    for path, update in updates.items():
        want = -0.1 * 0.5 * 2.0 if path.endswith("/kernel") else 0.0
        np.testing.assert_allclose(update, want, rtol=1e-6)


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
