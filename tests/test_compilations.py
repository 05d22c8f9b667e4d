"""Compiled programs are counted."""

import jax
import jax.numpy as jnp

from minigpt4_jax import compilations


def test_a_new_shape_counts_and_a_known_one_does_not():
    compilations.count()
    double = jax.jit(lambda x_B: x_B * 2)
    arrays = [jnp.zeros(n) for n in (3, 5)]
    before = compilations.count()
    double(arrays[0])
    double(arrays[0])
    assert compilations.count() == before + 1
    double(arrays[1])
    assert compilations.count() == before + 2
