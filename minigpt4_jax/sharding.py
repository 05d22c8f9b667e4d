"""Where arrays live: a mesh of devices and one table from parameter paths to its axes.

Axes: `data` splits the batch, `fsdp` splits batch and weights, `tensor` splits the heads
and hidden layers of the decoder. All are Auto axes: XLA places the rest.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# First match wins; L is never split. Kernels have rows for matrices; of one with heads
# and their features apart, heads are what is split. A dimension is split over the first
# of its axes that is not taken: over both, what is gathered would be in another order.
RULES = (
    (r"(vit|llama)/blocks/attn/[qkv]/kernel", P(None, "fsdp", "tensor")),
    (r"vit/blocks/attn/[qkv]/bias", P(None, "tensor", None)),
    (r"(vit|llama)/blocks/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (
        r"(vit|llama)/blocks/(attn/out|mlp/down)/kernel",
        P(None, ("tensor", "fsdp"), "fsdp"),
    ),
    (r"vit/blocks/mlp/up/bias", P(None, "tensor")),
    (r"llama/embed/embedding", P("tensor", "fsdp")),
    (r"llama/head/kernel", P("fsdp", "tensor")),
    (r"(qformer|projector|ln_vision)/.*", P()),  # small, and the trainables
    (r"vit/(patch/.*|class_token|position_embedding)", P()),
    (r"(vit|llama)/blocks/(attn|mlp)/(out|down)/bias", P()),
    (r"(vit|llama)/blocks/(norm1|norm2|attn_norm|mlp_norm|layer_scale.)(/.*)?", P()),
    (r"llama/norm/scale", P()),
    (r"(vit|llama)/.*(kernel|embedding)_scale", P()),  # of weights in few bits
)


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all); data=0 takes what the others leave.

    Raises ConfigError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    asked, there = f"mesh data={data} fsdp={fsdp} tensor={tensor}", len(devices)
    if min(fsdp, tensor) < 1 or data < 0:
        raise ConfigError(
            f"{asked}: want at least 1 for fsdp and tensor, and for data at least 0 "
            "(0: what the others leave)"
        )
    if not data and there % (fsdp * tensor):
        raise ConfigError(
            f"{asked}: fsdp times tensor is {fsdp * tensor} devices, which does not "
            f"divide the {there} there are"
        )
    data = data or there // (fsdp * tensor)
    if data * fsdp * tensor != there:
        raise ConfigError(
            f"{asked} needs {data * fsdp * tensor} devices, there are {there}"
        )
    grid = grid_of(devices, (data, fsdp, tensor))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def grid_of(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices in the order of the mesh: axes along a TPU's torus, slices along `data`.

    Raises ConfigError where `data` cannot be split over the slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ConfigError(
                f"mesh data={shape[0]} over {slices} slices; want a multiple, as only "
                "data goes over the network between them"
            )
        within = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return np.asarray(devices).reshape(shape)


def spec(path: str) -> P:
    """The row of RULES that a parameter path matches; none is our mistake."""
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path):
            return axes
    raise ConfigError(f"parameter {path}: no row of sharding.RULES matches it")


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of one parameter; an axis that does not divide its dimension is dropped
    (nine heads on two devices: each holds all nine). One device holds all of anything,
    also of towers that RULES does not know."""
    if mesh.size == 1:
        return NamedSharding(mesh, P())
    axes: list[str | None] = []
    for names, size in zip(spec(path), shape, strict=False):
        free = (a for a in _names(names) if mesh.shape[a] > 1 and a not in axes)
        axes.append(next((a for a in free if size % mesh.shape[a] == 0), None))
    return NamedSharding(mesh, P(*axes))


TILE = (8, 128)  # rows and columns that a TPU keeps together
KERNELS = ".*/blocks/.*/kernel"  # of stacks: what is held as matrices


def held(path: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    """The shape in which the training step holds a frozen kernel of a stack of blocks.

    A matrix, heads and their features as one dimension: so `fsdp` splits it into more
    parts than there are heads, and what is gathered need not be copied into another
    order. Where a part would not be whole tiles, the tiles themselves, row by row:
    [L, tiles, 1, rows, columns] (`layers.linear` reads them).
    """
    if mesh.shape["fsdp"] == 1 or not re.fullmatch(KERNELS, path):
        return shape
    layers, ins, outs = _matrix(path, shape)
    high, wide = TILE
    if ins % (high * mesh.shape["fsdp"]) == 0 or mesh.shape["tensor"] > 1:
        return layers, ins, outs  # `tensor` splits the columns
    tiles, left = divmod(ins * outs, high * wide)
    if left or ins % high or outs % wide or tiles % mesh.shape["fsdp"]:
        return layers, ins, outs
    return layers, tiles, 1, high, wide


def _matrix(path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A kernel's layers, inputs and outputs."""
    axes = 2 if len(shape) == 4 and "/attn/out/" in path else 1
    return shape[0], math.prod(shape[1 : 1 + axes]), math.prod(shape[1 + axes :])


def hold(model: nnx.Module, frozen: Collection[str], mesh: Mesh) -> None:
    """Give the kernels named in `frozen` the shape of `held`, in the model itself."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        # Two weights in a byte are no columns that could be cut: they stay as they are.
        matrix = name in frozen and param.dtype != np.uint8
        shape = held(name, param.shape, mesh) if matrix else param.shape
        if shape != param.shape:
            matrix = _matrix(name, param.shape)
            where = parameter_sharding(name, shape, mesh)
            param.set_value(
                jax.jit(_shaped, static_argnums=1, out_shardings=where)(
                    param[...].reshape(matrix), shape
                )
            )


def _shaped(x_LDF, shape: tuple[int, ...]):
    """Matrices in a shape of `held`."""
    if len(shape) == 3:
        return x_LDF.reshape(shape)
    layers, ins, outs = x_LDF.shape
    high, wide = shape[-2:]
    x = x_LDF.reshape(layers, ins // high, high, outs // wide, wide)
    return x.swapaxes(2, 3).reshape(shape)


def released(path: str, x: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """A kernel that `hold` may have cut into tiles, in the order of its own `shape`.

    Args:
        shape: None for a parameter of a tower that is not ours: it is as it was.
    """
    if shape is None or x.size != math.prod(shape) or not re.fullmatch(KERNELS, path):
        return x
    layers, _, outs = _matrix(path, shape)
    if x.ndim != 5:
        return x.reshape(shape) if x.ndim == 3 else x
    high, wide = x.shape[-2:]
    x = x.reshape(layers, -1, outs // wide, high, wide)
    return x.swapaxes(2, 3).reshape(shape)


class Parts:
    """How each device of a mesh holds its part of parameters, inside of `shard_map`.

    Only `data` and `fsdp` are seen there (OVER); what `tensor` splits stays with XLA.
    """

    OVER = ("data", "fsdp")

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh):
        """Args: shapes: of the whole parameters, by path."""
        self.mesh = mesh
        self._dims: dict[str, int] = {}
        self._tensor: dict[str, P] = {}  # what XLA splits
        for path, shape in shapes.items():
            axes = parameter_sharding(path, shape, mesh).spec
            for dim, names in enumerate(axes):
                if "fsdp" in _names(names) and mesh.shape["fsdp"] > 1:
                    self._dims[path] = dim
            self._tensor[path] = P(
                *("tensor" if "tensor" in _names(n) else None for n in axes)
            )

    def spec(self, path: str) -> P:
        """Of one parameter, for shard_map."""
        dim = self._dims.get(path)
        return P() if dim is None else P(*[None] * dim, "fsdp")

    def gather(self, path: str, x: jax.Array, skip: int = 0) -> jax.Array:
        """The whole parameter from this device's part of it.

        Args:
            skip: leading dimensions that a scan has taken off.
        """
        dim = self._dims.get(path)
        if dim is None:
            return x

        def own(x):
            return jax.lax.all_gather(x, "fsdp", axis=dim - skip, tiled=True)

        split = P(*self._tensor[path][skip:])
        if "tensor" not in split or self.mesh.shape["tensor"] == 1:
            return own(x)
        # By hand too, since XLA would gather it over `tensor` as well.
        by_hand = jax.shard_map(
            own, in_specs=split, out_specs=split, axis_names={"tensor"}, check_vma=False
        )
        return by_hand(x)

    def gather_block(self, stack: str, state: nnx.State) -> nnx.State:
        """The whole state of one block of a stack, for `MiniGPT4.set_gather`."""
        whole = []
        for path, param in nnx.to_flat_state(state):
            name = "/".join(map(str, (stack, *path)))
            whole.append((path, param.replace(self.gather(name, param[...], skip=1))))
        return nnx.from_flat_state(whole)

    def sum_gradients(self, grads: dict) -> dict:
        """Of all devices; what was gathered has a gradient summed over fsdp already."""
        return {
            path: self.sum(x, ("data",) if path in self._dims else self.OVER)
            for path, x in grads.items()
        }

    def sum(self, tree, over: tuple[str, ...] = OVER):
        """Of all devices; of one part there is nothing to sum (step.over_devices)."""
        return tree if batch_parts(self.mesh) == 1 else jax.lax.psum(tree, over)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def batch_spec(name: str) -> P:
    """Of one array of a batch: B or R leads in those that are split (`ids_RT`)."""
    return BATCH if name.rpartition("_")[2].startswith(("B", "R")) else P()


def place(model: nnx.Module, mesh: Mesh) -> None:
    """Move every parameter of a (stacked) model to its place, in the model itself."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        param[...] = jax.device_put(
            param[...], parameter_sharding(name, param.shape, mesh)
        )


def places(tree, mesh: Mesh):
    """Shardings of arrays by parameter path, and of what an optimizer keeps of them.

    An array under a dict key that is a path goes where that parameter goes; all else
    (counts of steps) goes to every device.
    """

    def of(keys, x):
        names = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey)]
        path = next((name for name in reversed(names) if "/" in name), None)
        if path is None:
            return NamedSharding(mesh, P())
        return parameter_sharding(path, x.shape, mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def cache_places(cache, mesh: Mesh):
    """Shardings of a decoder's KV cache: rows as a batch, heads over `tensor`."""

    def of(x):
        heads = None
        if x.ndim >= 4 and x.shape[-2] % mesh.shape["tensor"] == 0:
            heads = "tensor"
        if x.ndim == 5:  # L B S G K
            return NamedSharding(mesh, P(None, BATCH[0], None, heads))
        if x.ndim == 4:
            return NamedSharding(mesh, P(BATCH[0], None, heads))
        return NamedSharding(mesh, BATCH)

    return jax.tree.map(of, cache)


def place_state(tree, mesh: Mesh):
    """The same arrays in those places."""
    return jax.device_put(tree, places(tree, mesh))


def batch_parts(mesh: Mesh) -> int:
    """Over how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(size: int, mesh: Mesh) -> None:
    """Raise ConfigError when a batch of this size cannot be split evenly."""
    if size % batch_parts(mesh):
        raise ConfigError(
            f"a batch of {size} does not split over data={mesh.shape['data']} times "
            f"fsdp={mesh.shape['fsdp']} devices; change config.batch_size or config.mesh"
        )


def host_part(mesh: Mesh) -> tuple[int, int]:
    """(k, n): this process needs part k of n equal parts of every batch.

    Processes whose devices hold the same rows (a `tensor` axis across them) share k.
    """
    parts = batch_parts(mesh)
    where = NamedSharding(mesh, BATCH).addressable_devices_indices_map((parts,))
    rows = sorted({index[0].indices(parts)[0] for index in where.values()})
    if rows != list(range(rows[0], rows[0] + len(rows))) or parts % len(rows):
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: the devices of one process hold parts {rows} of "
            f"{parts}; want neighbours, so that a process reads one piece of the batch"
        )
    return rows[0] // len(rows), parts // len(rows)


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """Split arrays whose names say that B or R leads (`ids_RT`); others go everywhere.

    Of the split ones each process gives the part that `host_part` names.
    """
    placed = {}
    host, hosts = host_part(mesh)
    if batch_parts(mesh) > 1 and "example_RA" in batch:
        _check_own(batch, host, batch_parts(mesh) // hosts)
    for name, value in batch.items():
        spec = batch_spec(name)
        if spec == BATCH:
            check_batch(value.shape[0] * hosts, mesh)
        where = NamedSharding(mesh, spec)
        if jax.process_count() == 1:
            placed[name] = jax.device_put(value, where)
        else:
            placed[name] = jax.make_array_from_process_local_data(where, value)
    return placed


def _check_own(batch: dict, host: int, parts: int) -> None:
    """Of a host's part of a batch, in `parts`: no row is of an image of another part."""
    rows, examples = len(batch["example_RA"]), len(batch["ok_B"])
    row_R1 = np.arange(rows)[:, None] // (rows // parts) + host * parts
    example_RA = batch["example_RA"] // (examples // parts)
    strange = (example_RA != row_R1) & (batch["loss_mask_RA"] > 0)
    assert not strange.any(), "rows and their images lie on different devices"


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on this host, also when other hosts hold parts of it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
