"""The table of places, and that a run is the same on one device and on eight."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from minigpt4_jax import checkpoint, features, optim, sharding
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.layers import DTypes, untiled
from minigpt4_jax.models.minigpt4 import PRESETS
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.request import GREEDY, Request, user
from minigpt4_jax.step import Trainables, answer_loss, make_step, new_state
from tests import batches, tiny
from tests.training import config

SHAPES = {name: checkpoint.parameter_shapes(PRESETS[name]) for name in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
def test_each_parameter_matches_exactly_one_row_of_its_rank(preset):
    for path, shape in SHAPES[preset].items():
        hits = [axes for pattern, axes in sharding.RULES if matches(pattern, path)]
        assert len(hits) == 1, (path, hits)
        matrix = sharding.held(path, shape, sharding.make_mesh(fsdp=2))
        assert len(hits[0]) in (0, len(matrix)), (path, matrix, hits[0])


def test_each_row_is_used():
    paths = {path for shapes in SHAPES.values() for path in shapes}
    few_bits = Quantisation("int8", vision="int8")
    paths |= set(checkpoint.structure(PRESETS["demo"], DTypes(), few_bits)[1])
    for pattern, _ in sharding.RULES:
        assert any(matches(pattern, path) for path in paths), pattern


def matches(pattern, path):
    return sharding.re.fullmatch(pattern, path) is not None


def test_layers_are_never_split():
    for pattern, axes in sharding.RULES:
        if "blocks" in pattern and axes:
            assert axes[0] is None, pattern


def test_a_path_without_a_row_is_refused():
    with pytest.raises(ConfigError, match="audio/kernel: no row"):
        sharding.spec("audio/kernel")


@pytest.mark.parametrize("preset", PRESETS)
def test_no_dimension_is_split_over_fsdp_and_tensor(preset):
    mesh = AbstractMesh((2, 2, 2), sharding.AXES)
    for path, shape in SHAPES[preset].items():
        matrix = sharding.held(path, shape, mesh)
        axes = [a for a in sharding.parameter_sharding(path, matrix, mesh).spec if a]
        assert len(set(axes)) == len(axes), (path, axes)
        assert set(axes) <= {"fsdp", "tensor"}, (path, axes)


def test_one_device_holds_all_of_towers_that_no_row_knows():
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    assert sharding.parameter_sharding("audio/kernel", (3, 5), alone).spec == P()
    with pytest.raises(ConfigError, match="audio/kernel: no row"):
        sharding.parameter_sharding("audio/kernel", (3, 5), sharding.make_mesh())


def test_an_axis_that_does_not_divide_its_dimension_is_dropped():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    path = "llama/blocks/attn/q/kernel"
    nine_heads = sharding.parameter_sharding(path, (30, 576, 9, 64), mesh)
    assert nine_heads.spec == P(None, "fsdp", None)
    eight_heads = sharding.parameter_sharding(path, (30, 576, 8, 64), mesh)
    assert eight_heads.spec == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "matrix"),
    [
        ("attn/q", (40, 5120, 40, 128), 8, (40, 5120, 5120)),
        ("attn/q", (40, 5120, 40, 128), 256, (40, 640 * 40, 1, 8, 128)),
        ("attn/out", (40, 40, 128, 5120), 64, (40, 5120, 5120)),
        ("mlp/up", (40, 5120, 13_824), 256, (40, 640 * 108, 1, 8, 128)),
        ("mlp/down", (40, 13_824, 5120), 256, (40, 1728 * 40, 1, 8, 128)),
        ("mlp/down", (40, 13_824, 5120), 1, (40, 13_824, 5120)),
    ],
)
def test_a_kernel_is_held_so_that_each_part_is_whole_tiles(path, shape, fsdp, matrix):
    mesh = AbstractMesh((1, fsdp, 1), sharding.AXES)
    assert sharding.held(f"llama/blocks/{path}/kernel", shape, mesh) == matrix
    parts = matrix[1] if len(matrix) == 5 else matrix[1] // 8
    assert fsdp == 1 or parts % fsdp == 0


def test_kernels_held_in_tiles_multiply_as_before(monkeypatch):
    monkeypatch.setattr(sharding, "TILE", (4, 2))  # 8 parts of 24 rows are not whole
    mesh = sharding.make_mesh(data=1, fsdp=8)
    model, plain = tiny.model(), tiny.model()
    shapes = checkpoint.parameter_shapes(model.cfg)
    sharding.hold(model, set(shapes) - {"llama/blocks/attn/out/kernel"}, mesh)
    ids_BT = np.arange(14).reshape(2, 7)
    want, got = plain(ids_BT), model(ids_BT)
    np.testing.assert_allclose(got, want, atol=2e-6)
    blocks = model.llama.blocks
    assert blocks.attn.q.kernel.shape == (2, 24 * 40 // 8, 1, 4, 2)
    assert blocks.mlp.gate.kernel.shape == (2, 24, 34)  # 102 tiles for 8 devices
    assert blocks.attn.out.kernel.shape == (2, 4, 10, 24)  # not named


def test_a_tile_is_rows_and_columns_that_lie_together():
    x_EF = np.arange(4 * 6).reshape(4, 6)
    tiles = np.asarray(sharding._shaped(x_EF[None], (1, 6, 1, 2, 2)))[0]
    np.testing.assert_array_equal(tiles[1, 0], x_EF[:2, 2:4])
    np.testing.assert_array_equal(tiles[3, 0], x_EF[2:, :2])
    np.testing.assert_array_equal(untiled(tiles, 6), x_EF)


def test_a_mesh_takes_the_devices_that_are_left_or_says_how_many_there_are():
    assert dict(sharding.make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ConfigError, match="needs 6 devices, there are 8"):
        sharding.make_mesh(data=3, fsdp=2)
    with pytest.raises(ConfigError, match="is 16 devices.* divide the 8 there are"):
        sharding.make_mesh(tensor=16)
    with pytest.raises(ConfigError, match="is 6 devices.* divide the 8 there are"):
        sharding.make_mesh(fsdp=3, tensor=2)
    for axes in (dict(fsdp=0), dict(tensor=-1), dict(data=-1)):
        with pytest.raises(ConfigError, match="want at least 1 for fsdp and tensor"):
            sharding.make_mesh(**axes)


def test_a_batch_that_does_not_divide_is_refused_before_it_is_moved():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharding.check_batch(4, mesh)
    with pytest.raises(ConfigError, match="a batch of 6 does not split over data=2"):
        sharding.check_batch(6, mesh)
    with pytest.raises(ConfigError, match="change config.batch_size"):
        sharding.place_batch({"ids_BT": np.zeros((6, 3))}, mesh)


def test_only_arrays_with_a_batch_are_split():
    mesh = sharding.make_mesh()
    placed = sharding.place_batch(
        {"ids_BT": np.zeros((8, 3)), "words_V": np.zeros(5)}, mesh
    )
    assert placed["ids_BT"].sharding.shard_shape((8, 3)) == (1, 3)
    assert placed["words_V"].sharding.is_fully_replicated


def test_moments_lie_where_their_parameter_lies_and_counts_everywhere():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    paths = {"llama/head/kernel": (8, 6), "projector/kernel": (5, 8)}
    params = {path: np.zeros(shape, np.float32) for path, shape in paths.items()}
    optimizer = optim.make_optimizer(config("unused").optim)
    state = sharding.place_state(
        {"params": params, "opt_state": optimizer.init(params)}, mesh
    )
    for keys, x in jax.tree_util.tree_leaves_with_path(state):
        split = "llama/head/kernel" in jax.tree_util.keystr(keys)
        assert x.sharding.shard_shape(x.shape) == ((2, 3) if split else x.shape), keys


def test_the_losses_are_the_same_on_one_device_and_in_every_split_of_eight():
    data = [some_batch(packed) for packed in (False, True, False)]
    one = losses(sharding.make_mesh(devices=jax.devices()[:1]), data)
    assert one[2] < one[1] < one[0]
    for axes in (
        dict(data=2),
        dict(data=1, fsdp=4),
        dict(data=2, fsdp=2, tensor=2),
    ):
        count = math.prod(axes.values())
        mesh = sharding.make_mesh(**axes, devices=jax.devices()[:count])
        # Sums in another order: float32 rounding, carried through the updates.
        np.testing.assert_allclose(
            losses(mesh, data), one, rtol=1e-5, err_msg=str(axes)
        )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_losses_are_the_same_in_every_split_there_is(devices):
    plain, packed = some_batch(False), some_batch(True)
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    for data, fsdp in itertools.product((1, 2, 4, 8), repeat=2):
        tensor, left = divmod(devices, data * fsdp)
        if left or not tensor:
            continue
        # In eight parts each has one row, which no two examples can share.
        seen = [plain, plain] if data * fsdp == 8 else [plain, packed]
        mesh = sharding.make_mesh(data, fsdp, tensor, jax.devices()[:devices])
        np.testing.assert_allclose(
            losses(mesh, seen), losses(alone, seen), rtol=1e-5, err_msg=str(mesh)
        )


@pytest.mark.parametrize("axes", [dict(tensor=2), dict(data=2, tensor=2)])
def test_generation_over_tensor_says_what_one_device_says(axes):
    rules = dataclasses.replace(GREEDY, max_tokens=6)
    asked = [
        Request([user("Why?", tiny.image(i))], sampling=rules, id=str(i))
        for i in range(2)
    ]

    def said(model) -> dict:
        found: dict = {}
        for event in Generator(model, tiny.tokenizer(), batch_size=2).submit(asked):
            found[event.request_id] = found.get(event.request_id, ()) + event.ids
        return found

    count = math.prod(axes.values())
    mesh = sharding.make_mesh(**dict(data=1) | axes, devices=jax.devices()[:count])
    model = tiny.model()
    sharding.place(model, mesh)
    kernel = model.llama.blocks.mlp.up.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 2
    assert said(model) == said(tiny.model())


def test_a_batch_whose_images_lie_elsewhere_is_our_mistake():
    mesh = sharding.make_mesh(data=8)
    batch = some_batch(packed=False)
    sharding.place_batch(batch, mesh)
    batch["example_RA"] = np.roll(batch["example_RA"], 1, axis=0)
    with pytest.raises(AssertionError, match="lie on different devices"):
        sharding.place_batch(batch, mesh)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"

    @property
    def process_index(self) -> int:
        return self.slice_index


def test_slices_lie_along_data():
    devices = [Device(i, i // 4) for i in range(8)]
    mesh = sharding.make_mesh(data=2, fsdp=4, devices=devices)
    for k in range(2):
        assert {device.slice_index for device in mesh.devices[k].flat} == {k}
    with pytest.raises(ConfigError, match="only data goes over the network"):
        sharding.make_mesh(data=1, fsdp=8, devices=devices)


def some_batch(packed: bool) -> dict:
    """Eight images of 1 to 6 answer tokens; packed: in six rows and two of padding.

    Each fourth of the rows has a fourth of the examples, in another order.
    """
    examples = [batches.random_turns(i, (1 + i % 3, 1 + i % 4)) for i in range(8)]
    rows = [1, 0, 2, 2, 5, 4, 7, 7] if packed else None
    batch = batches.lay_out(examples, tokens=30, answers=16, rows=rows, num_rows=8)
    cfg = tiny.CONFIG.qformer
    queries_BQD = np.random.default_rng(0).standard_normal(
        (8, cfg.num_queries, cfg.width), np.float32
    )
    return batch | {"queries_BQD": queries_BQD}


def losses(mesh, data) -> list[float]:
    model = tiny.model()
    sharding.place(model, mesh)
    # One array of the decoder too, so that a trainable is split where the mesh can.
    patterns = ["projector/.*", "llama/blocks/mlp/up/kernel"]
    trainables = Trainables(model, patterns, mesh)
    optimizer = optax.identity()  # a small program; test_train.py has AdamW on a mesh
    state = sharding.place_state(new_state(trainables.params, optimizer), mesh)
    step = make_step(trainables, answer_loss, optimizer, lambda step: 0.05)
    found = []
    for batch in data:
        placed = sharding.place_batch(batch, mesh)
        state, metrics = step(state, trainables.frozen, (placed,))
        found.append(float(metrics["loss"]))
    return found


def test_what_is_held_in_tiles_is_released_in_the_order_of_the_files(monkeypatch):
    monkeypatch.setattr(sharding, "TILE", (5, 2))  # 8 parts of 20 rows are not
    model, plain = tiny.model(), tiny.model()
    shapes = checkpoint.parameter_shapes(model.cfg)
    sharding.hold(model, set(shapes), sharding.make_mesh(data=1, fsdp=8))
    assert model.vit.blocks.mlp.up.kernel.shape != plain.vit.blocks.mlp.up.kernel.shape
    for path in ("vit/blocks/mlp/up/kernel", "vit/blocks/attn/out/kernel"):
        _, *names = path.split("/")[:-1]
        ours, theirs = (
            functools.reduce(getattr, names, m.vit).kernel for m in (model, plain)
        )
        x = sharding.released(path, np.asarray(ours[...]), shapes[path])
        np.testing.assert_array_equal(x, theirs[...])
    assert features.towers_digest(model, "patches") == features.towers_digest(
        plain, "patches"
    )
