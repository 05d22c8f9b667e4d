"""Plan a run before it costs anything: python -m minigpt4_jax.plan --config FILE ...

    --topology v5e:16x16 [--mesh fsdp=16,tensor=16]   the step, compiled for this slice
    --topology local                                  or for the devices at hand
    (no topology) [--compile N]                       a table of slices, the best N compiled
    --mode generate                                   tokens a second instead of steps

Needs neither weights nor data, and no TPU: libtpu compiles for one (extra `tpu`).
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from minigpt4_jax import (
    checkpoint,
    chips,
    errors,
    flops,
    formula,
    hlo,
    locate,
    projection,
    roofline,
    run_config,
    sharding,
)
from minigpt4_jax.chips import GIB, Slice
from minigpt4_jax.errors import ConfigError, InputError
from minigpt4_jax.generator import default_dtypes
from minigpt4_jax.models.minigpt4 import MiniGPT4Config
from minigpt4_jax.projection import Lengths, Projection

logger = logging.getLogger(__name__)

PRESETS = {  # of the names that configs/ calls converted directories by
    "minigpt4-7b": "minigpt4_vicuna_7b",
    "minigpt4-13b": "minigpt4_vicuna_13b",
    "minigpt4-llama2-7b": "minigpt4_llama2_7b",
    "demo": "demo",
    "demo-frozen": "demo",
}
SIZES = (4, 8, 16, 32, 64, 128, 256)  # chips of the table's slices
SHOWN = 20  # rows of the table
ROWS, PLACES = 8, 1024  # of --mode generate


def define_flags() -> None:
    """The flags of `plan`."""
    config_flags.DEFINE_config_file("config", help_string="a file of configs/")
    flags.DEFINE_string("topology", None, "as v5e:16x16, 2*v5p:4x4x4, or local")
    flags.DEFINE_string("mesh", None, "as fsdp=16,tensor=16; default: the config's")
    flags.DEFINE_string("preset", None, "model, where the checkpoint's name is no hint")
    flags.DEFINE_enum("mode", "train", ["train", "generate"], "what to plan")
    flags.DEFINE_integer("compile", 0, "how many rows of the table to compile")
    flags.DEFINE_float("price", None, "of a chip and hour, in any currency")
    flags.DEFINE_integer("prompt_tokens", None, "mean of an example, image included")
    flags.DEFINE_integer("answer_tokens", None, "mean of an example's answer")
    flags.DEFINE_bool("json", False, "print JSON")


def main(argv: list[str]) -> int:
    """Read the flags, plan, print; 1 where the plan does not fit."""
    args = flags.FLAGS
    if argv[1:] or args.config is None:
        raise InputError("plan needs --config=FILE, and takes flags only")
    cfg = args.config
    run_config.check(cfg)
    if args.topology != "local":
        jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    preset = find_preset(cfg.checkpoint, args.preset)
    lengths = projection.mean_lengths(cfg, preset)
    lengths = Lengths(
        args.prompt_tokens or lengths.prompt, args.answer_tokens or lengths.answer
    )
    if args.topology is None:
        return table(cfg, preset, lengths, args)
    if args.topology == "local":
        print(local(cfg, preset, lengths, args.mesh))
        return 0
    on = chips.parse(args.topology)
    mesh = parse_mesh(args.mesh, cfg, on.chips)
    if args.mode == "generate":
        found = compiled_token(preset, on, mesh)
    else:
        found = compiled_step(cfg, preset, on, mesh, lengths)
    if args.json:
        print(json.dumps(projection.as_dict(found)))
    else:
        print("\n".join(report(found, cfg, on, lengths, args)))
    return 0 if found.fits else 1


def find_preset(name: str, given: str | None) -> MiniGPT4Config:
    """The model of a config: of --preset, of the directory if it is there, by name."""
    if given:
        return checkpoint.read_preset(given)
    if name in PRESETS:
        return checkpoint.read_preset(PRESETS[name])
    if Path(name).expanduser().is_dir():
        return checkpoint.read_config(Path(name).expanduser())
    raise ConfigError(
        f"checkpoint {name!r} is not here, and no name that tells its model "
        f"({', '.join(PRESETS)}); give --preset"
    )


def parse_mesh(text: str | None, cfg, devices: int) -> dict[str, int]:
    """ "fsdp=16,tensor=2" -> sizes of all axes; data takes what they leave."""
    axes = dict(cfg.mesh) if text is None else {}
    for part in (text or "").split(",") if text else ():
        name, _, size = part.partition("=")
        if name not in sharding.AXES or not size.isdigit():
            raise ConfigError(
                f"--mesh {text!r}: want sizes of {', '.join(sharding.AXES)}, as in "
                "fsdp=16,tensor=2"
            )
        axes[name] = int(size)
    if text is None and axes == {"data": 0, "fsdp": 1, "tensor": 1}:
        axes = {"fsdp": devices}  # weights of the size that needs a plan must be split
    fsdp, tensor = axes.get("fsdp", 1), axes.get("tensor", 1)
    data = axes.get("data") or max(1, devices // (fsdp * tensor))
    if data * fsdp * tensor != devices:
        raise ConfigError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} is {data * fsdp * tensor} "
            f"devices, the slice has {devices}"
        )
    return dict(data=data, fsdp=fsdp, tensor=tensor)


def compiled_step(
    cfg, preset: MiniGPT4Config, on: Slice, mesh: dict[str, int], lengths: Lengths
) -> Projection:
    """The projection of a training step, from the cache or compiled now.

    Raises ConfigError where the compiler finds no room, saying how much is missing.
    """
    projection.check_mesh(cfg, mesh)
    key = ["train", cfg.to_dict(), preset.to_dict(), str(on), mesh, lengths.__dict__]

    def make(devices) -> Projection:
        lowered = projection.lower_step(cfg, preset, devices, lengths)
        return _compile(
            lowered,
            on,
            devices,
            projection.advice(mesh, cfg),
            batch=cfg.batch_size,
            useful_flops=projection.useful(cfg, preset, cfg.batch_size, lengths),
        )

    return _cached(key, on, mesh, make)


def compiled_token(preset: MiniGPT4Config, on: Slice, mesh: dict[str, int]):
    """The projection of one token of ROWS answers, after PLACES that were read."""
    rows = max(ROWS, mesh["data"] * mesh["fsdp"])
    key = ["generate", preset.to_dict(), str(on), mesh, rows, PLACES]

    def make(devices) -> Projection:
        lowered = projection.lower_token(preset, devices, rows, PLACES)
        work = flops.Work(images=0, tokens=rows, pairs=rows * PLACES, answers=rows)
        forward = flops.costs(preset, [], "queries")(work)
        helps = ["a mesh with more tensor", "a larger slice"]
        return _compile(lowered, on, devices, helps, batch=rows, useful_flops=forward)

    return _cached(key, on, mesh, make)


def _compile(lowered, on: Slice, mesh, helps: list[str], **known) -> Projection:
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(no_room(str(error), on, helps)) from error
    known["compile_seconds"] = time.perf_counter() - began
    return projection.read(compiled, on, mesh, **known)


def no_room(said: str, on: Slice, helps: list[str]) -> str:
    """What the compiler says when it finds no room, with what is missing and helps."""
    sizes = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", said)
    if sizes:
        over = int((float(sizes[1]) - float(sizes[2])) * GIB)
        lack = f"temporaries alone are {over} bytes ({over / GIB:.2f} GiB) too many"
    else:
        lack = said.partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0][:300]
    return f"does not fit on {on}: {lack}; what helps: {'; '.join(helps)}"


def _cached(key: list, on: Slice, mesh: dict[str, int], make) -> Projection:
    """What `make(mesh of devices)` gives, kept by key, versions and our own source."""
    versions = [metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    try:
        versions.append(metadata.version("libtpu"))
    except metadata.PackageNotFoundError:
        versions.append("no libtpu")
    text = json.dumps([key, versions, _source()], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = locate.cache_root() / "plans" / f"{name}.json"
    if path.is_file():
        values = json.loads(path.read_text())
        fields = {field.name for field in dataclasses.fields(Projection)}
        return Projection(**{k: v for k, v in values.items() if k in fields})
    devices = on.devices()
    if len(devices) != on.chips:
        raise ConfigError(f"{on} has {len(devices)} devices, not {on.chips}")
    found = make(sharding.make_mesh(**mesh, devices=devices))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(projection.as_dict(found)))
    partial.replace(path)
    return found


def _source() -> str:
    """A hash of what makes the program."""
    here = Path(__file__).parent
    names = (
        "step.py",
        "sharding.py",
        "flops.py",
        "hlo.py",
        "chips.py",
        "projection.py",
    )
    files = [here / name for name in names] + sorted((here / "models").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def report(found: Projection, cfg, on: Slice, lengths: Lengths, args) -> Iterator[str]:
    """Lines for a person."""
    mesh = " ".join(f"{k}={v}" for k, v in found.mesh.items())
    yield f"{on}, {found.chips} chips, mesh {mesh}; compiled in {found.compile_seconds:.0f} s"
    yield ""
    yield f"memory of a chip   {found.memory / GIB:8.2f} GiB"
    yield f"  arguments        {found.arguments / GIB:8.2f}"
    yield f"  temporaries      {found.temporaries / GIB:8.2f}"
    yield f"  peak             {found.peak / GIB:8.2f}"
    if not found.fits:
        over = found.peak - found.memory
        yield f"DOES NOT FIT: {over} bytes ({over / GIB:.2f} GiB) too many. What helps:"
        yield from (f"  {line}" for line in projection.advice(found.mesh, cfg))
    yield ""
    if args.mode == "generate":
        yield f"{found.batch} rows of {PLACES} places, one token each:"
    else:
        yield (
            f"a step of {found.batch} examples, {lengths.prompt} + {lengths.answer} "
            "tokens each on average:"
        )
    yield f"  useful work      {found.useful_flops / 1e12:8.2f} TFLOP by formula"
    yield f"  compiled         {found.compiled_flops * found.chips / 1e12:8.2f} TFLOP"
    yield f"  compute          {found.compute * 1e3:8.1f} ms, the compiler's estimate"
    yield (
        f"  collectives      {found.collectives * 1e3:8.1f} ms for "
        f"{found.collective_bytes / 1e9:.2f} GB, from the links"
    )
    yield f"  step             {found.seconds * 1e3:8.1f} ms as they are ordered"
    if args.mode == "generate":
        yield f"  tokens/s         {found.batch / found.seconds:8.0f}"
        return
    yield f"  MFU              {100 * found.mfu:8.1f} %"
    yield f"  examples/s       {found.examples_per_s:8.0f}"
    hours = found.seconds * cfg.optim.total_steps / 3600
    yield f"  {cfg.optim.total_steps} steps      {hours:8.1f} hours"
    if args.price:
        yield f"  price            {hours * found.chips * args.price:8.0f}"
    yield ""
    yield "largest of compute, and of collectives, ms a step:"
    for ours, theirs in zip(found.slowest, found.exchanged, strict=False):
        left = f"{ours[0] * 1e3:7.1f} {ours[1]}"
        yield f"  {left:58}{theirs[0] * 1e3:7.1f} {theirs[1]}"


def table(cfg, preset: MiniGPT4Config, lengths: Lengths, args) -> int:
    """Print slices and meshes, by formula; the best are compiled if asked."""
    found = []
    for chip in chips.CHIPS.values():
        for size in SIZES:
            on = chips.slices(chip, size)
            row = formula.best(cfg, preset, on, lengths)
            if row is not None:
                found.append((on, row))
    if not found:
        raise ConfigError(
            f"no slice of {SIZES[0]} to {SIZES[-1]} chips holds a batch of "
            f"{cfg.batch_size}; change config.batch_size, optim.accumulate or remat"
        )
    found.sort(key=lambda row: -row[1].mfu)
    for i in range(min(args.compile, len(found))):
        on, row = found[i]
        logger.info("compiling for %s, mesh %s", on, row.mesh)
        found[i] = on, compiled_step(cfg, preset, on, row.mesh, lengths)
    if args.json:
        rows = [projection.as_dict(row) | {"topology": str(on)} for on, row in found]
        print(json.dumps(rows))
        return 0
    print(
        f"{'slice':14}{'mesh':>18}{'GiB':>7}{'of':>6}{'ms':>8}{'MFU %':>7}{'hours':>8}"
    )
    for n, (on, row) in enumerate(found[: max(SHOWN, args.compile)]):
        mesh = ",".join(str(size) for size in row.mesh.values())
        hours = row.seconds * cfg.optim.total_steps / 3600
        how = "compiled" if n < args.compile else "formula"
        cost = f"{hours * row.chips * args.price:10.0f}" if args.price else ""
        print(
            f"{on!s:14}{mesh:>18}{row.peak / GIB:7.1f}{row.memory / GIB:6.0f}"
            f"{row.seconds * 1e3:8.0f}{100 * row.mfu:7.1f}{hours:8.1f}{cost}  {how}"
        )
    print("mesh: data,fsdp,tensor. By formula, a MFU is a rough one: --compile N")
    return 0


def local(cfg, preset: MiniGPT4Config, lengths: Lengths, mesh_text: str | None) -> str:
    """Memory and time of the step on the devices of this machine; it is not run."""
    devices = jax.devices()
    axes = parse_mesh(mesh_text, cfg, len(devices))
    mesh = sharding.make_mesh(**axes, devices=devices)
    began = time.perf_counter()
    dtypes = default_dtypes(cfg.dtype or None)
    compiled = projection.lower_step(cfg, preset, mesh, lengths, dtypes).compile()
    took = time.perf_counter() - began
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    work = projection.useful(cfg, preset, cfg.batch_size, lengths)
    peak = flops.peak(devices)
    stats = devices[0].memory_stats() or {}
    lines = [
        f"{len(devices)} x {devices[0].device_kind}, mesh {axes}; compiled in {took:.0f} s",
        f"arguments and temporaries of a device {used / GIB:.2f} GiB"
        + (f" of {stats['bytes_limit'] / GIB:.2f}" if "bytes_limit" in stats else ""),
        f"useful work of a step {work / 1e12:.3f} TFLOP",
    ]
    if peak:
        lines.append(f"at 100 % MFU {1e3 * work / peak:.1f} ms a step")
    rates = roofline.measure(dtypes.compute)
    shared = len(devices) if devices[0].platform == "cpu" else 1  # the same cores
    found = roofline.project(hlo.Program(compiled.as_text()), rates, work, shared)
    lines.append(f"{found} a step, {cfg.batch_size / found.seconds:.1f} examples/s")
    return "\n".join(lines)


if __name__ == "__main__":
    errors.run(main, define=define_flags)
