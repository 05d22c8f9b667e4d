"""What TPU slices give, by formula, beside what has been compiled: docs/slices.md.

    python -m benchmarks.plan_table > docs/slices.md
    python -m benchmarks.plan_table --compile=3 --chips=v5p --sizes=64    # adds figures
    python -m benchmarks.plan_table --fit                                 # the constants

The formula (minigpt4_jax/formula.py) takes seconds for the whole table. --compile takes
its first N rows that were never compiled, each a step of configs/ compiled for a slice
that is not here (extra `tpu`; minutes a row), and keeps what it finds in
docs/compiled.json with the versions and the commit. --fit prints the constants of the
formula that are nearest to all that is there.
"""

import dataclasses
import functools
import json
import logging
import math
import statistics
import subprocess
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import flags
from scipy.optimize import least_squares

from configs import stage1, stage2
from minigpt4_jax import chips, errors, formula, plan, projection
from minigpt4_jax.chips import GIB, Slice
from minigpt4_jax.formula import Constants
from minigpt4_jax.projection import Projection

logger = logging.getLogger("benchmarks")

COMPILED = Path(__file__).parents[1] / "docs" / "compiled.json"
STAGES = {1: stage1, 2: stage2}
# Examples a chip that are tried for the smallest batch that passes HALF.
EACH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
HALF = 0.5
NEAR = 0.01  # of a MFU: more examples give no more than that
TIE = 0.04  # of a time: the formula does not know better
REMATS = ("none", "block")
COLUMNS = (
    "slice chips batch mesh remat|GiB of|ms|MFU %|hours|compiled, ms|MFU %"
).replace(" ", "|", 4)


@dataclasses.dataclass(frozen=True)
class Row:
    """A step by formula: of a stage, a model, a slice and a batch, best split."""

    stage: int
    model: str
    on: Slice
    remat: str
    found: Projection

    @property
    def key(self) -> tuple:
        mesh = tuple(self.found.mesh.values())
        return (
            *(self.stage, self.model, str(self.on), self.found.batch),
            *(mesh, self.remat),
        )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step, as docs/compiled.json has it; seconds: 0 where it found no room."""

    stage: int
    model: str
    slice: str
    batch: int
    mesh: tuple[int, ...]
    remat: str
    seconds: float
    peak: int  # bytes of a device
    commit: str
    versions: str

    @property
    def key(self) -> tuple:
        return (
            *(self.stage, self.model, self.slice, self.batch),
            *(self.mesh, self.remat),
        )


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise errors.InputError("plan_table takes flags only")
    jax.config.update("jax_platforms", "cpu")
    args = flags.FLAGS
    known = read()
    if args.fit:
        print(fit(known))
        return
    sizes = [int(size) for size in args.sizes]
    rows = list(table(args.models, args.chips, sizes, known))
    if args.compile:
        add(rows, known, args.compile)
        return
    print("\n".join(page(rows, known)))


def read() -> list[Compiled]:
    """What has been compiled."""
    entries = json.loads(COMPILED.read_text())
    return [Compiled(**entry | {"mesh": tuple(entry["mesh"])}) for entry in entries]


@functools.cache
def config(stage: int, model: str, remat: str = "") -> Any:
    """The stage's config, with its own remat or another; one object for each."""
    cfg = STAGES[stage].get_config(model)
    cfg.remat = remat or cfg.remat
    return cfg


def with_batch(stage: int, model: str, batch: int, remat: str):
    cfg = config(stage, model, remat)  # a copy for each batch would take the longest
    cfg.batch_size = batch
    return cfg


# By formula.


def table(
    models: Sequence[str],
    names: Sequence[str],
    sizes: Sequence[int],
    known: Sequence[Compiled] = (),
) -> Iterator[Row]:
    """Two rows of each slice: the config's batch, and the smallest that passes HALF.

    A split that was compiled is shown where the formula finds no other one better.
    """
    keys = {entry.key for entry in known if entry.seconds}
    for stage in STAGES:
        for name in names:
            for model in models:
                for size in sizes if stage == 1 else [s for s in sizes if s == 4]:
                    on = chips.slices(chips.CHIPS[name], size)
                    for batch in two(stage, model, on):
                        row = best(stage, model, on, batch, keys)
                        assert row, "it fitted"
                        yield row


def two(stage: int, model: str, on: Slice) -> Iterator[int]:
    """The batches of a slice's rows."""
    own = config(stage, model).batch_size
    if best(stage, model, on, own):
        yield own
    batches = sorted(each * on.chips for each in EACH)
    found = [row for batch in batches if (row := best(stage, model, on, batch))]
    most = max((row.found.mfu for row in found), default=0.0)
    for row in found:
        if row.found.mfu >= min(HALF, most - NEAR):
            if row.found.batch != own:
                yield row.found.batch
            return


def best(
    stage: int, model: str, on: Slice, batch: int, compiled: Collection[tuple] = ()
) -> Row | None:
    """Of both kinds of remat and every mesh, what has the highest MFU and fits.

    Args:
        compiled: keys of rows that come before others within TIE of the highest.
    """
    preset, lengths = given(stage, model)
    rows = []
    for remat in REMATS:
        cfg = with_batch(stage, model, batch, remat)
        for mesh in formula.meshes(preset, on, batch):
            found = formula.step(cfg, preset, on, mesh, lengths)
            if found.fits:
                rows.append(Row(stage, model, on, remat, found))
    most = max((row.found.mfu for row in rows), default=0.0)
    tied = [r for r in rows if r.key in compiled and r.found.mfu > (1 - TIE) * most]
    return max(tied or rows, key=lambda row: row.found.mfu, default=None)


@functools.cache
def given(stage: int, model: str):
    """The preset of a config, and the lengths of its examples."""
    cfg = config(stage, model)
    preset = plan.find_preset(cfg.checkpoint, None)
    return preset, projection.mean_lengths(cfg, preset)


def again(entry: Compiled, constants: Constants = formula.FITTED) -> Projection:
    """What the formula says of a step that was compiled."""
    cfg = with_batch(entry.stage, entry.model, entry.batch, entry.remat)
    preset, lengths = given(entry.stage, entry.model)
    mesh = dict(zip(("data", "fsdp", "tensor"), entry.mesh, strict=True))
    return formula.step(cfg, preset, chips.parse(entry.slice), mesh, lengths, constants)


def fit(known: Sequence[Compiled]) -> Constants:
    """The constants whose times are nearest to what was compiled, as ratios."""
    known = [entry for entry in known if entry.seconds]
    names = [field.name for field in dataclasses.fields(Constants)]
    begin = [getattr(formula.FITTED, name) for name in names]
    # Products are seen in programs at 90 to 95 %; the rest only has a sign.
    least = [0.9 if n == "products" else 0.05 if n == "exposed" else 0.3 for n in names]
    most = [0.96 if n == "products" else 1.0 if n == "exposed" else 50 for n in names]

    def off(values) -> list[float]:
        constants = Constants(**dict(zip(names, values.tolist(), strict=True)))
        return [math.log(again(e, constants).seconds / e.seconds) for e in known]

    begin = [min(max(*pair), top) for *pair, top in zip(begin, least, most)]
    found = least_squares(off, begin, loss="soft_l1", bounds=(least, most)).x
    return Constants(*(round(float(value), 2) for value in found))


# Compiled.


def add(rows: Sequence[Row], known: list[Compiled], count: int) -> None:
    """Compile the first rows that were never compiled, and keep what is found."""
    there = {entry.key for entry in known}
    for row in [row for row in rows if row.key not in there][:count]:
        cfg = with_batch(row.stage, row.model, row.found.batch, row.remat)
        preset, lengths = given(row.stage, row.model)
        logger.info("compiling %s", row.key)
        try:
            made = plan.compiled_step(cfg, preset, row.on, row.found.mesh, lengths)
            seconds, peak = made.seconds, made.peak
        except errors.ConfigError as error:
            logger.warning("%s", error)
            seconds, peak = 0.0, 0
        known.append(Compiled(*row.key, round(seconds, 4), peak, commit(), versions()))
        write(known)


def write(known: Sequence[Compiled]) -> None:
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in known]
    COMPILED.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def commit() -> str:
    """Of this checkout, with a + where it has been changed since."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    cwd = COMPILED.parent
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


def versions() -> str:
    names = ("jax", "libtpu")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


# The page.


def page(rows: Sequence[Row], known: Sequence[Compiled]) -> Iterator[str]:
    """docs/slices.md."""
    yield from HEAD.splitlines()
    yield ""
    yield from errors_by_chip(known)
    yield ""
    yield "## The reference's batch"
    yield ""
    yield from fed(rows, known)
    compiled = {entry.key: entry for entry in known}
    for stage, title in ((1, "Stage 1"), (2, "Stage 2, on 4 chips")):
        for name in dict.fromkeys(row.on.chip.name for row in rows):
            found = [r for r in rows if (r.stage, r.on.chip.name) == (stage, name)]
            if not found:
                continue
            yield ""
            yield f"## {title}, {name}"
            yield ""
            yield f"| model | {' | '.join(COLUMNS.split('|'))} |"
            yield "| --- | --- | ---: | ---: | --- | --- |" + " ---: |" * 6
            yield from (line(row, compiled.get(row.key)) for row in found)
    yield ""
    yield from TAIL.splitlines()
    yield ""
    yield (
        "| stage | model | slice | batch | mesh | remat | ms | by formula | ratio | GiB "
        "| by formula | commit |"
    )
    yield "| ---: | --- | --- | ---: | --- | --- |" + " ---: |" * 5 + " --- |"
    for entry in sorted(known, key=lambda entry: (entry.slice, entry.key)):
        yield beside(entry)


HEAD = """\
# Slices, by formula and as compiled

Made by `python -m benchmarks.plan_table`. No TPU has run any of this: times are those of
`minigpt4_jax/formula.py`, and where a step was compiled (`docs/compiled.json`), those of
its program by the compiler's estimates. [scaling.md](scaling.md) says how far these are to
be trusted, and what an example is. The mesh is `data fsdp tensor`, the best of all by
formula, or one within 4 % of it that was compiled; MFU counts useful work only; hours are
of the stage's examples at the reference's (5.12 million in stage 1, 12,000 in stage 2).

Of each slice there are two lines: the reference's batch, and with * the smallest batch
whose MFU passes 50 % by formula, or where none does that fits, the smallest within a point
of the best. That batch is **a change of recipe**. Tried are 1, 2, 3, 4, 6, 8, 12, 16, ...
512 examples a chip.

## How far the formula is from what was compiled
"""


TAIL = """\
## What was compiled

Meshes are those that were best by formula then, or compared.
"""


def errors_by_chip(known: Sequence[Compiled]) -> Iterator[str]:
    """Of each kind of chip: compiled steps, and the formula's time beside theirs."""
    yield "| chip | steps compiled | formula / compiled, median | least | most |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name in chips.CHIPS:
        if ratios := ratios_of(name, known):
            yield (
                f"| {name} | {len(ratios)} | {statistics.median(ratios):.2f} | "
                f"{ratios[0]:.2f} | {ratios[-1]:.2f} |"
            )


def ratios_of(name: str, known: Sequence[Compiled]) -> list[float]:
    """The formula's time over the compiled one, of all steps on a kind of chip."""
    return sorted(
        again(entry).seconds / entry.seconds
        for entry in known
        if entry.seconds and chips.parse(entry.slice).chip.name == name
    )


def fed(rows: Sequence[Row], known: Sequence[Compiled]) -> Iterator[str]:
    """Of each chip and model: the largest slice that a batch of 256 feeds."""
    compiled = {entry.key: entry for entry in known if entry.seconds}
    yield (
        "| chip | model | largest slice at 50 % of its peak, by formula | the same, "
        "compiled | or corrected by that chip's median |"
    )
    yield "| --- | --- | --- | ---: | ---: |"
    pairs = dict.fromkeys((r.on.chip.name, r.model) for r in rows if r.stage == 1)
    for name, model in pairs:
        own = config(1, model).batch_size
        found = [
            row
            for row in rows
            if (row.stage, row.on.chip.name, row.model) == (1, name, model)
            and row.found.batch == own
        ]
        if not found:
            yield f"| {name} | {model} | none holds it | | |"
            continue
        if fast := [row for row in found if row.found.mfu >= HALF]:
            shown = max(fast, key=lambda row: row.on.chips)
            said = f"{shown.on}, {100 * shown.found.mfu:.0f} %"
        else:
            shown = max(found, key=lambda row: row.found.mfu)
            said = f"none; best is {100 * shown.found.mfu:.0f} % on {shown.on}"
        ratios = ratios_of(name, known)
        seen = nearer = ""
        if shown.key in compiled:
            took = compiled[shown.key].seconds
            seen = f"{100 * shown.found.mfu * shown.found.seconds / took:.1f} %"
        elif ratios:
            nearer = f"{100 * shown.found.mfu * statistics.median(ratios):.0f} %"
        yield f"| {name} | {model} | {said} | {seen} | {nearer} |"


def line(row: Row, compiled: Compiled | None) -> str:
    """A row of the table, with what was compiled of the same step beside it."""
    found, cfg = row.found, config(row.stage, row.model)
    mark = "" if found.batch == cfg.batch_size else " *"
    mesh = " ".join(map(str, found.mesh.values()))
    examples = cfg.optim.total_steps * cfg.batch_size
    hours = found.seconds * examples / found.batch / 3600
    beside = " | "
    if compiled and compiled.seconds:
        mfu = found.mfu * found.seconds / compiled.seconds
        beside = f"{1e3 * compiled.seconds:.0f} | {100 * mfu:.1f}"
    elif compiled:
        beside = "no room | "
    return (
        f"| {row.model} | {row.on} | {row.on.chips} | {found.batch:,}{mark} | {mesh} | "
        f"{row.remat} | {found.peak / GIB:.1f} of {found.memory / GIB:.0f} | "
        f"{1e3 * found.seconds:.0f} | {100 * found.mfu:.1f} | {hours:.2g} | {beside} |"
    )


def beside(entry: Compiled) -> str:
    """A compiled step, with the formula's figures of it."""
    ours = again(entry)
    mesh = " ".join(map(str, entry.mesh))
    ms, ratio, gib = "no room", "", ""
    if entry.seconds:
        ms, ratio = f"{1e3 * entry.seconds:.0f}", f"{ours.seconds / entry.seconds:.2f}"
        gib = f"{entry.peak / GIB:.1f}"
    return (
        f"| {entry.stage} | {entry.model} | {entry.slice} | {entry.batch:,} | {mesh} | "
        f"{entry.remat} | {ms} | {1e3 * ours.seconds:.0f} | {ratio} | {gib} | "
        f"{ours.peak / GIB:.1f} | {entry.commit} |"
    )


if __name__ == "__main__":
    flags.DEFINE_list("models", ["7b", "13b"], "of configs/stage1.py and stage2.py")
    flags.DEFINE_list("chips", list(chips.CHIPS), "generations")
    flags.DEFINE_list("sizes", ["4", "8", "16", "32", "64", "128", "256"], "chips")
    flags.DEFINE_integer("compile", 0, "rows to compile that never were", lower_bound=0)
    flags.DEFINE_bool("fit", False, "print the constants of the formula")
    errors.run(main)
