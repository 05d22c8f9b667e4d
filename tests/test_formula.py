"""Steps by formula: what fits, which mesh, and how far from what was compiled."""

import json
import math
from pathlib import Path

import pytest

from configs import stage1
from minigpt4_jax import chips, formula, plan, projection
from minigpt4_jax.models.minigpt4 import PRESETS

VICUNA = PRESETS["minigpt4_vicuna_13b"]
CONFIG = stage1.get_config("13b")
LENGTHS = projection.mean_lengths(CONFIG, VICUNA)
COMPILED = json.loads((Path(__file__).parents[1] / "docs/compiled.json").read_text())


def of(slice_: str, batch: int = 256, remat: str = "none", **mesh: int):
    cfg = stage1.get_config("13b")
    cfg.batch_size, cfg.remat = batch, remat
    axes = dict(data=1, fsdp=1, tensor=1) | mesh
    return formula.step(cfg, VICUNA, chips.parse(slice_), axes, LENGTHS)


def test_the_formula_knows_what_does_not_fit():
    assert not of("v5e:2x4", data=8).fits  # 13B whole on each chip
    split = of("v5e:2x4", fsdp=8)
    assert split.fits and 0.1 < split.mfu < 0.6
    said = " ".join(projection.advice(dict(data=8, fsdp=1, tensor=1), CONFIG))
    assert "a mesh with more fsdp" in said and "accumulate=2" in said
    assert "quantize=int8" in said


def test_a_decoder_in_eight_bits_is_half_of_what_is_held_and_gathered():
    cfg = stage1.get_config("13b")
    on, mesh = chips.parse("v5e:2x4"), dict(data=1, fsdp=8, tensor=1)
    whole = formula.step(cfg, VICUNA, on, mesh, LENGTHS)
    cfg.quantize = "int8"
    few = formula.step(cfg, VICUNA, on, mesh, LENGTHS)
    assert few.arguments < 0.65 * whole.arguments
    assert few.collectives < 0.6 * whole.collectives
    assert "quantize" not in " ".join(projection.advice(mesh, cfg))


def test_meshes_divide_the_slice_the_batch_and_the_heads():
    on = chips.parse("v5e:4x4")
    found = formula.meshes(VICUNA, on, 256)
    assert dict(data=1, fsdp=16, tensor=1) in found
    for mesh in found:
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == 16
        assert VICUNA.llama.num_kv_heads % mesh["tensor"] == 0


@pytest.mark.parametrize("slice_", ["v4:4x8x8", "v5p:4x8x8"])
def test_weights_are_not_gathered_over_three_dimensions_of_a_torus(slice_):
    """There the compiler makes sums of gathers, and writes zeros for them."""
    whole, plane = of(slice_, 4096, fsdp=256), of(slice_, 4096, data=4, fsdp=64)
    assert whole.seconds > 1.4 * plane.seconds
    cfg = stage1.get_config("13b")
    cfg.batch_size = 4096
    found = formula.best(cfg, VICUNA, chips.parse(slice_), LENGTHS)
    _, dims = formula._reach(chips.parse(slice_), tuple(found.mesh.values()), "fsdp")
    assert dims < 3
    # A torus of two has no third: there all chips may share the weights.
    _, dims = formula._reach(chips.parse("v5e:16x16"), (1, 256, 1), "fsdp")
    assert dims == 2


def test_a_mesh_axis_has_the_links_of_the_dimensions_that_it_spans():
    v5p = chips.parse("v5p:4x8x8")
    link = v5p.chip.link
    assert formula._reach(v5p, (1, 256, 1), "fsdp") == (6 * link, 3)
    assert formula._reach(v5p, (4, 64, 1), "fsdp") == (4 * link, 2)
    assert formula._reach(v5p, (256, 1, 1), "fsdp") == (math.inf, 0)
    small = chips.parse("v5e:2x4")  # no rings
    assert formula._reach(small, (1, 8, 1), "fsdp") == (2 * small.chip.link, 2)
    two = chips.parse("2*v5e:4x4")  # data alone goes between slices
    assert formula._reach(two, (2, 16, 1), "fsdp") == (2 * two.chip.link, 2)


def test_more_of_a_chip_s_memory_bandwidth_makes_a_step_faster():
    """Of activations, which v6e touches at less than twice v5e's rate: its peak is five."""
    v5e, v6e = of("v5e:4x4", 256, fsdp=16), of("v6e:4x4", 256, fsdp=16)
    assert 1.5 < v5e.seconds / v6e.seconds < 3


def test_features_that_are_kept_spare_a_step_the_vit():
    cfg = stage1.get_config("13b")
    on, mesh = chips.parse("v5e:2x4"), dict(data=1, fsdp=8, tensor=1)
    pixels = formula.step(cfg, VICUNA, on, mesh, LENGTHS)
    cfg.cache.dtype = "float16"
    kept = formula.step(cfg, VICUNA, on, mesh, LENGTHS)
    assert kept.useful_flops < pixels.useful_flops
    assert kept.collective_bytes < pixels.collective_bytes
    assert kept.seconds < 0.8 * pixels.seconds


@pytest.mark.parametrize("chip", chips.CHIPS)
def test_the_formula_is_near_what_was_compiled(chip):
    ratios = []
    for entry in COMPILED:
        of_chip = entry["slice"].startswith(f"{chip}:") and entry["stage"] == 1
        if of_chip and entry["seconds"]:
            cfg = stage1.get_config(entry["model"])
            cfg.batch_size, cfg.remat = entry["batch"], entry["remat"]
            preset = plan.find_preset(cfg.checkpoint, None)
            mesh = dict(zip(("data", "fsdp", "tensor"), entry["mesh"], strict=True))
            found = formula.step(
                cfg, preset, chips.parse(entry["slice"]), mesh, LENGTHS
            )
            ratios.append(found.seconds / entry["seconds"])
            assert 0.75 < found.peak / max(entry["peak"], 2**30) < 1.6, entry
    assert len(ratios) >= 3 and all(0.7 < ratio < 1.35 for ratio in ratios), ratios
