"""Plans: rows without data, what is exchanged; compiled ones are in test_plan_command.py."""

import math
import re

import jax
import pytest

from minigpt4_jax import checkpoint, hlo, optim, projection, sharding, step
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.projection import Lengths
from tests import tiny
from tests.training import config

SHAPES = checkpoint.parameter_shapes(tiny.CONFIG)


def small(**knobs):
    """A config that packs, of the tiny model; every image goes through the ViT."""
    fixed = dict(row__packed=96, row__tokens=48, cache__dtype="")
    return config("unused", **dict(batch_size=24) | fixed | knobs)


def compiled(**axes: int) -> hlo.Program:
    """A packed step of the tiny model over so many devices of this machine."""
    lowered = projection.lower_step(
        small(), tiny.CONFIG, sharding.make_mesh(**axes), Lengths(11, 6)
    )
    return hlo.Program(lowered.compile().as_text())


@pytest.fixture(scope="module")
def split():
    return compiled(data=2, fsdp=4)


def test_weights_are_gathered_layer_by_layer_and_never_whole(split):
    gathers = [c for c in split.collectives() if c.kind == "all-gather"]
    layers = {tiny.CONFIG.vit.num_layers, tiny.CONFIG.llama.num_layers}
    assert layers <= {c.times for c in gathers}  # inside of the loops over blocks
    stacks = {shape for path, shape in SHAPES.items() if "/blocks/" in path}
    for collective in gathers:
        assert collective.shape not in stacks, collective


def test_nothing_is_exchanged_but_weights_and_what_is_summed(split):
    """Weights over fsdp; two scalars and the gradients of what is trained over all."""
    trained = optim.select(SHAPES, small().trainable)
    sums = {SHAPES[path] for path in trained} | {()}
    weights = {math.prod(shape) for shape in SHAPES.values()}
    weights |= {math.prod(s[1:]) for path, s in SHAPES.items() if "/blocks/" in path}
    for collective in split.collectives():
        if collective.kind == "all-gather":
            assert len(collective.groups[0]) == 4, collective
            assert math.prod(collective.shape) in weights, collective
        else:
            assert collective.kind == "all-reduce", collective
            assert len(collective.groups[0]) == 8, collective
            assert collective.shape in sums, collective


def test_no_gradient_of_a_frozen_weight_is_made(split):
    frozen = set()
    for path, shape in SHAPES.items():
        if re.fullmatch("(vit|llama)/blocks/.*/kernel", path):
            ins = 2 if "/out/" in path else 1
            kernel = math.prod(shape[1 : 1 + ins]), math.prod(shape[1 + ins :])
            frozen |= {kernel, kernel[::-1], shape[1:]}
    for dot in split.dots():
        assert dot.shape not in frozen, dot


def test_a_gathered_weight_stays_split_over_tensor():
    made = compiled(data=2, fsdp=2, tensor=2)
    whole = {
        shape[1:]
        for path, shape in SHAPES.items()
        if path.startswith("llama/blocks/mlp")
    }
    gathers = [c for c in made.collectives() if c.kind == "all-gather"]
    assert gathers and not [c for c in gathers if c.shape in whole]


def test_a_packed_batch_without_data_has_rows_for_each_part():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = projection.batch_without_values(small(), tiny.CONFIG, mesh, Lengths(11, 6))
    rows, tokens = batch["ids_RT"].shape
    assert rows % 4 == 0 and tokens % 8 == 0 and tokens <= 96
    assert 1 - 24 * 16 / (rows * tokens) < 0.35  # tiny rows are rounded up a lot
    assert batch["pixels_BHWC"].shape[0] == 24


def test_a_step_without_values_costs_what_the_formula_says():
    """Of a step whose rows are full: the compiled products beside the useful ones."""
    cfg = small(batch_size=8)
    cfg.row.packed = 0
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    lengths = Lengths(cfg.row.tokens - cfg.row.answers + 1, cfg.row.answers)
    lowered = projection.lower_step(cfg, tiny.CONFIG, mesh, lengths)
    compiled = hlo.total(hlo.Program(lowered.compile().as_text()).dots())
    useful = projection.useful(cfg, tiny.CONFIG, 8, lengths)
    # Attention is computed over masked pairs too, and again for the gradient.
    assert useful < compiled < 1.6 * useful


def test_a_token_of_generation_is_lowered_over_tensor():
    mesh = sharding.make_mesh(data=4, tensor=2)
    compiled = projection.lower_token(tiny.CONFIG, mesh, 8, 32).compile()
    kinds = {c.kind for c in hlo.Program(compiled.as_text()).collectives()}
    assert "all-reduce" in kinds


def test_a_batch_that_does_not_split_over_the_mesh_is_refused():
    with pytest.raises(ConfigError, match="does not split"):
        projection.check_mesh(small(), dict(data=5, fsdp=1, tensor=1))


def test_without_values_is_the_same_tree_as_with():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    patterns = (r"projector/.*",)
    for how in (Quantisation(), Quantisation("int8")):
        model = tiny.model()
        model.quantise(how)
        real = step.Trainables(model, patterns)
        none = step.without_values(
            tiny.CONFIG, patterns, mesh, DTypes(), quantisation=how
        )
        assert none.frozen.keys() == real.frozen.keys()
        for path, param in none.frozen.items():
            value = param.get_value()
            assert value.shape == real.frozen[path].shape
            assert value.dtype == real.frozen[path].dtype
