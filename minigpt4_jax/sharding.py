"""Where arrays live: a mesh of devices and one table from parameter paths to its axes.

Axes: `data` splits the batch, `fsdp` splits batch and weights, `tensor` splits the heads
and hidden layers of the decoder. All are Auto axes: XLA places the rest.
"""

import re

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

RULES = (  # first match wins; L is never split
    (r"(vit|llama)/blocks/attn/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"(vit|llama)/blocks/attn/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"vit/blocks/attn/[qkv]/bias", P(None, "tensor", None)),
    (r"(vit|llama)/blocks/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"(vit|llama)/blocks/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"vit/blocks/mlp/up/bias", P(None, "tensor")),
    (r"llama/embed/embedding", P("tensor", "fsdp")),
    (r"llama/head/kernel", P("fsdp", "tensor")),
    (r"(qformer|projector|ln_vision)/.*", P()),  # small, and the trainables
    (r"vit/(patch/.*|class_token|position_embedding)", P()),
    (r"(vit|llama)/blocks/(attn|mlp)/(out|down)/bias", P()),
    (r"(vit|llama)/blocks/(norm1|norm2|attn_norm|mlp_norm|layer_scale.)(/.*)?", P()),
    (r"llama/norm/scale", P()),
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
    grid = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def spec(path: str) -> P:
    """The row of RULES that a parameter path matches; none is our mistake."""
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path):
            return axes
    raise ConfigError(f"parameter {path}: no row of sharding.RULES matches it")


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of one parameter; an axis that does not divide its dimension is dropped
    (nine heads on two devices: each holds all nine)."""
    axes = [
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec(path), shape, strict=False)
    ]
    return NamedSharding(mesh, P(*axes))


def place(model: nnx.Module, mesh: Mesh) -> None:
    """Move every parameter of a (stacked) model to its place, in the model itself."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        param[...] = jax.device_put(
            param[...], parameter_sharding(name, param.shape, mesh)
        )


def place_state(tree, mesh: Mesh):
    """Arrays by parameter path, and what an optimizer keeps of them, in their places.

    An array under a dict key that is a path goes where that parameter goes; all else
    (counts of steps) goes to every device.
    """

    def put(keys, x):
        names = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey)]
        path = next((name for name in reversed(names) if "/" in name), None)
        if path is None:
            return jax.device_put(x, NamedSharding(mesh, P()))
        return jax.device_put(x, parameter_sharding(path, x.shape, mesh))

    return jax.tree_util.tree_map_with_path(put, tree)


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
    hosts = host_part(mesh)[1]
    for name, value in batch.items():
        split = name.rpartition("_")[2].startswith(("B", "R"))
        if split:
            check_batch(value.shape[0] * hosts, mesh)
        where = NamedSharding(mesh, BATCH if split else P())
        if jax.process_count() == 1:
            placed[name] = jax.device_put(value, where)
        else:
            placed[name] = jax.make_array_from_process_local_data(where, value)
    return placed


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on this host, also when other hosts hold parts of it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
