"""`python -m minigpt4_jax.plan`: tables, refusals, the cache; and pods, compiled for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import stage1
from minigpt4_jax import plan, projection
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.projection import Projection

ROOT = Path(__file__).parents[1]


def run(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minigpt4_jax.plan", *flags]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "MINIGPT4_JAX_CACHE": str(tmp_path)},
    )


def test_a_table_of_slices_comes_without_weights_data_or_tpus(tmp_path):
    found = run(tmp_path, "--config=configs/stage1.py:13b", "--price=1.2")
    assert found.returncode == 0, found.stderr
    head, *rows, note = found.stdout.splitlines()
    assert head.split()[:2] == ["slice", "mesh"] and "--compile N" in note
    assert len(rows) > 10 and all(row.endswith("formula") for row in rows)
    shares = [float(row.split()[5]) for row in rows]
    assert shares == sorted(shares, reverse=True) and 5 < shares[0] < 60


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "needs --config"),
        (("--topology=v5p-64",), "count cores"),
        (("--topology=v5e:4x4", "--mesh=fsdp=5"), "the slice has 16"),
        (("--topology=v5e:4x4", "--mesh=heads=5"), "want sizes of data, fsdp, tensor"),
        (("--config.checkpoint=elsewhere",), "give --preset"),
        (("--config.batch_size=255", "--topology=v5e:4x4"), "does not split over"),
        (("--config.bach_size=255",), "batch_size"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(tmp_path, flags, said):
    config = ("--config=configs/stage1.py",) if flags else ()
    found = run(tmp_path, *config, *flags)
    assert found.returncode in (2, 3) and said in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


def some(**changes) -> Projection:
    values = dict(
        batch=256,
        mesh=dict(data=1, fsdp=16, tensor=1),
        chips=16,
        arguments=2 << 30,
        temporaries=3 << 30,
        peak=5 << 30,
        memory=15 << 30,
        useful_flops=700 * 10**12,
        compiled_flops=50 * 10**12,
        collective_bytes=50 * 10**9,
        compute=0.4,
        collectives=0.5,
        seconds=0.7,
        peak_flops=197e12,
        slowest=((0.03, "fusion.1 (dot_general)"),),
        exchanged=((0.06, "all-gather 1x5120 over 16"),),
    )
    return Projection(**values | changes)


def test_a_report_says_what_a_run_takes_and_costs():
    args = type("", (), dict(mode="train", price=1.2))
    cfg = stage1.get_config("13b")
    lengths = projection.Lengths(33, 13)
    lines = list(plan.report(some(), cfg, plan.chips.parse("v5e:4x4"), lengths, args))
    text = "\n".join(lines)
    # 700e12 / (0.7 * 16 * 197e12); 20,000 steps of 0.7 s; 16 chips at 1.2.
    for figure in ("31.7 %", "366", "3.9 hours", "75", "700.00 TFLOP", "800.00 TFLOP"):
        assert figure in text, (figure, text)
    assert "DOES NOT FIT" not in text
    lines = plan.report(
        some(peak=17 << 30), cfg, plan.chips.parse("v5e:4x4"), lengths, args
    )
    text = "\n".join(lines)
    assert f"DOES NOT FIT: {2 << 30} bytes (2.00 GiB)" in text and "accumulate" in text


def test_what_finds_no_room_is_said_in_bytes_with_what_helps():
    compilers = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (18.25G) exceeds available HBM (15.75G)."
    )
    on = plan.chips.parse("v5e:4x4")
    said = plan.no_room(compilers, on, ["a larger slice"])
    assert f"{5 << 29} bytes (2.50 GiB) too many; what helps: a larger slice" in said
    said = plan.no_room("RESOURCE_EXHAUSTED: all gone\nmore", on, ["less"])
    assert said == "does not fit on v5e:4x4: all gone; what helps: less"


def test_a_mesh_takes_what_is_left_as_data():
    cfg = stage1.get_config("13b")
    assert plan.parse_mesh("fsdp=4,tensor=2", cfg, 16) == dict(data=2, fsdp=4, tensor=2)
    assert plan.parse_mesh(None, cfg, 16) == dict(data=1, fsdp=16, tensor=1)
    with pytest.raises(ConfigError, match="the slice has 16"):
        plan.parse_mesh("fsdp=32", cfg, 16)


def test_the_preset_of_a_config_is_known_by_its_name():
    for model in stage1.MODELS:
        name = stage1.get_config(model).checkpoint
        assert plan.find_preset(name, None).name == plan.PRESETS[name]


@pytest.mark.slow
def test_a_pod_is_compiled_for_without_a_tpu_and_the_result_is_kept(tmp_path):
    """7B in the reference's batch on 16 chips; libtpu comes with the extra `tpu`."""
    pytest.importorskip("libtpu")
    flags = ("--config=configs/stage1.py", "--topology=v5e:4x4", "--json")
    found = run(tmp_path, *flags)
    assert found.returncode == 0, found.stderr
    values = json.loads(found.stdout)
    assert values["fits"] and 2 << 30 < values["peak"] < values["memory"]
    assert 0.1 < values["mfu"] < 0.7
    # Compiled is what a chip does; attention over masked pairs and padding are in it.
    share = values["compiled_flops"] * 16 / values["useful_flops"]
    assert 1.0 < share < 1.2
    again = json.loads(run(tmp_path, *flags).stdout)
    assert again == values  # the seconds of compiling too: nothing was compiled
