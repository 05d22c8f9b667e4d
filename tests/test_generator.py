"""The Python interface: call, stream, chat, load."""

import dataclasses
import json

import jax
import pytest
import tiny
from flax import nnx

from minigpt4_jax.errors import CheckpointError, ConfigError, InputError
from minigpt4_jax.generator import Generator
from minigpt4_jax.request import GREEDY, Sampling

SHORT = dataclasses.replace(GREEDY, max_tokens=8)


@pytest.fixture(scope="module")
def gen():
    return Generator(tiny.model(), tiny.tokenizer(), batch_size=1, chunk=3)


def test_streamed_pieces_join_to_the_answer(gen):
    pieces = list(gen.stream("What is it?", tiny.image(), sampling=SHORT))
    assert len(pieces) > 1
    assert "".join(pieces) == gen("What is it?", image=tiny.image(), sampling=SHORT)


def test_calls_are_greedy_unless_asked(gen):
    ask = dict(image=tiny.image(), sampling=SHORT)
    assert gen("Hm?", **ask) == gen("Hm?", **ask, seed=9)
    drawn = Sampling(temperature=1.5, max_tokens=8)
    answers = {gen("Hm?", tiny.image(), sampling=drawn, seed=s) for s in (1, 1, 2)}
    assert len(answers) == 2


def test_the_image_changes_the_answer_and_none_is_needed(gen):
    answers = {gen("Hm?", image, sampling=SHORT) for image in (tiny.image(0), None)}
    assert len(answers) == 2


def test_an_unreadable_image_raises(gen, tmp_path):
    with pytest.raises(InputError, match="gone.jpg"):
        gen("Hm?", tmp_path / "gone.jpg")


def test_loading_a_converted_directory_gives_the_same_answers(gen, tmp_path):
    directory = tiny.save(tmp_path / "tiny")
    was = jax.config.jax_compilation_cache_dir
    loaded = Generator.load(directory, batch_size=1, chunk=3)
    assert loaded.model.cfg == tiny.CONFIG
    assert isinstance(loaded.model, nnx.Module)
    ask = dict(image=tiny.image(), sampling=SHORT)
    assert loaded("Hm?", **ask) == gen("Hm?", **ask)
    assert jax.config.jax_compilation_cache_dir is not None
    jax.config.update("jax_compilation_cache_dir", was)


def test_a_model_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="convert"):
        Generator.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="demo"):
        Generator.load("demmo")


def test_a_run_of_a_newer_format_is_not_loaded(tmp_path):
    run = {"format": 2, "checkpoint": str(tiny.save(tmp_path / "tiny"))}
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match="config.json: got format 2.*update"):
        Generator.load(tmp_path)


def test_the_model_is_a_plain_module(gen):
    pixels_BHWC = jax.numpy.zeros((1, 12, 12, 3))
    image_BQD = gen.model.encode_image(pixels_BHWC)
    Q, D = tiny.CONFIG.num_slots, tiny.CONFIG.llama.width
    assert image_BQD.shape == (1, Q, D)
    ids_BT = jax.numpy.array([[1, 5, 6, 7, 8]])
    slots_BT = jax.numpy.array([[False, True, True, True, False]])
    logits_BTV = gen.model(ids_BT, slots_BT, image_BQD)
    assert logits_BTV.shape == (1, 5, tiny.VOCABULARY)


def test_settings_that_would_never_end_or_mean_something_else_are_refused(gen):
    for name in ("batch_size", "chunk"):
        with pytest.raises(ConfigError, match=f"{name}: got 0"):
            Generator(gen.model, gen.tokenizer, **{name: 0})
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        Generator.load("demo", dtype="bfloat")


def test_a_quantised_model_is_loaded_and_answers(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path))
    saved = tiny.save(tmp_path / "model")
    with caplog.at_level("INFO", "minigpt4_jax"):
        loaded = Generator.load(saved, quantize="int4", vision="int8", kv="int8")
    assert loaded.model.llama.blocks[0].mlp.up.kernel.dtype == "uint8"
    assert "rows of 1024 tokens" in caplog.text and "uint8" in caplog.text
    assert loaded("Hm?", tiny.image(), sampling=SHORT)
    with pytest.raises(ConfigError, match="int8"):
        Generator.load(saved, quantize="int3")
