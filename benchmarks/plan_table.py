"""Stage 1 on TPU slices, compiled: the table of docs/scaling.md.

    python -m benchmarks.plan_table [--sizes=16,256] [--chips=v5e] > table.md

Each row is the step of configs/stage1.py compiled for a slice that is not here (extra
`tpu`); what was compiled once is kept in the cache folder. The mesh and whether blocks are
computed again are those that the formula finds best; where the compiler finds no room,
blocks are. Batches: the reference's, and 16 examples a chip, a change of recipe.
"""

import logging

import jax
from absl import flags

from configs import stage1
from minigpt4_jax import chips, errors, plan, projection
from minigpt4_jax.chips import GIB

logger = logging.getLogger("benchmarks")
REFERENCE, EACH = 256, 16


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise errors.InputError("plan_table takes flags only")
    jax.config.update("jax_platforms", "cpu")
    args = flags.FLAGS
    print(
        "| model | slice | chips | batch | mesh | remat | GiB of | ms | MFU % | hours |"
    )
    print("| --- | --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |")
    for model in args.models:
        for name in args.chips:
            for size in map(int, args.sizes):
                for batch in sorted({REFERENCE, EACH * size}):
                    print(row(model, chips.slices(chips.CHIPS[name], size), batch))


def row(model: str, on: chips.Slice, batch: int) -> str:
    cfg = stage1.get_config(model)
    cfg.batch_size = batch
    preset = plan.find_preset(cfg.checkpoint, None)
    lengths = projection.mean_lengths(cfg, preset)
    for remat in ("none", "block"):
        cfg.remat = remat
        found = [
            projection.formula(cfg, preset, on, mesh, lengths)
            for mesh in projection.meshes(preset, on, batch)
        ]
        found = [each for each in found if each.fits]
        if not found:
            continue
        best = max(found, key=lambda each: each.mfu)
        try:
            made = plan.compiled_step(cfg, preset, on, best.mesh, lengths)
        except errors.ConfigError as error:
            logger.warning("%s", error)
            continue
        if made.fits:
            mesh = " ".join(str(n) for n in made.mesh.values())
            hours = made.seconds * cfg.optim.total_steps / 3600
            hours *= REFERENCE / batch  # of as many examples
            note = "" if batch == REFERENCE else " *"
            return (
                f"| {model} | {on} | {on.chips} | {batch:,}{note} | {mesh} | {remat} | "
                f"{made.peak / GIB:.1f} of {made.memory / GIB:.0f} | "
                f"{made.seconds * 1e3:.0f} | {100 * made.mfu:.1f} | {hours:.1f} |"
            )
    return f"| {model} | {on} | {on.chips} | {batch:,} | | | does not fit | | | |"


if __name__ == "__main__":
    flags.DEFINE_list("models", ["7b", "13b"], "of configs/stage1.py")
    flags.DEFINE_list("chips", list(chips.CHIPS), "generations")
    flags.DEFINE_list("sizes", ["4", "8", "16", "32", "64", "128", "256"], "chips")
    errors.run(main)
