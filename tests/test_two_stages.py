"""The way a user goes: published files, stage 1, stage 2, an answer, a .pth, and back."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convert import export, model
from minigpt4_jax import Generator, checkpoint, initial, train
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.request import GREEDY
from tests import parity, published, training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """frozen: a converted Vicuna of tiny sizes without projector; photos; two runs."""
    folder = tmp_path_factory.mktemp("stages")
    theirs = parity.Whole(published.VICUNA, seed=5)
    files = published.parts(folder / "files", published.VICUNA, theirs)
    preset = published.preset(folder, published.VICUNA)
    files["projector"] = None
    model.prepare(preset, files, no_projector=True).write(folder / "frozen")
    training.write_photos(folder / "data")
    assert run(folder, "stage1", "captions", "", text__clean="blip")
    assert run(folder, "stage2", "descriptions", str(folder / "stage1"))
    return folder


def run(folder, name: str, loss: str, init: str, **changes) -> bool:
    cfg = training.config(
        folder / "frozen",
        loss=loss,
        init=init,
        trainable=("projector/.*",),
        text__limit=30,
        text__captions="one",
        row__packed=300,
        optim__schedule="linear_warmup_cosine_lr",
        optim__warmup_lr=1e-6,
        optim__epoch_steps=4,
        optim__total_steps=6,
        eval_every=6,
        **changes,
    )
    return train.train(cfg, folder / name, devices=jax.devices()[:1])


def trained(folder, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / name / "trainables.safetensors")


def test_only_the_projector_is_trained_and_the_cache_holds_queries(folder):
    assert set(trained(folder, "stage2")) == {"projector/kernel", "projector/bias"}
    kept = [file.name.partition("-")[0] for file in (folder / "features").glob("*.npy")]
    assert kept == ["queries", "queries"]  # of the photos to train on, and of val


def test_stage_2_begins_where_stage_1_ended(folder):
    first, second = trained(folder, "stage1"), trained(folder, "stage2")
    for name, value in first.items():
        moved = np.abs(second[name] - value).max()
        assert 0 < moved < 0.1  # six steps of at most 0.01


def test_the_run_answers_over_the_frozen_weights_it_names(folder):
    generator = Generator.load(folder / "stage2")
    assert generator.model.cfg.template == "vicuna_v0"
    np.testing.assert_array_equal(
        generator.model.projector.bias[...], trained(folder, "stage2")["projector/bias"]
    )
    few = dataclasses.replace(GREEDY, max_tokens=5)
    request = dict(image=training.jpeg(1), sampling=few)
    answer = generator("What is it?", **request)
    assert answer == Generator.load(f"{folder / 'stage2'}@6")("What is it?", **request)
    before = Generator.load(f"{folder / 'stage2'}@4").model.projector.bias[...]
    assert (before != generator.model.projector.bias[...]).any()


def test_a_pth_of_the_run_begins_another_with_the_same_bits(folder, tmp_path):
    (pth,) = export.export(folder / "stage2", tmp_path / "ours.pth")
    held = torch.load(pth, weights_only=True)["model"]
    want = trained(folder, "stage2")
    assert torch.equal(
        held["llama_proj.bias"], torch.from_numpy(want["projector/bias"])
    )
    params = {name: jax.numpy.zeros(value.shape) for name, value in want.items()}
    found = initial.begin(params, str(pth), folder / "frozen")
    assert set(found) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("more", [True, False])
def test_what_begins_a_run_holds_exactly_what_it_trains(folder, more):
    shapes = checkpoint.parameter_shapes(checkpoint.read_config(folder / "frozen"))
    names = {"projector/kernel": 0, "projector/bias": 0}
    names = names | {"qformer/query_tokens": 0} if not more else {"projector/bias": 0}
    params = {name: jax.numpy.zeros(shapes[name]) for name in names}
    complaint = "no such parameter" if more else "qformer/query_tokens: absent"
    with pytest.raises(CheckpointError, match=f"config.init: (.|\n)*{complaint}"):
        initial.begin(params, str(folder / "stage1"), folder / "frozen")


def test_a_whole_model_begins_a_run_with_what_it_trains(folder):
    directory = folder / "frozen"
    shapes = checkpoint.parameter_shapes(checkpoint.read_config(directory))
    params = {"qformer/query_tokens": jax.numpy.zeros(shapes["qformer/query_tokens"])}
    found = initial.begin(params, str(directory), directory)
    assert list(found) == ["qformer/query_tokens"]
    assert np.abs(found["qformer/query_tokens"]).max() > 0
