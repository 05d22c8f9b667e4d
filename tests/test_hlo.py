"""What is read out of compiled programs: products, exchanges, and projected time."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from minigpt4_jax import hlo, sharding

# A TPU's dialect, cut down: a loop of unknown length but for its condition, a gather that
# is spread over two fusions, a product written as a convolution.
TPU = """HloModule jit_step, is_scheduled=true

%gathering.1 (p0: bf16[2,8], p1: bf16[4,3]) -> bf16[4,8] {
  %p0 = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,3]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = bf16[3,8]{1,0:T(8,128)(2,1)} constant({...})
  %all-gather.1 = bf16[4,8]{1,0} all-gather(%p0), channel_id=7, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %convolution.1 = bf16[4,8]{1,0} convolution(%p1, %p2), dim_labels=bf_io->bf
}

%gathering.2 (p0: bf16[2,8]) -> bf16[4,8] {
  %p0 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[4,8]{1,0} all-gather(%p0), channel_id=7, replica_groups={{0,1},{2,3}}, dimensions={0}
}

%body (c: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %c = (s32[], bf16[2,8]{1,0}) parameter(0)
  %x = bf16[2,8]{1,0} get-tuple-element(%c), index=1
  %fusion.1 = bf16[4,8]{1,0} fusion(%x, %x), kind=kOutput, calls=%gathering.1, metadata={op_name="jit(step)/dot"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %fusion.2 = bf16[4,8]{1,0} fusion(%x), kind=kOutput, calls=%gathering.2, backend_config={"window_config":{"estimated_cycles":"40"}}
  ROOT %t = (s32[], bf16[2,8]{1,0}) tuple(%x, %x)
}

%condition (c: (s32[], bf16[2,8])) -> pred[] {
  %c = (s32[], bf16[2,8]{1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  %constant.5 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%n, %constant.5), direction=LT
}

%add (l: bf16[], r: bf16[]) -> bf16[] {
  %l = bf16[] parameter(0)
  %r = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%l, %r)
}

ENTRY %main (a: bf16[2,8]) -> bf16[2,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %t = (s32[], bf16[2,8]{1,0}) tuple(%a, %a)
  %while.1 = (s32[], bf16[2,8]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %all-reduce.1 = bf16[2,8]{1,0} all-reduce(%a), channel_id=9, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
}
"""


def test_a_collective_that_is_spread_over_fusions_counts_once_a_turn():
    found = hlo.Program(TPU).collectives()
    assert [(c.kind, c.shape, c.bytes, c.times) for c in found] == [
        ("all-gather", (4, 8), 64, 5),
        ("all-reduce", (2, 8), 32, 1),
    ]
    assert found[0].groups == ((0, 1), (2, 3))
    assert found[1].groups == ((0, 2), (1, 3))


def test_products_written_as_convolutions_count():
    assert hlo.total(hlo.Program(TPU).dots()) == 5 * 2 * 4 * 3 * 8


@pytest.mark.parametrize(
    "gather_s, turn_s",
    # It runs beside both fusions; what it takes longer than they do is waited for.
    [(90, 140), (139, 140), (150, 150)],
)
def test_time_counts_what_does_not_overlap(gather_s, turn_s):
    def seconds(collective):
        return gather_s if collective.kind == "all-gather" else 11

    found = hlo.Program(TPU).seconds(1.0, seconds)
    assert found.total == 5 * turn_s + 11
    assert found.compute == 5 * 140
    assert found.collectives == 5 * gather_s + 11


def test_the_slowest_fusions_count_their_loops():
    assert hlo.Program(TPU).slowest(2) == [
        (500, "fusion.1", "jit(step)/dot"),
        (200, "fusion.2", ""),
    ]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
        ("replica_groups=[2,3]<=[6], x", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=[3,2]<=[2,3]T(1,0), x", ((0, 3), (1, 4), (2, 5))),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}, x", ((0, 3), (1, 4), (2, 5))),
        (
            "replica_groups=mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}, x",
            ((0, 2, 4), (1, 3, 5)),
        ),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
    ],
)
def test_groups_are_read_in_every_notation(text, groups):
    assert hlo._groups(text) == groups


def test_collectives_of_a_program_on_this_machine():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(None, "fsdp")),
        out_specs=P(("data", "fsdp")),
        check_vma=False,
    )
    def run(w, stack):
        def turn(x, part):
            return x @ jax.lax.all_gather(part, "fsdp", axis=0, tiled=True), None

        x, _ = jax.lax.scan(turn, w.sum() * jnp.ones((3, 12)), stack)
        return jax.lax.psum(x, "data")

    shapes = [(8, 5), (7, 12, 12)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = hlo.Program(jax.jit(run).lower(*args).compile().as_text()).collectives()
    kinds = {c.kind: c for c in found}
    assert sorted(kinds) == ["all-gather", "all-reduce"]
    gather = kinds["all-gather"]
    assert (gather.bytes, gather.times) == (12 * 12 * 4, 7)
    assert gather.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert kinds["all-reduce"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    "size, kernel, out, stride, pad, dilate, pairs",
    [
        (5, 3, 3, 1, 0, 1, 9),  # every tap meets an input
        (5, 3, 5, 1, 1, 1, 13),  # padding takes two
        (
            1,
            16,
            16,
            1,
            15,
            1,
            16,
        ),  # a product over heads, as a TPU's compiler writes it
        (3, 3, 5, 1, 0, 2, 7),  # holes between the inputs
        (9, 3, 4, 2, 0, 1, 12),
    ],
)
def test_only_taps_that_meet_an_input_count(
    size, kernel, out, stride, pad, dilate, pairs
):
    windows = dict(stride=stride, pad=pad, dilate=dilate, spread=1)
    assert hlo._pairs(size, kernel, out, **windows) == pairs


def test_a_loop_of_unknown_length_is_refused():
    text = TPU.replace("direction=LT", "direction=GT")
    with pytest.raises(ValueError, match="while.1: a loop of unknown length"):
        hlo.Program(text).dots()


@pytest.mark.parametrize(
    "line, found",
    [
        (
            "(bf16[1,8,4]{2,1,0:T(8,128)(2,1)}, f32[6]{0}) all-reduce(%a, %b)",
            [("all-reduce", (1, 8, 4), 64), ("all-reduce", (6,), 24)],
        ),
        (
            "((f32[2], f32[3]), (f32[4], f32[6])) all-gather-start(%a, %b)",
            [("all-gather", (4,), 16), ("all-gather", (6,), 24)],
        ),
        (
            "(f32[2], f32[4]) all-gather-start(%a)",
            [("all-gather", (4,), 16)],
        ),
        (
            "(f32[5], f32[5], u32[], u32[]) collective-permute-start(%a)",
            [("collective-permute", (5,), 20)],
        ),
        ("f32[3] reduce-scatter(%a)", [("reduce-scatter", (3,), 24)]),
    ],
)
def test_every_part_of_a_combined_collective_counts(line, found):
    kind = "source_target_pairs" if "permute" in line else "replica_groups"
    groups = kind + "={{0,1}}"
    text = f"ENTRY %main (a: f32[2]) -> f32[2] {{\n  %c.1 = {line}, {groups}\n}}\n"
    program = hlo.Program(text)
    parts = [(c.kind, c.shape, c.bytes) for c in program.collectives()]
    assert parts == found
    assert program.seconds(1.0, lambda c: c.bytes).total == sum(n for *_, n in found)
