"""What a step will take on a slice, by formula: to choose what to compile, or to rent.

    compute    useful work and padding at a share of the peak, or reading the weights where
               that takes longer; and what is touched beside products, at the memory's rate
    gathers    weights, twice, over the links of the torus that a mesh axis spans
    sums       of activations over `tensor`, for which the next product waits

The constants are fitted to compiled steps (benchmarks/plan_table.py --fit); how far they
are from them is in docs/slices.md.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from minigpt4_jax import checkpoint, sharding
from minigpt4_jax.chips import Slice
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.projection import PADDING, Lengths, Projection, useful


@dataclass(frozen=True)
class Constants:
    """What is fitted.

    products: share of the peak that products reach.
    touched: how often an activation is read or written beside products.
    exposed: share of the shorter of compute and gathers that is waited for, where gathers
        are begun early: on a torus of two dimensions. With three the compiler waits.
    zeros: how often what is gathered over three dimensions is written as zeros, as the
        compiler makes a sum of it.
    waits: by `tensor`, how much longer its sums and smaller products take than the links.
    """

    products: float = 0.96
    touched: float = 11.43
    exposed: float = 0.44
    zeros: float = 8.43
    waits2: float = 1.5
    waits4: float = 7.3
    waits8: float = 3.48


FITTED = Constants()


def step(
    cfg,
    preset: MiniGPT4Config,
    on: Slice,
    mesh: dict[str, int],
    lengths: Lengths,
    constants: Constants = FITTED,
) -> Projection:
    """A training step without compiling, in a fraction of a millisecond."""
    sizes, chip = _sizes(preset, cfg.quantize), on.chip
    data, fsdp, tensor = (mesh[axis] for axis in sharding.AXES)
    turns, llama, vit = cfg.optim.accumulate, preset.llama, preset.vit
    examples = cfg.batch_size / turns / (data * fsdp)
    images = examples if not cfg.cache.dtype else 0  # whose ViT is computed in a step
    tokens = examples * lengths.tokens / (1 - PADDING)
    again = 1.5 if cfg.remat == "block" else 1.0
    work = useful(cfg, preset, cfg.batch_size, lengths)
    done = work * again / (1 - PADDING)

    passed = turns * ((images > 0) * sizes.vit + 2 * sizes.llama) / tensor
    products = done / on.chips / (chip.peak * constants.products)
    compute = max(products, passed / chip.hbm)
    if fsdp == 1:  # nothing is gathered: a block is copied out of the stack
        compute += 2 * passed / chip.hbm
    of_tokens = tokens * llama.num_layers * _touched(llama, tensor)
    of_images = images * vit.num_patches * vit.num_layers * _touched(vit, tensor)
    touched = turns * (again * of_tokens + of_images)
    compute += constants.touched * touched / chip.hbm

    rate, dims = _reach(on, tuple(mesh.values()), "fsdp")
    gathered = passed * (fsdp - 1) / fsdp
    gathers = gathered / rate
    exposed = constants.exposed if chip.dims == 2 else 1.0
    if dims == 3:
        gathers *= 2  # summed, and given back
        compute += constants.zeros * gathered / chip.hbm
    summed = 4 * again * llama.num_layers * tokens * llama.width * 2
    summed += 2 * vit.num_layers * images * vit.num_patches * vit.width * 2
    summed *= 2 * turns * (tensor - 1) / tensor
    waits = {1: 0, 2: constants.waits2, 4: constants.waits4, 8: constants.waits8}
    sums = waits[tensor] * summed / _reach(on, tuple(mesh.values()), "tensor")[0]
    held, temporaries = _memory(cfg, preset, sizes, mesh, lengths)
    return Projection(
        batch=cfg.batch_size,
        mesh=mesh,
        chips=on.chips,
        arguments=held,
        temporaries=temporaries,
        peak=held + temporaries,
        memory=chip.memory,
        useful_flops=work,
        compiled_flops=int(done / on.chips),
        collective_bytes=int(gathered + summed),
        compute=compute,
        collectives=gathers + sums,
        seconds=max(compute, gathers) + exposed * min(compute, gathers) + sums,
        peak_flops=chip.peak,
    )


def _touched(tower, tensor: int) -> float:
    """Bytes of a position's activations in a block: of its width, and as products give."""
    return 2 * (5 * tower.width + 2 * tower.mlp_width / tensor)


def _memory(
    cfg, preset: MiniGPT4Config, sizes: "Sizes", mesh: dict[str, int], lengths: Lengths
) -> tuple[int, int]:
    """Bytes of a device that are held, and those of a step."""
    llama, vit, tensor = preset.llama, preset.vit, mesh["tensor"]
    parts = mesh["data"] * mesh["fsdp"]
    examples = cfg.batch_size / cfg.optim.accumulate / parts
    tokens = examples * lengths.tokens / (1 - PADDING)
    stacks = (sizes.vit + sizes.llama) / (mesh["fsdp"] * tensor)
    held = stacks + sizes.rest / mesh["fsdp"]
    layer = 2 * sizes.llama / llama.num_layers / tensor
    kept = (
        2 * llama.width
        if cfg.remat == "block"
        else 2 * (5 * llama.width + 2 * llama.mlp_width) / tensor
    )
    pixels = examples * vit.num_patches * (10 * vit.width + 4 * vit.mlp_width)
    activations = tokens * llama.num_layers * kept + pixels
    logits = 6 * examples * lengths.answer * llama.vocab_size / tensor
    embeddings = 4 * llama.vocab_size * llama.width
    return int(held), int(layer + activations + logits + embeddings)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model in bfloat16, or its decoder in int8: of its two stacks of blocks,
    and of the rest."""

    vit: int
    llama: int
    rest: int


@functools.cache
def _sizes(preset: MiniGPT4Config, quantize: str) -> Sizes:
    shapes = checkpoint.parameter_shapes(preset)

    def size(prefix: str) -> int:
        found = (shape for path, shape in shapes.items() if path.startswith(prefix))
        return 2 * sum(math.prod(shape) for shape in found)

    vit, llama = size("vit/blocks/"), size("llama/blocks/")
    rest = size("") - vit - llama
    return Sizes(vit, llama // 2 if quantize else llama, rest)


@functools.cache
def _reach(on: Slice, mesh: tuple[int, ...], axis: str) -> tuple[float, int]:
    """Bytes a second into a chip from its neighbours along a mesh axis, and over how many
    dimensions of the torus these lie: where JAX puts them."""
    grid = sharding.grid_of(_chips(on), mesh)
    along = sharding.AXES.index(axis)
    group = np.moveaxis(grid, along, 0).reshape(mesh[along], -1)[:, 0]
    coords = [chip.coords for chip in group]
    dims = sum(len({c[i] for c in coords}) > 1 for i in range(on.chip.dims))
    return on.links(coords), dims


def _chips(on: Slice) -> list[SimpleNamespace]:
    """A slice's chips as far as the order of a mesh needs them, without libtpu."""
    sizes = (*on.shape, 1, 1)[:3]
    places = itertools.product(*(range(size) for size in reversed(sizes)))
    places = [place[::-1] for place in places]
    return [
        SimpleNamespace(
            id=n,
            platform="tpu",
            device_kind=on.chip.kind,
            coords=coords,
            core_on_chip=0,
            slice_index=part,
            process_index=n // 4,
        )
        for n, (part, coords) in enumerate(itertools.product(range(on.count), places))
    ]


def meshes(preset: MiniGPT4Config, on: Slice, batch: int) -> Sequence[dict[str, int]]:
    """The splits of a slice that divide batch and heads, most `fsdp` first."""
    found = []
    for tensor in (1, 2, 4, 8):
        if on.chips % tensor or preset.llama.num_kv_heads % tensor:
            continue
        for data in (2**i for i in range(9)):
            fsdp, left = divmod(on.chips, data * tensor)
            if left or not fsdp or batch % (data * fsdp) or data % on.count:
                continue
            if preset.llama.width % fsdp or preset.llama.mlp_width % fsdp:
                continue  # large arrays would lie whole on each device
            found.append(dict(data=data, fsdp=fsdp, tensor=tensor))
    return found


def best(cfg, preset: MiniGPT4Config, on: Slice, lengths: Lengths) -> Projection | None:
    """Of the mesh with the highest MFU that fits; None where none does."""
    found = [
        step(cfg, preset, on, mesh, lengths)
        for mesh in meshes(preset, on, cfg.batch_size // cfg.optim.accumulate)
    ]
    return max(
        (each for each in found if each.fits), key=lambda each: each.mfu, default=None
    )
