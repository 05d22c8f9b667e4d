"""`python -m convert model`: every format in, the right model out, or one clear error."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from convert import casting, doctor, hashes, model
from minigpt4_jax import checkpoint, storage
from minigpt4_jax.errors import CheckpointError, InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.quantised import Quantisation
from minigpt4_jax.request import GREEDY, Request, user
from tests import parity, published

ROOT = Path(__file__).parent.parent


def sixteen_bit(theirs):
    """The peer with the values that a 16-bit file keeps of it."""
    for name, parameter in theirs.named_parameters():
        if name.startswith(("vision", "decoder")) and "post_layernorm" not in name:
            parameter.data.copy_(parameter.data.half().float())
    return theirs


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """(peer, files, preset) of a tiny MiniGPT-4 with a Q-Former and Vicuna's rows."""
    folder = tmp_path_factory.mktemp("vicuna")
    theirs = sixteen_bit(parity.Whole(published.VICUNA, seed=3))
    files = published.parts(folder, published.VICUNA, theirs)
    return theirs, files, published.preset(folder, published.VICUNA)


def stored(directory: Path) -> dict[str, np.ndarray]:
    shards = map(load_file, sorted(directory.glob("*.safetensors")))
    return {name: array for shard in shards for name, array in shard.items()}


def assert_same_model(directory: Path, theirs: parity.Whole, cfg):
    """Image embeddings and logits of a converted directory are those of the peer."""
    ours = checkpoint.load_model(directory, DTypes())
    pixels_BHWC = parity.normal(0, 2, cfg.vit.image_size, cfg.vit.image_size, 3)
    with torch.inference_mode():
        want_BQD = theirs.encode_image(pixels_BHWC)
        want_TV = theirs([1, 5], want_BQD[0], [7, 9, 11])
    encode = nnx.jit(lambda model, pixels: model.encode_image(pixels))
    got_BQD = encode(ours, jnp.asarray(pixels_BHWC))
    parity.assert_close(got_BQD, want_BQD)
    q = got_BQD.shape[1]
    ids_BT = jnp.array([[1, 5, *[0] * q, 7, 9, 11]])
    slots_BT = jnp.array([[False, False, *[True] * q, False, False, False]])
    got_BTV = parity.call(ours, ids_BT, slots_BT, got_BQD[:1])
    parity.assert_close(got_BTV[0], want_TV)


def test_the_published_files_of_a_vicuna_model_become_that_model(vicuna, tmp_path):
    theirs, files, preset = vicuna
    out = model.prepare(preset, files).write(tmp_path / "out")
    assert_same_model(out, theirs, published.VICUNA)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {source["part"] for source in manifest["sources"]} == set(files)
    assert all(len(source["sha256"]) == 64 for source in manifest["sources"])
    assert sum(manifest["left_out"]["vit"].values()) == 17  # block 39, norm and head


def test_keep_stores_each_tensor_as_in_its_file_but_norms_and_projector(
    vicuna, tmp_path
):
    _, files, preset = vicuna
    arrays = stored(model.prepare(preset, files).write(tmp_path / "out"))
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    assert dtypes["vit/blocks/attn/q/kernel"] == "float16"
    assert dtypes["llama/blocks/mlp/down/kernel"] == "float16"
    assert dtypes["qformer/layers/mlp/up/kernel"] == "float32"  # as its file has it
    for name in ("projector/kernel", "vit/blocks/norm1/bias", "llama/norm/scale"):
        assert dtypes[name] == "float32", name
    arrays = stored(
        model.prepare(preset, files, dtype="bfloat16").write(tmp_path / "b")
    )
    assert str(arrays["qformer/layers/mlp/up/kernel"].dtype) == "bfloat16"
    assert str(arrays["projector/bias"].dtype) == "float32"


@pytest.mark.parametrize("kind,shards", [("safetensors", 3), ("bin", 1)])
def test_odd_sizes_come_through_every_kind_of_folder(tmp_path, kind, shards):
    theirs = sixteen_bit(parity.Whole(published.ODD, seed=5))
    files = published.parts(tmp_path, published.ODD, theirs, kind=kind, shards=shards)
    preset = published.preset(tmp_path, published.ODD)
    out = model.prepare(preset, files).write(tmp_path / "out")
    assert_same_model(out, theirs, published.ODD)


def test_a_bfloat16_folder_stays_bfloat16_and_the_model_answers(tmp_path):
    theirs = parity.Whole(published.ODD, seed=5)
    half = dict(kind="safetensors", shards=1, dtype=torch.bfloat16)
    files = published.parts(tmp_path, published.ODD, theirs, **half)
    preset = published.preset(tmp_path, published.ODD)
    out = model.prepare(preset, files).write(tmp_path / "out")
    want = theirs.decoder.state_dict()["model.layers.1.mlp.up_proj.weight"].bfloat16()
    got = stored(out)["llama/blocks/mlp/up/kernel"][1]
    assert str(got.dtype) == "bfloat16"
    np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy().T)
    generator = Generator.load(out)
    image = np.zeros((9, 15, 3), np.uint8)
    sampling = dataclasses.replace(GREEDY, max_tokens=3)
    events = list(
        generator.submit([Request([user("a dog", image)], sampling=sampling)])
    )
    assert events[-1].error is None and events[-1].finish_reason in ("length", "stop")


@pytest.mark.parametrize("instruct", [False, True])
def test_a_hugging_face_blip2_gives_the_tower_and_the_qformer(
    vicuna, tmp_path, instruct, caplog, monkeypatch
):
    theirs, files, preset = vicuna
    folder = published.blip2_folder(tmp_path / "hf", theirs, instruct)
    given = files | {"vit": folder, "qformer": folder}
    made, hashed = model.prepare(preset, given), []
    assert instruct == ("out of InstructBLIP: good for training" in caplog.text)
    sha256 = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda f: hashed.append(f) or sha256(f))
    out = made.write(tmp_path / "out")
    assert_same_model(out, theirs, published.VICUNA)
    assert len(hashed) == len(set(hashed)) == 4  # the folder's file once, two shards


def test_a_tower_of_bare_names_and_a_path_from_home(vicuna, tmp_path, monkeypatch):
    theirs, files, preset = vicuna
    torch.save(theirs.vision.state_dict(), tmp_path / "tower.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(files["llama"], tmp_path / "llm")
    given = files | {"vit": "~/tower.pth", "llama": "~/llm"}
    out = model.prepare(preset, given).write(tmp_path / "out")
    assert_same_model(out, theirs, published.VICUNA)


def test_a_qformer_of_blip2s_first_stage_is_taken_with_a_word(vicuna, tmp_path, caplog):
    theirs, files, preset = vicuna
    state = published.blip2(theirs)["model"]
    state = {k: v for k, v in state.items() if not k.startswith("t5_proj")}
    state |= {"vision_proj.weight": torch.ones(3, 20), "temp": torch.ones(())}
    state |= {"text_proj.bias": torch.ones(3), "itm_head.weight": torch.ones(2, 20)}
    torch.save({"model": state}, tmp_path / "blip2_pretrained.pth")
    made = model.prepare(preset, files | {"qformer": tmp_path / "blip2_pretrained.pth"})
    assert "BLIP-2's first stage: good for training" in caplog.text
    assert_same_model(made.write(tmp_path / "out"), theirs, published.VICUNA)


def test_the_tower_inside_a_lavis_file_is_taken(vicuna, tmp_path):
    theirs, files, preset = vicuna
    whole = published.blip2(theirs)
    tower = {k: v for k, v in published.eva(theirs).items() if "head" not in k}
    whole["model"] |= {f"visual_encoder.{name}": v for name, v in tower.items()}
    torch.save(whole, tmp_path / "blip2.pth")
    given = files | dict.fromkeys(("vit", "qformer"), tmp_path / "blip2.pth")
    out = model.prepare(preset, given).write(tmp_path / "out")
    assert_same_model(out, theirs, published.VICUNA)


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_folders_are_joined_and_turned(tmp_path, shards):
    theirs = sixteen_bit(parity.Whole(published.ODD, seed=6))
    files = published.parts(tmp_path, published.ODD, theirs)
    files["llama"] = published.meta(
        tmp_path / "meta/7B", published.ODD.llama, theirs.decoder.state_dict(), shards
    )
    preset = published.preset(tmp_path, published.ODD)
    out = model.prepare(preset, files).write(tmp_path / "out")
    assert_same_model(out, theirs, published.ODD)


def test_without_a_qformer_ln_vision_is_ones_and_zeros_unless_the_checkpoint_has_it(
    tmp_path,
):
    cfg = published.STRIPS
    theirs = sixteen_bit(parity.Whole(cfg, seed=7))
    norm = theirs.vision.post_layernorm
    files = published.parts(tmp_path, cfg, theirs)
    preset = published.preset(tmp_path, cfg)
    held = published.checkpoint(
        theirs, **{"ln_vision.weight": norm.weight, "ln_vision.bias": norm.bias}
    )
    torch.save(held, tmp_path / "held.pth")
    with_norm = model.prepare(preset, files | {"projector": tmp_path / "held.pth"})
    assert_same_model(with_norm.write(tmp_path / "held"), theirs, cfg)
    norm.weight.data.fill_(1)
    norm.bias.data.fill_(0)
    assert_same_model(
        model.prepare(preset, files).write(tmp_path / "plain"), theirs, cfg
    )


def test_a_qformer_in_the_checkpoint_wins_over_blip2s(vicuna, tmp_path):
    theirs, files, preset = vicuna
    other = parity.Whole(published.VICUNA, seed=9)
    trained = {
        name: tensor
        for name, tensor in published.blip2(other)["model"].items()
        if "layer" in name
        and "intermediate." not in name
        or name in ("query_tokens", "Qformer.bert.embeddings.LayerNorm.weight")
        or name == "Qformer.bert.embeddings.LayerNorm.bias"
    }
    torch.save(published.checkpoint(theirs, **trained), tmp_path / "tuned.pth")
    out = model.prepare(preset, files | {"projector": tmp_path / "tuned.pth"}).write(
        tmp_path / "out"
    )
    got = stored(out)["qformer/query_tokens"]
    np.testing.assert_array_equal(got, other.queries.query_tokens[0].detach().numpy())


def test_a_delta_is_added_and_the_pad_rows_base_is_zero(vicuna, tmp_path):
    theirs, files, preset = vicuna
    whole = {k: v.half() for k, v in theirs.decoder.state_dict().items()}
    base, delta = {}, {}
    for name, tensor in whole.items():
        base[name] = (tensor + 0.01 * torch.randn_like(tensor)).half()
        delta[name] = tensor - base[name]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            delta[name][-1] = tensor[-1]
            base[name] = base[name][:-1]
    llama = published.VICUNA.llama
    published.hugging_face(tmp_path / "base", llama, base, kind="safetensors")
    published.hugging_face(tmp_path / "delta", llama, delta)
    given = files | {"llama": tmp_path / "base"}
    out = model.prepare(preset, given, delta=tmp_path / "delta").write(tmp_path / "out")
    got = stored(out)["llama/embed/embedding"]
    full = torch.cat([base["model.embed_tokens.weight"], torch.zeros(1, 32).half()])
    want = (full + delta["model.embed_tokens.weight"]).numpy()
    np.testing.assert_array_equal(got, want)

    from convert import vicuna as merge

    merged = merge.merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    again = model.prepare(preset, files | {"llama": merged}).write(tmp_path / "again")
    assert all(
        np.array_equal(array, stored(again)[name])
        for name, array in stored(out).items()
    )
    import transformers

    loaded = transformers.LlamaForCausalLM.from_pretrained(merged)
    np.testing.assert_array_equal(
        loaded.model.embed_tokens.weight.detach().half().numpy(), want
    )


def test_a_smaller_tower_is_resized_and_a_larger_one_is_refused(tmp_path, vicuna):
    theirs, files, _ = vicuna
    values = published.VICUNA.to_dict()
    values["vit"]["image_size"] = 70  # 5x5 patches of 14
    path = tmp_path / "larger.json"
    path.write_text(json.dumps({"format": 1, **values}))
    out = model.prepare(str(path), files).write(tmp_path / "out")
    assert stored(out)["vit/position_embedding"].shape == (26, 24)
    values["vit"]["image_size"] = 28
    path.write_text(json.dumps({"format": 1, **values}))
    with pytest.raises(CheckpointError, match="at 42 px, under a preset of 28 px"):
        model.prepare(str(path), files)


def test_a_preset_is_completed_from_the_tensors(tmp_path, vicuna):
    _, files, _ = vicuna
    values = published.VICUNA.to_dict()
    for tower, kept in (
        ("vit", ("num_heads", "eps", "ln_vision_eps")),
        ("qformer", ("num_heads",)),
        ("llama", ()),
    ):
        values[tower] = {key: values[tower][key] for key in kept}
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"format": 1, **values}))
    config = model.prepare(str(path), files).config
    assert config.vit == published.VICUNA.vit
    assert config.qformer == published.VICUNA.qformer
    assert config.llama == published.VICUNA.llama


def test_the_report_names_every_tensor_and_writes_nothing(vicuna, tmp_path):
    _, files, preset = vicuna
    command = [sys.executable, "-m", "convert", "model", "--report", "--preset", preset]
    command += ["--quantize=int4", "--vision=int8"]
    flags = {"llama": "llm"}
    command += [f"--{flags.get(part, part)}={path}" for part, path in files.items()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    how = Quantisation("int4", "int8")
    shapes = checkpoint.parameter_shapes(published.VICUNA, how)
    assert {line.split()[0] for line in lines if "<-" in line} == set(shapes)
    assert any(
        line.startswith("projector: beside:optimizer left out") for line in lines
    )
    refused = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == InputError.exit_code
    assert "needs --" in refused.stderr


def test_no_value_is_nan_and_nothing_half_written_stays(vicuna, tmp_path):
    theirs, files, preset = vicuna
    broken = published.eva(theirs)
    broken["blocks.1.mlp.fc2.weight"][3, 4] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    made = model.prepare(preset, files | {"vit": tmp_path / "nan.pth"})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc2\.weight holds NaN"):
        made.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pth"]


@pytest.mark.parametrize("piece", [1, 40])
def test_a_kill_leaves_no_directory_and_the_next_run_cleans_up(vicuna, tmp_path, piece):
    _, files, preset = vicuna
    out = tmp_path / "out"
    code = f"""
import itertools, os, signal
from convert import model
from minigpt4_jax import storage
pieces, count = storage._pieces, itertools.count()
def killed(array):
    if next(count) == {piece}:
        os.kill(os.getpid(), signal.SIGKILL)
    return pieces(array)
storage._pieces = killed
model.prepare({preset!r}, { ({k: str(v) for k, v in files.items()})!r}).write(
    model.Path({str(out)!r})
)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.part-")
    with pytest.raises(CheckpointError):
        checkpoint.load_model(left)
    model.prepare(preset, files).write(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_said_before_anything_is_written(vicuna, tmp_path, monkeypatch):
    _, files, preset = vicuna
    monkeypatch.setattr(
        storage.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})
    )
    with pytest.raises(CheckpointError, match="make room"):
        model.prepare(preset, files).write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_pieces_than_the_decoder_has_rows_is_refused(tmp_path):
    cfg = dataclasses.replace(
        published.STRIPS,
        llama=dataclasses.replace(published.STRIPS.llama, vocab_size=71),
    )
    files = published.parts(tmp_path, cfg, parity.Whole(cfg, seed=7))
    made = model.prepare(published.preset(tmp_path, cfg), files)
    with pytest.raises(CheckpointError, match="pieces for the 71 rows"):
        made.write(tmp_path / "out")


def test_frozen_weights_alone_are_for_training_a_projector(vicuna, tmp_path):
    _, files, preset = vicuna
    frozen = {part: path for part, path in files.items() if part != "projector"}
    with pytest.raises(InputError, match="needs --projector too"):
        model.prepare(preset, frozen)
    out = model.prepare(preset, frozen, no_projector=True).write(tmp_path / "out")
    assert not any(name.startswith("projector/") for name in stored(out))
    with pytest.raises(CheckpointError, match="projector/kernel: absent"):
        checkpoint.load_model(out)
    assert doctor.examine([out]).problems == []
    drawn = checkpoint.load_model(out, absent=(r"projector/.*",), seed=3)
    assert np.asarray(drawn.projector.kernel[...]).std() > 0


def test_wrong_dtypes_are_named(vicuna, tmp_path):
    theirs, files, preset = vicuna
    ints = published.eva(theirs)
    ints["blocks.1.mlp.fc2.weight"] = torch.ones(24, 37, dtype=torch.int64)
    torch.save(ints, tmp_path / "ints.pth")
    with pytest.raises(CheckpointError, match=r"fc2\.weight is int64; want floats"):
        model.prepare(preset, files | {"vit": tmp_path / "ints.pth"}).arrays()
    mixed = published.eva(theirs)
    mixed["blocks.1.mlp.fc2.weight"] = mixed["blocks.1.mlp.fc2.weight"].float()
    torch.save(mixed, tmp_path / "mixed.pth")
    made = model.prepare(preset, files | {"vit": tmp_path / "mixed.pth"})
    with pytest.raises(CheckpointError, match="mixes dtypes"):
        made.arrays()
    made.dtype = "float32"
    assert made.arrays()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_is_told_by_its_bits(dtype):
    values = np.asarray(jnp.array([1e-7, -3e4, 0.0, 65504.0 / 2], dtype))
    assert casting.finite(values)
    for bad in (np.nan, np.inf, -np.inf):
        assert not casting.finite(np.asarray(jnp.array([1.0, bad], dtype)))
