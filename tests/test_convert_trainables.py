"""`python -m convert trainables`: what a checkpoint trained, by our paths, and no more."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convert import export, model, sources, trainables
from minigpt4_jax import checkpoint, storage
from minigpt4_jax.errors import CheckpointError, InputError
from tests import parity, published

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["VICUNA", "STRIPS"])
def frozen(request, tmp_path_factory):
    """A converted model without projector, with and without a Q-Former."""
    return convert_frozen(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    return convert_frozen("VICUNA", tmp_path_factory.mktemp("vicuna"))


def convert_frozen(name: str, folder: Path) -> Path:
    cfg = getattr(published, name)
    files = published.parts(folder, cfg, parity.Whole(cfg, seed=3))
    made = model.prepare(
        published.preset(folder, cfg), files | {"projector": None}, no_projector=True
    )
    return made.write(folder / "model")


def run_of(path: Path, frozen: Path, *starts: str) -> tuple[Path, dict]:
    """A work directory that trained all parameters with such beginnings; its arrays."""
    shapes = checkpoint.parameter_shapes(checkpoint.read_config(frozen))
    params = {
        name: parity.normal(index, *shape)
        for index, (name, shape) in enumerate(shapes.items())
        if name.startswith(starts)
    }
    path.mkdir()
    run = {"format": 1, "checkpoint": str(frozen), "config": {"seed": 3}}
    (path / "config.json").write_text(json.dumps(run))
    storage.save_trainables(path, params)
    return path, params


def assert_holds(path: Path, params: dict):
    found = load_file(path)
    assert set(found) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == np.float32


def saved(path: Path, name: str = "VICUNA", **more) -> Path:
    """A checkpoint of the reference, with its optimizer and buffers."""
    theirs = parity.Whole(getattr(published, name), seed=9)
    torch.save(published.checkpoint(theirs, **more), path)
    return path


@pytest.mark.parametrize(
    "starts",
    [
        ("projector/",),
        ("projector/", "qformer/"),
        ("projector/", "qformer/layers/attn/q/", "ln_vision/"),
        ("projector/", "vit/", "ln_vision/"),
    ],
    ids=lambda starts: " ".join(starts[1:]) or "projector",
)
def test_a_run_goes_through_the_references_file_and_comes_back(
    frozen, tmp_path, starts
):
    run, params = run_of(tmp_path / "run", frozen, *starts)
    (pth,) = export.export(run, tmp_path / "out.pth")
    out = tmp_path / "back.safetensors"
    assert trainables.convert(pth, frozen, out) == out
    assert_holds(out, params)


def test_of_a_fused_weight_all_parts_come_back(vicuna, tmp_path):
    """The file holds q, k and v as one: what was frozen of them is in it too."""
    run, params = run_of(tmp_path / "run", vicuna, "projector/", "vit/blocks/attn/q/k")
    (pth,) = export.export(run, tmp_path / "out.pth")
    found = load_file(trainables.convert(pth, vicuna, tmp_path / "back.safetensors"))
    new = set(found) - set(params)
    assert new == {f"vit/blocks/attn/{part}/kernel" for part in "kv"}
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_model_without_q_former_takes_none(tmp_path):
    pth = saved(tmp_path / "their.pth", "STRIPS", query_tokens=torch.ones(1, 8, 20))
    with pytest.raises(CheckpointError, match="the model has no qformer/query_tokens"):
        trainables.parameters(sources.read(pth), published.STRIPS)


def test_buffers_and_the_optimizer_are_left_out_with_their_reasons(
    vicuna, tmp_path, caplog
):
    pth = saved(tmp_path / "theirs.pth")
    theirs = torch.load(pth, weights_only=True)
    assert "optimizer" in theirs and len(theirs["model"]) == 4  # two are buffers
    with caplog.at_level(logging.INFO, "convert"):
        out = trainables.convert(pth, vicuna, tmp_path / "out.safetensors")
    found = load_file(out)
    assert set(found) == {"projector/kernel", "projector/bias"}
    weight = theirs["model"]["llama_proj.weight"].numpy()
    np.testing.assert_array_equal(found["projector/kernel"], weight.T)
    for reason in (
        "1 left out: moments of the run",
        "1 left out: a buffer; queries have no positions",
        "1 left out: rotary angles are computed",
        "1 left out: loss scale of the run",
    ):
        assert reason in caplog.text


@pytest.mark.parametrize(
    "name, more, complaint",
    [
        ("STRIPS", {}, r"a projector 96 -> 32, under tiny_vicuna, which has 20 -> 32"),
        ("ODD", {}, r"a projector 28 -> 32, under tiny_vicuna, which has 20 -> 32"),
        (
            "VICUNA",
            {"llama_model.x.lora_A.weight": torch.ones(3, 2)},
            "a checkpoint of MiniGPT-v2: LoRA weights",
        ),
    ],
)
def test_another_models_checkpoint_is_refused_in_one_sentence(
    vicuna, tmp_path, name, more, complaint
):
    pth = saved(tmp_path / "other.pth", name, **more)
    with pytest.raises(CheckpointError, match=complaint) as error:
        trainables.convert(pth, vicuna, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)  # the trainer quotes the last line
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth"]


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"llama_proj.scale": torch.ones(3)}, r"llama_proj.scale \[3\]: no rule knows"),
        ({"llama_proj.bias": torch.ones(31)}, r"llama_proj.bias: got \[31\], want \[3"),
        ({"llama_proj.weight": torch.ones(32)}, r"weight: got \[32\], want \[32, 20\]"),
        (
            {"query_tokens": torch.ones(1, 7, 20)},
            r"got \[1, 7, 20\], want \[1, 8, 20\]",
        ),
        (
            {"visual_encoder.blocks.1.mlp.fc1.bias": torch.ones(37)},
            r"vit/blocks/mlp/up/bias: the source has layers \[1\], want 3",
        ),
        ({"llama_proj.bias": torch.full((32,), torch.nan)}, "bias holds NaN"),
        ({"llama_proj.bias": torch.ones(32, dtype=torch.int32)}, "int32; want floats"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    vicuna, tmp_path, more, complaint
):
    pth = saved(tmp_path / "theirs.pth", **more)
    with pytest.raises(CheckpointError, match=complaint):
        trainables.convert(pth, vicuna, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]


def test_a_file_of_something_else_says_what_it_holds(vicuna, tmp_path):
    theirs = parity.Whole(published.VICUNA, seed=9)
    torch.save(published.eva(theirs), tmp_path / "eva.pth")
    with pytest.raises(CheckpointError, match="no llama_proj.weight in it, found tens"):
        trainables.convert(tmp_path / "eva.pth", vicuna, tmp_path / "out.safetensors")
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(InputError, match="exists; name another"):
        trainables.convert(tmp_path / "x.pth", vicuna, tmp_path / "there.safetensors")


class Evil:
    def __reduce__(self):
        return (Path.mkdir, (Path("made"),))


def test_a_file_that_wants_to_run_code_runs_nothing(vicuna, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "config": Evil()}, "evil.pth")
    with pytest.raises(CheckpointError, match="refused and nothing in it was run"):
        trainables.convert(Path("evil.pth"), vicuna, Path("out.safetensors"))
    assert not Path("made").exists()


def test_the_command_prints_what_it_wrote(vicuna, tmp_path):
    out = tmp_path / "out.safetensors"
    pth = saved(tmp_path / "theirs.pth")
    command = [sys.executable, "-m", "convert", "trainables", str(pth)]
    done = subprocess.run(
        [*command, f"--checkpoint={vicuna}", f"--out={out}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "projector/kernel [20, 32] float32" in done.stderr
