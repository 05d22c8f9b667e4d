"""`python -m convert export`: the published files again, bit for bit, or said in the log."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from convert import export, llama, model, qformer, reverse, vit
from minigpt4_jax import checkpoint, storage
from minigpt4_jax.errors import CheckpointError, InputError
from minigpt4_jax.models.layers import DTypes
from tests import parity, published, tiny, training

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["VICUNA", "STRIPS"])
def converted(request, tmp_path_factory):
    """(peer, files, directory) of a tiny model, with and without a Q-Former."""
    cfg = getattr(published, request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = parity.Whole(cfg, seed=3)
    files = published.parts(folder, cfg, theirs)
    preset = published.preset(folder, cfg)
    return theirs, files, model.prepare(preset, files).write(folder / "model")


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """(peer, files, preset, directory) of the tiny Vicuna."""
    folder = tmp_path_factory.mktemp("vicuna")
    theirs = parity.Whole(published.VICUNA, seed=4)
    files = published.parts(folder, published.VICUNA, theirs)
    preset = published.preset(folder, published.VICUNA)
    made = model.prepare(preset, files).write(folder / "model")
    return theirs, files, preset, made


def loaded(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(got: dict, want: dict):
    """The same names, dtypes and bits."""
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def decoder(folder: Path) -> dict:
    shards = map(load_file, sorted(folder.glob("model-*.safetensors")))
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def weights(theirs: parity.Whole) -> dict:
    """The decoder's 16-bit file."""
    return {name: t.half() for name, t in theirs.decoder.state_dict().items()}


def workdir(path: Path, base: Path, params: dict) -> Path:
    """What a run that trained these parameters leaves."""
    path.mkdir()
    run = {"format": 1, "checkpoint": str(base), "config": {"seed": 3}}
    (path / "config.json").write_text(json.dumps(run))
    storage.save_trainables(path, params)
    return path


def test_a_projector_comes_back_bit_for_bit_and_the_reference_takes_it(
    converted, tmp_path
):
    theirs, files, directory = converted
    (out,) = export.export(directory, tmp_path / "new/out.pth")
    held = loaded(out)
    want = loaded(files["projector"])["model"]
    assert_same(held["model"], {k: v for k, v in want.items() if "llama_proj" in k})
    assert held["model"]["llama_proj.weight"].dtype == torch.float32
    assert held["epoch"] == 0 and held["config"]["model"]["name"].startswith("tiny")

    fresh = parity.Whole(getattr(published, directory.parent.name[:6]), seed=9)
    report = fresh.load_state_dict(held["model"], strict=False)
    assert report.unexpected_keys == []
    assert torch.equal(fresh.llama_proj.weight, theirs.llama_proj.weight)


def test_a_decoder_comes_back_bit_for_bit_and_transformers_runs_it(converted, tmp_path):
    theirs, files, directory = converted
    export.export(directory, tmp_path / "out.pth", tmp_path / "llm")
    want = weights(theirs)
    assert_same(decoder(tmp_path / "llm"), want)
    old, new = (
        (folder / "tokenizer.model").read_bytes()
        for folder in (files["llama"], tmp_path / "llm")
    )
    assert old == new

    theirs = parity.llama(checkpoint.read_config(directory).llama)
    theirs.load_state_dict({name: tensor.float() for name, tensor in want.items()})
    ours = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "llm", dtype=torch.float32, attn_implementation="eager"
    )
    ids_BT = torch.tensor([[1, 5, 17, 40, 2]])
    with torch.inference_mode():
        assert torch.equal(ours(ids_BT).logits, theirs(ids_BT).logits)


def test_rotary_base_tied_embeddings_and_grouped_keys_are_in_config_json(tmp_path):
    llm = dataclasses.replace(
        published.ODD.llama, rope_theta=500.0, tie_embeddings=True, max_positions=64
    )
    cfg = dataclasses.replace(published.ODD, llama=llm, eos_ids=(2, 7))
    ours, theirs = parity.minigpt4(cfg, seed=6)
    files = {"tokenizer.json": tiny.tokenizer_json().encode()}
    checkpoint.save_directory(
        tmp_path / "model", training.arrays(ours), cfg, files, {"dtype": "float32"}
    )
    export.export(tmp_path / "model", tmp_path / "out.pth", tmp_path / "llm")
    assert "lm_head.weight" not in decoder(tmp_path / "llm")
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "llm", attn_implementation="eager"
    )
    assert again.config.eos_token_id == [2, 7] and again.dtype == torch.float32
    ids_BT = torch.arange(50)[None]
    with torch.inference_mode():
        want = theirs.decoder(ids_BT).logits
        assert torch.equal(again(ids_BT).logits, want)


def test_what_a_checkpoint_held_besides_its_projector_comes_back_too(vicuna, tmp_path):
    theirs, files, preset, _ = vicuna
    other = parity.Whole(published.VICUNA, seed=9)
    queries = {
        name: tensor
        for name, tensor in published.blip2(other)["model"].items()
        if name.startswith(("Qformer.bert.enc", "Qformer.bert.embeddings.L", "query"))
        and "intermediate." not in name
    }
    held = queries | {
        "visual_encoder." + name: tensor
        for name, tensor in published.eva(other).items()
        if not name.startswith(("blocks.39", "norm", "head"))
    }
    torch.save(published.checkpoint(theirs, **held), tmp_path / "tuned.pth")
    given = files | {"projector": tmp_path / "tuned.pth"}
    made = model.prepare(preset, given).write(tmp_path / "model")
    (out,) = export.export(made, tmp_path / "out.pth")
    projector = {
        f"llama_proj.{k}": v for k, v in theirs.llama_proj.state_dict().items()
    }
    assert_same(loaded(out)["model"], held | projector)


def test_ln_vision_of_a_checkpoint_without_qformer_comes_back(tmp_path):
    cfg = published.STRIPS
    theirs = parity.Whole(cfg, seed=7)
    files = published.parts(tmp_path, cfg, theirs)
    norm = theirs.vision.post_layernorm
    held = {"ln_vision.weight": norm.weight.data, "ln_vision.bias": norm.bias.data}
    torch.save(published.checkpoint(theirs, **held), files["projector"])
    made = model.prepare(published.preset(tmp_path, cfg), files).write(tmp_path / "out")
    (out,) = export.export(made, tmp_path / "out.pth")
    got = loaded(out)["model"]
    assert_same({k: v for k, v in got.items() if k in held}, held)


def test_a_trained_projector_gives_the_same_outputs_in_torch(vicuna, tmp_path):
    *_, directory = vicuna
    cfg = published.VICUNA
    shapes = checkpoint.parameter_shapes(cfg)
    params = {
        path: parity.normal(index, *shapes[path]) / 5
        for index, path in enumerate(p for p in shapes if p.startswith("projector/"))
    }
    run = workdir(tmp_path / "run", directory, params)
    (out,) = export.export(run, tmp_path / "out.pth")
    held = loaded(out)
    assert set(held["model"]) == {"llama_proj.weight", "llama_proj.bias"}
    assert held["config"]["run"] == {"seed": 3}
    linear = torch.nn.Linear(cfg.projector_width, cfg.llama.width)
    linear.weight.data = held["model"]["llama_proj.weight"]
    linear.bias.data = held["model"]["llama_proj.bias"]
    queries_BQD = parity.normal(0, 2, cfg.num_slots, cfg.projector_width)
    ours = checkpoint.load_model(run, DTypes())
    with torch.inference_mode():
        want = linear(torch.from_numpy(queries_BQD))
    parity.assert_close(ours.projector(jnp.asarray(queries_BQD)), want)


def test_all_that_was_trained_is_in_the_file_and_converts_to_itself(vicuna, tmp_path):
    _, files, preset, directory = vicuna
    shapes = checkpoint.parameter_shapes(published.VICUNA)
    rooms = ("projector/", "qformer/", "ln_vision/", "vit/blocks/attn/q/")
    trained = {
        path: parity.normal(index, *shape)
        for index, (path, shape) in enumerate(shapes.items())
        if path.startswith(rooms)
    }
    run = workdir(tmp_path / "run", directory, trained)
    (out,) = export.export(run, tmp_path / "out.pth")
    names = set(loaded(out)["model"])
    assert "Qformer.bert.encoder.layer.2.crossattention.self.key.weight" in names
    assert "Qformer.bert.encoder.layer.1.crossattention.self.key.weight" not in names
    assert {"query_tokens", "ln_vision.weight"} <= names
    # A fused weight is whole: k and v are those of the frozen tower.
    fused = loaded(out)["model"]["visual_encoder.blocks.2.attn.qkv.weight"]
    frozen = published.eva(vicuna[0])["blocks.2.attn.qkv.weight"]
    assert torch.equal(fused[24:], frozen[24:].float())
    assert not torch.equal(fused[:24], frozen[:24].float())

    tuned = {k: v for k, v in loaded(out)["model"].items() if "visual" not in k}
    torch.save({"model": tuned}, tmp_path / "tuned.pth")
    again = model.prepare(preset, files | {"projector": tmp_path / "tuned.pth"})
    arrays = {
        path: np.concatenate([np.atleast_1d(piece) for piece in array.pieces()])
        for path, array in again.arrays().items()
        if path.startswith(rooms[:3])
    }
    for path, array in arrays.items():
        want = trained[path].reshape(array.shape)
        np.testing.assert_array_equal(array, want, err_msg=path)


def test_after_a_cast_that_loses_bits_it_is_said(vicuna, tmp_path, caplog):
    theirs, files, preset, _ = vicuna
    made = model.prepare(preset, files, dtype="bfloat16").write(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "convert"):
        export.export(made, tmp_path / "a.pth")
        assert "values are not" not in caplog.text  # a projector is always float32
        export.export(made, tmp_path / "b.pth", tmp_path / "llm")
    assert "--dtype bfloat16: 9 parameters (llama/blocks/attn/k/kernel" in caplog.text
    assert "float16, so values are not those of the source" in caplog.text
    got, want = decoder(tmp_path / "llm"), weights(theirs)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(got[name], want[name].float().bfloat16())
    assert torch.equal(got["model.norm.weight"], want["model.norm.weight"])


def test_a_cast_that_loses_nothing_is_undone(vicuna, tmp_path, caplog):
    theirs, files, preset, _ = vicuna
    made = model.prepare(preset, files, dtype="float32").write(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "convert"):
        export.export(made, tmp_path / "out.pth", tmp_path / "llm")
    assert caplog.text == ""
    assert_same(decoder(tmp_path / "llm"), weights(theirs))


def test_values_that_the_source_cannot_have_held_are_an_error(vicuna, tmp_path):
    *_, directory = vicuna
    made = tmp_path / "model"
    made.mkdir()
    for file in directory.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["source_dtypes"]["llama/norm/scale"] = "bfloat16"
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="model.norm.weight: float32 values that"):
        export.export(made, tmp_path / "out.pth", tmp_path / "llm")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_the_layer_that_is_asked_for_is_read():
    class Recorded:
        def __init__(self):
            self.read = []

        def __getitem__(self, index):
            self.read.append(index)
            return np.ones((32, 4, 8), np.float16)

    stored = {"llama/blocks/attn/q/kernel": Recorded()}
    wanted = {"llama/blocks/attn/q/kernel": (3, 32, 4, 8)}
    made = reverse.origins(llama.HF, wanted)
    tensor = made[2].tensor(stored, dict.fromkeys(wanted, np.float16))
    assert stored["llama/blocks/attn/q/kernel"].read == []
    assert np.asarray(tensor).shape == tensor.shape == (32, 32)
    assert stored["llama/blocks/attn/q/kernel"].read == [2]


@pytest.mark.parametrize("table", [llama.HF, qformer.LAVIS, qformer.PROJECTOR, vit.EVA])
def test_every_row_of_an_exported_table_spells_one_name(table):
    rows = [row for row in table if isinstance(row, reverse.Rule)]
    names = [reverse.spelled(row.pattern, 7) for row in rows]
    # Only the three parts of a fused weight share one.
    assert len(set(names)) == len({row.pattern for row in rows})
    assert not any(set(name) & set("()?|\\*") for name in names)


def test_a_tower_that_the_reference_does_not_have_is_refused():
    shapes = {"vit/blocks/layer_scale1": (2, 5), "vit/class_token": (5,)}
    with pytest.raises(CheckpointError, match="no name for 1 .*: vit/blocks/layer_s"):
        reverse.origins(vit.EVA, shapes)


def test_the_demos_kind_of_run_is_exported_under_lavis_names(tmp_path):
    frozen = training.write_frozen(tmp_path / "frozen")
    params = {
        name: value
        for name, value in training.arrays(tiny.model(5)).items()
        if name.startswith(("qformer/", "projector/"))
    }
    run = workdir(tmp_path / "run", frozen, params)
    (out,) = export.export(run, tmp_path / "out.pth")
    got = loaded(out)["model"]
    # Every layer of this one looks at the image.
    key = got["Qformer.bert.encoder.layer.1.crossattention.self.key.weight"]
    kernel_DNK = params["qformer/cross/attn/k/kernel"][1]
    np.testing.assert_array_equal(key.numpy(), kernel_DNK.reshape(20, -1).T)


def test_refusals_leave_nothing_behind(vicuna, tmp_path):
    *_, directory = vicuna
    (tmp_path / "old.pth").touch()
    (tmp_path / "old").mkdir()
    for out, llm in (("old.pth", None), ("new.pth", "old")):
        llm = llm and tmp_path / llm
        with pytest.raises(InputError, match="exists; name another"):
            export.export(directory, tmp_path / out, llm)
    with pytest.raises(CheckpointError, match="no directory at"):
        export.export(tmp_path / "absent", tmp_path / "new.pth")
    frozen = training.write_frozen(tmp_path / "frozen")
    with pytest.raises(CheckpointError, match="projector/kernel: absent"):
        export.export(frozen, tmp_path / "new.pth")
    path = "llama/norm/scale"
    run = workdir(tmp_path / "run", directory, {path: np.ones(32, np.float32)})
    with pytest.raises(InputError, match=r"trained llama/norm/scale.*add --llm OUTDIR"):
        export.export(run, tmp_path / "new.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["old.pth", "old", "frozen", "run"]
    )


def test_a_trained_decoder_goes_into_its_folder_and_not_into_the_file(vicuna, tmp_path):
    theirs, *_, directory = vicuna
    scale = parity.normal(0, 32)
    run = workdir(tmp_path / "run", directory, {"llama/norm/scale": scale})
    export.export(run, tmp_path / "out.pth", tmp_path / "llm")
    got = decoder(tmp_path / "llm")
    np.testing.assert_array_equal(got["model.norm.weight"].numpy(), scale)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(got[name], weights(theirs)[name])
    assert set(loaded(tmp_path / "out.pth")["model"]) == {
        "llama_proj.weight",
        "llama_proj.bias",
    }


def test_a_decoder_is_written_alone(vicuna, tmp_path):
    theirs, *_, directory = vicuna
    assert export.export(directory, None, tmp_path / "llm") == [tmp_path / "llm"]
    assert_same(decoder(tmp_path / "llm"), weights(theirs))
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_a_full_disk_is_said_and_nothing_is_left(vicuna, tmp_path, monkeypatch):
    *_, directory = vicuna
    monkeypatch.setattr(
        storage.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})
    )
    with pytest.raises(CheckpointError, match="make room"):
        export.export(directory, tmp_path / "out.pth", tmp_path / "llm")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_what_it_wrote(vicuna, tmp_path):
    *_, directory = vicuna
    command = [sys.executable, "-m", "convert", "export", f"--checkpoint={directory}"]
    out, llm = tmp_path / "out.pth", tmp_path / "llm"
    run = subprocess.run(
        [*command, f"--out={out}", f"--llm={llm}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(out), str(llm)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == InputError.exit_code
    assert "--out or --llm" in refused.stderr
