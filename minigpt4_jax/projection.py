"""What a step will take on devices that are not here, compiled for them.

Nothing is loaded: shapes and places are enough to compile the real step of a config.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from minigpt4_jax import checkpoint, features, flops, hlo, optim, sharding
from minigpt4_jax.chips import Slice
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.step import answer_loss, make_step, new_state, without_values

BFLOAT16 = DTypes("bfloat16", "bfloat16", "bfloat16")
PADDING = 0.05  # of a packed row, as measured by data/rows.py on captions


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of an example: of its prompt, image and BOS included, and its answer."""

    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """That the decoder reads: all but the answer's last."""
        return self.prompt + self.answer - 1


def mean_lengths(cfg, preset: MiniGPT4Config) -> Lengths:
    """Of a config, without its data.

    Captions have 11.6 tokens and an end (our photos' captions, cleaned as stage 1 does,
    in SmolLM2's tokens). Stage 2's are not measured here: its prompts have about 35
    tokens beside the image, and 80 are half of what an answer may have.
    """
    beside, answer = (1, 13) if cfg.loss == "captions" else (36, 80)
    return Lengths(beside + preset.num_slots, min(answer, cfg.row.answers))


@dataclass(frozen=True)
class Projection:
    """Of one step on every device; bytes of one device, seconds of all together.

    seconds: of a step; compute, collectives: of it, if each ran by itself.
    compile_seconds, slowest, exchanged: not of formula.py, which compiles nothing.
    """

    batch: int
    mesh: dict[str, int]
    chips: int
    arguments: int
    temporaries: int
    peak: int
    memory: int
    useful_flops: int
    compiled_flops: int
    collective_bytes: int
    compute: float
    collectives: float
    seconds: float
    peak_flops: float
    compile_seconds: float = 0.0
    slowest: tuple[tuple[float, str], ...] = ()
    exchanged: tuple[tuple[float, str], ...] = ()

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory

    @property
    def mfu(self) -> float:
        """Share of the peak that does useful work (flops.py)."""
        return self.useful_flops / (self.seconds * self.chips * self.peak_flops)

    @property
    def examples_per_s(self) -> float:
        return self.batch / self.seconds


def useful(cfg, preset: MiniGPT4Config, batch: int, lengths: Lengths) -> int:
    """FLOPs that a step of so many examples has to do, by the formula of flops.py."""
    tokens = lengths.tokens
    work = flops.Work(
        images=batch,
        tokens=batch * tokens,
        pairs=batch * tokens * (tokens + 1) // 2,
        answers=batch * lengths.answer,
    )
    return _part(preset, tuple(cfg.trainable), bool(cfg.cache.dtype))[1](work)


@functools.cache  # the formula asks for thousands of meshes and batches
def _part(
    preset: MiniGPT4Config, trainable: tuple[str, ...], cached: bool
) -> tuple[str, flops.Costs]:
    """What a batch has of its images, and what a step costs."""
    trained = optim.select(checkpoint.parameter_shapes(preset), trainable)
    part = features.frozen_part(preset, trained) if cached else "pixels"
    return part, flops.costs(preset, trained, part)


def batch_without_values(cfg, preset: MiniGPT4Config, mesh: Mesh, lengths: Lengths):
    """Shapes and places of one batch, as the loader would make it of such lengths."""
    examples, parts = cfg.batch_size // cfg.optim.accumulate, sharding.batch_parts(mesh)
    sharding.check_batch(examples, mesh)
    rows, tokens, answers = examples, cfg.row.tokens, cfg.row.answers
    if cfg.row.packed:
        each = examples // parts
        wanted = each * lengths.tokens / (1 - PADDING)
        rows_each = max(1, math.ceil(wanted / cfg.row.packed))
        rows = rows_each * parts
        tokens = math.ceil(max(wanted / rows_each, lengths.tokens) / 8) * 8
        per_row = math.ceil(each / rows_each)
        answers = math.ceil(per_row * lengths.answer / (1 - PADDING))
    side, vit = preset.vit.image_size, preset.vit
    part = _part(preset, tuple(cfg.trainable), bool(cfg.cache.dtype))[0]
    images = {
        "pixels": ("pixels_BHWC", (examples, side, side, 3), jnp.uint8),
        "patches": ("patches_BPE", (examples, vit.num_patches, vit.width), jnp.float16),
        "queries": (
            "queries_BQD",
            (examples, preset.num_slots, preset.projector_width),
            jnp.float16,
        ),
    }
    name, shape, dtype = images[part]
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (shape, dtype),
        "ok_B": ((examples,), jnp.float32),
        "loss_mask_RA": ((rows, answers), jnp.float32),
    }
    for name in ("ids_RT", "segments_RT", "positions_RT", "slots_RT"):
        arrays[name] = (rows, tokens), jnp.int32
    for name in ("answer_ids_RA", "answer_from_RA", "example_RA"):
        arrays[name] = (rows, answers), jnp.int32
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, sharding.batch_spec(name))
        )
        for name, (shape, dtype) in arrays.items()
    }


def lower_step(
    cfg,
    preset: MiniGPT4Config,
    mesh: Mesh,
    lengths: Lengths,
    dtypes: DTypes = BFLOAT16,
):
    """The training step of a config, lowered for the mesh's devices."""
    found = without_values(
        *(preset, cfg.trainable, mesh, dtypes),
        remat=cfg.remat == "block",
        quantisation=Quantisation(cfg.quantize),
    )
    optimizer = optim.make_optimizer(cfg.optim)
    step = make_step(
        found, answer_loss, optimizer, optim.schedule(cfg.optim), cfg.optim.accumulate
    )
    state = jax.eval_shape(lambda p: new_state(p, optimizer), found.params)
    state = _placed(state, sharding.places(state, mesh))
    batch = batch_without_values(cfg, preset, mesh, lengths)
    return step.lower(state, found.frozen, (batch,) * cfg.optim.accumulate)


def lower_token(preset: MiniGPT4Config, mesh: Mesh, rows: int, places: int):
    """One more token of `rows` rows that have read `places`, greedy, lowered."""
    found = without_values(preset, (r"projector/.*",), mesh, BFLOAT16)

    def token(params, frozen, ids_B1, cache):
        model = found.model(params, frozen)
        logits_B1V, cache = model(
            ids_B1, positions_BT=cache.length_B[:, None], cache=cache
        )
        return logits_B1V.argmax(-1), cache

    model = nnx.eval_shape(lambda: MiniGPT4(preset, dtypes=BFLOAT16, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.llama.new_cache(rows, places))
    cache = _placed(cache, sharding.cache_places(cache, mesh))
    batch = NamedSharding(mesh, sharding.BATCH)
    ids_B1 = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=batch)
    jitted = jax.jit(token, donate_argnums=3)
    return jitted.lower(found.params, found.frozen, ids_B1, cache)


def _placed(tree, places):
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        places,
    )


def read(compiled, on: Slice, mesh: Mesh, **known) -> Projection:
    """What a program compiled for a slice will take.

    Args:
        known: batch, useful_flops and compile_seconds of the Projection.
    """
    devices = list(mesh.devices.flat)
    program = hlo.Program(compiled.as_text())
    memory = compiled.memory_analysis()
    chip = on.chip

    def seconds(collective: hlo.Collective) -> float:
        return on.seconds(collective, devices)

    found = program.collectives()
    times = program.seconds(1 / chip.hertz, seconds)
    largest = sorted(((seconds(c) * c.times, c) for c in found), key=lambda x: -x[0])
    return Projection(
        mesh=dict(mesh.shape),
        chips=on.chips,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        memory=chip.memory,
        compiled_flops=hlo.total(program.dots()),
        collective_bytes=sum(c.bytes * c.times for c in found),
        compute=times.compute,
        collectives=times.collectives,
        seconds=times.total,
        peak_flops=chip.peak,
        slowest=tuple(
            (cycles / chip.hertz, f"{name} ({source.rpartition('/')[2]})")
            for cycles, name, source in program.slowest(8)
        ),
        exchanged=tuple(
            (s, f"{c.kind} {'x'.join(map(str, c.shape))} over {len(c.groups[0])}")
            for s, c in largest[:8]
        ),
        **known,
    )


def advice(mesh: dict[str, int], cfg) -> list[str]:
    """Which options would make a plan fit that does not."""
    said = []
    if not cfg.quantize:
        said.append("--config.quantize=int8 holds the frozen decoder in half the bytes")
    if cfg.remat != "block":
        said.append("--config.remat=block keeps only what goes from block to block")
    examples = cfg.batch_size // cfg.optim.accumulate
    if examples > mesh["data"] * mesh["fsdp"]:
        said.append(
            f"--config.optim.accumulate={2 * cfg.optim.accumulate} computes half of the "
            "examples at a time"
        )
    if mesh["data"] > 1:
        said.append("a mesh with more fsdp and less data splits the weights further")
    return [*said, "a larger slice"]


def as_dict(found: Projection) -> dict[str, Any]:
    """For JSON, with what follows from its fields."""
    return dataclasses.asdict(found) | {
        "fits": found.fits,
        "mfu": found.mfu,
        "examples_per_s": found.examples_per_s,
    }


def check_mesh(cfg, mesh: dict[str, int]) -> None:
    """Raise ConfigError when the batch cannot be split over the mesh."""
    parts = mesh["data"] * mesh["fsdp"]
    if cfg.batch_size // cfg.optim.accumulate % parts:
        raise ConfigError(
            f"a batch of {cfg.batch_size} in {cfg.optim.accumulate} parts does not split "
            f"over data={mesh['data']} times fsdp={mesh['fsdp']} devices; change "
            "config.batch_size or --mesh"
        )
