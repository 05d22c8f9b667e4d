"""A program's time from two rates: what is counted of it, and that it follows the rates."""

import jax
import jax.numpy as jnp
import pytest

from minigpt4_jax import hlo, roofline
from minigpt4_jax.roofline import Rates

SLOW_MEMORY = Rates(products=1e30, memory=1e6, dtype="float32")
SLOW_PRODUCTS = Rates(products=1e6, memory=1e30, dtype="float32")


def program(function, *args) -> hlo.Program:
    return hlo.Program(jax.jit(function).lower(*args).compile().as_text())


def layers(x_BD, stack_LDD):
    """A scan, whose body reads a slice of the stack."""

    def block(x_BD, w_DD):
        return jnp.tanh(x_BD @ w_DD), None

    return jax.lax.scan(block, x_BD, stack_LDD)[0]


X_BD, STACK_LDD = jnp.ones((24, 160)), jnp.ones((7, 160, 160))


def test_products_count_as_often_as_a_loop_runs():
    found = roofline.project(program(layers, X_BD, STACK_LDD), SLOW_PRODUCTS, 0)
    assert found.products == pytest.approx(2 * 24 * 160 * 160 * 7 / 1e6)
    assert found.seconds == pytest.approx(found.products) and not found.useful


def test_of_a_stack_a_block_reads_its_own_slice():
    found = roofline.project(program(layers, X_BD, STACK_LDD), SLOW_MEMORY, 0)
    once = STACK_LDD.nbytes + 7 * X_BD.nbytes
    # A slice may be written before it is multiplied; the whole stack seven times is
    # beyond that.
    assert once < 1e6 * found.memory < 5 * once < 7 * STACK_LDD.nbytes
    assert found.seconds == pytest.approx(found.memory)


def test_each_instruction_takes_the_longer_of_its_two_times():
    rates = Rates(products=1e9, memory=4e8, dtype="float32")
    both = roofline.project(program(layers, X_BD, STACK_LDD), rates, 0)
    assert max(both.products, both.memory) < both.seconds
    assert both.seconds < both.products + both.memory
    said = str(both)
    assert "at 1 GFLOP/s" in said and "at 0.4 GB/s, both measured" in said


def test_devices_of_one_cpu_take_turns():
    alone = roofline.project(program(layers, X_BD, STACK_LDD), SLOW_PRODUCTS, 0)
    four = roofline.project(program(layers, X_BD, STACK_LDD), SLOW_PRODUCTS, 0, 4)
    assert four.seconds == pytest.approx(4 * alone.seconds)


def test_where_products_are_a_library_s_the_formula_stands_for_them():
    text = """\
ENTRY %main (p: f32[8,16]) -> f32[8,8] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %c = f32[8,8]{1,0} custom-call(%p), custom_call_target="__cublas$gemm"
}
"""
    found = roofline.project(hlo.Program(text), SLOW_PRODUCTS, useful=5e6, shared=2)
    assert found.useful and found.seconds == pytest.approx(5.0)
    assert "useful ones alone 5000" in str(found)


def test_bytes_of_types():
    assert roofline.size("f32[3,5]{1,0}") == 60
    assert roofline.size("(bf16[4]{0}, pred[2], s32[])") == 8 + 2 + 4
    assert roofline.size("token[]") == 0


def test_rates_of_this_machine_are_measured(monkeypatch):
    monkeypatch.setattr(roofline, "SIZE", 64)
    monkeypatch.setattr(roofline, "COPIED", 4096)
    found = roofline.measure("float32")
    # Of a toy: but a machine that does less than this computes by hand.
    assert found.products > 1e6 and found.memory > 1e6
