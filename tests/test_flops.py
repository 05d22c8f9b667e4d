"""That only what trains costs, in the compiled program; and the formula that says so."""

import dataclasses
import functools
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

from minigpt4_jax import flops, hlo, sharding
from minigpt4_jax.flops import Work
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import PRESETS, MiniGPT4Config
from minigpt4_jax.step import answer_loss, make_step, new_state, without_values
from tests import batches, tiny

PROJECTOR = (r"projector/.*",)
QFORMER = (r"qformer/.*", r"projector/.*")
R, T, A = (
    3,
    46,
    13,
)  # rows, their tokens and answer tokens, of a program that is counted
ALL = Work(images=R, tokens=R * T, pairs=R * T * T, answers=R * A)  # it counts padding
DECODER = dataclasses.replace(  # more blocks than other sizes are
    tiny.CONFIG, llama=dataclasses.replace(tiny.CONFIG.llama, num_layers=7)
)


@functools.cache
def program(
    cfg: MiniGPT4Config, patterns, part: str, remat: bool = False
) -> SimpleNamespace:
    """A compiled step of R rows, of which nothing is made or run: sizes do not matter."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = without_values(cfg, patterns, mesh, DTypes(), remat=remat)
    optimizer = optax.identity()
    state = jax.eval_shape(partial(new_state, optimizer=optimizer), found.params)
    step = make_step(found, answer_loss, optimizer, lambda _: 0.1)
    text = step.lower(state, found.frozen, (shapes(cfg, part),)).compile().as_text()
    return SimpleNamespace(
        dots=hlo.Program(text).dots(),
        frozen={"/".join(map(str, path)): p.shape for path, p in found.frozen.items()},
        trainable={path: p.shape for path, p in found.params.items()},
    )


def shapes(cfg: MiniGPT4Config, part: str) -> dict:
    """A batch without values."""
    side, patches = cfg.vit.image_size, (R, cfg.vit.num_patches, cfg.vit.width)
    queries = (R, cfg.num_slots, cfg.projector_width)
    name, shape, dtype = {
        "pixels": ("pixels_BHWC", (R, side, side, 3), jnp.uint8),
        "patches": ("patches_BPE", patches, jnp.float32),
        "queries": ("queries_BQD", queries, jnp.float32),
    }[part]
    text = batches.lay_out([batches.random_turns(0)] * R, T, A)
    laid_out = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in text.items()}
    return laid_out | {name: jax.ShapeDtypeStruct(shape, dtype)}


@pytest.fixture(scope="module")
def vicuna():
    """The reference's first stage at its full size."""
    return program(PRESETS["minigpt4_vicuna_7b"], PROJECTOR, "queries")


# The compiled program.


def test_a_step_costs_4_for_each_decoder_weight_and_token(vicuna):
    weights = {
        path: math.prod(shape)
        for path, shape in vicuna.frozen.items()
        if path.startswith("llama/blocks/") and path.endswith("/kernel")
    }
    decoder = 4 * sum(weights.values()) * R * T
    head = 4 * math.prod(vicuna.frozen["llama/head/kernel"]) * R * A
    # All else is in the allowance: attention, the projector and its gradient.
    assert hlo.total(vicuna.dots) == pytest.approx(decoder + head, rel=0.05)
    assert hlo.total(vicuna.dots) > decoder + head


def test_no_product_of_the_program_has_the_shape_of_a_frozen_weight(vicuna):
    found = set().union(*(matrices(dot.shape) for dot in vicuna.dots))
    for path, shape in vicuna.frozen.items():
        if path.endswith(("/kernel", "/embedding")):
            assert not matrices(one_layer(path, shape)) & found, path
    # The same look finds them where they train.
    trained = program(DECODER, (r"llama/.*",), "queries")
    found = set().union(*(matrices(dot.shape) for dot in trained.dots))
    kernels = [path for path in trained.trainable if path.endswith("/kernel")]
    assert len(kernels) == 8
    for path in kernels:
        assert matrices(one_layer(path, trained.trainable[path])) & found, path


def one_layer(path: str, shape) -> tuple[int, ...]:
    """Without the leading L of a stack."""
    stacked = {"blocks", "layers", "cross"} & set(path.split("/"))
    return tuple(shape[1:] if stacked else shape)


def matrices(shape) -> set[tuple[int, ...]]:
    """The matrices of these dimensions, in order; the smaller side first."""
    cuts = range(1, len(shape))
    return {
        tuple(sorted((math.prod(shape[:cut]), math.prod(shape[cut:])))) for cut in cuts
    }


@pytest.mark.parametrize(
    "cfg, patterns, part",
    [
        (PRESETS["minigpt4_vicuna_7b"], PROJECTOR, "pixels"),
        (PRESETS["minigpt4_llama2_7b"], PROJECTOR, "patches"),
        (PRESETS["demo"], QFORMER, "patches"),
        (DECODER, (r"llama/.*",), "queries"),
    ],
    ids=["vicuna", "llama2", "demo", "decoder"],
)
def test_the_formula_counts_what_the_program_multiplies(cfg, patterns, part):
    made = program(cfg, patterns, part)
    formula = flops.costs(cfg, made.trainable, part)
    # Attention is computed again in the backward pass, which is not useful work.
    again = flops.costs(cfg, [], part).pair * ALL.pairs
    assert formula(ALL) + again == pytest.approx(hlo.total(made.dots), rel=0.02)


def test_remat_computes_the_insides_of_blocks_a_second_time():
    found = hlo.total(program(DECODER, PROJECTOR, "queries", remat=True).dots)
    formula = flops.costs(DECODER, ["projector/kernel", "projector/bias"], "queries")
    forward = flops.costs(DECODER, [], "queries")
    again = forward.token * ALL.tokens + forward.pair * ALL.pairs
    assert found == pytest.approx(formula(ALL) + again, rel=0.05)


# What is useful.


def test_work_leaves_out_padding_and_pairs_that_attention_masks():
    # Two images, packed: 5 and 4 tokens are shared (start, words, three slots), then
    # branches of 2 and 5, and of 3 tokens: the last answer token is predicted, not read.
    examples = [batches.random_turns(1, (3, 5)), batches.random_turns(0, (4,))]
    batch = batches.lay_out(examples, tokens=30, answers=14, rows=[0, 0], num_rows=2)
    shared, first, second = sum(range(1, 6)), 6 + 7, sum(range(6, 11))
    other = sum(range(1, 8))
    assert Work.of(batch) == Work(
        images=2,
        tokens=5 + 2 + 5 + 4 + 3,
        pairs=shared + first + second + other,
        answers=3 + 5 + 4,
    )


def test_the_formula_of_the_first_stage_is_the_well_known_one():
    cfg = PRESETS["minigpt4_vicuna_7b"]
    costs = flops.costs(cfg, ["projector/kernel", "projector/bias"], "queries")
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert costs.token == 4 * blocks
    assert costs.answer == 4 * 4096 * 32_001
    assert costs.pair == 32 * 12 * 4096
    assert costs.image == 4 * 32 * 768 * 4096  # nothing before it trains


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("cpu", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks_of_devices(kind, tera):
    device = SimpleNamespace(device_kind=kind)
    found = flops.peak([device, device])
    assert found is None if tera is None else found == 2e12 * tera
    assert flops.peak([device, SimpleNamespace(device_kind="unheard of")]) is None


# The count itself.


def test_dots_in_loops_are_counted_as_often_as_they_run():
    @jax.jit
    def nested(a_TE, b_SED):
        def outer(x_TE, b_ED):
            def inner(y_TE, _):
                return jnp.sin(y_TE @ b_ED) @ b_ED.T, None

            return jax.lax.scan(inner, x_TE, length=4)[0], None

        return jax.lax.scan(outer, a_TE, b_SED)[0]

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((33, 35), (3, 35, 37)))
    found = hlo.Program(nested.lower(*shapes).compile().as_text()).dots()
    assert hlo.total(found) == 3 * 4 * 2 * (2 * 33 * 35 * 37)
    assert {dot.shape for dot in found} == {(33, 37), (33, 35)}


def test_batched_and_contracted_dimensions_are_told_apart():
    product = jax.jit(lambda q, k: jnp.einsum("BTNK,BSNK->BNTS", q, k))
    shapes = (
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 33, 3, 5), (2, 34, 3, 5))
    )
    found = hlo.Program(product.lower(*shapes).compile().as_text()).dots()
    assert hlo.total(found) == 2 * 2 * 3 * 33 * 34 * 5


def test_a_loop_of_unknown_length_is_refused():
    @jax.jit
    def until(x_TT):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ x, x_TT)

    text = until.lower(jax.ShapeDtypeStruct((33, 33), jnp.float32)).compile().as_text()
    with pytest.raises(ValueError, match="unknown length"):
        hlo.Program(text).dots()
