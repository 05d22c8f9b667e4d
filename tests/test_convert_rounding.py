"""`convert model --quantize`: the bits of rounding at load, and never all the floats."""

import json

import numpy as np
import pytest
from flax import nnx

from convert import doctor, export, model, selftest
from minigpt4_jax import checkpoint, storage
from minigpt4_jax.errors import CheckpointError, ConfigError
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.quantised import Quantisation
from tests import parity, published, tiny

INT4 = Quantisation("int4", "int8")


def values(made) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(made, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(param[...]) for path, param in flat}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(files, preset) of a tiny model in 16 bits."""
    folder = tmp_path_factory.mktemp("files")
    theirs = parity.Whole(published.ODD, seed=5)
    files = published.parts(folder, published.ODD, theirs)
    return files, published.preset(folder, published.ODD)


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    given, preset = files
    return model.prepare(preset, given).write(tmp_path_factory.mktemp("plain") / "m")


@pytest.fixture(scope="module")
def small(files, tmp_path_factory):
    """The same in int4, its ViT in int8."""
    given, preset = files
    made = model.prepare(preset, given, quantisation=INT4)
    return made.write(tmp_path_factory.mktemp("small") / "m")


@pytest.mark.parametrize("how", [Quantisation("int8"), INT4])
def test_the_bits_are_those_of_rounding_at_load(how, files, plain, tmp_path):
    given, preset = files
    out = model.prepare(preset, given, quantisation=how).write(tmp_path / "out")
    assert checkpoint.stored_quantisation(out) == how
    got = values(checkpoint.load_model(out))
    want = values(checkpoint.load_model(plain, quantisation=how))
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert got["llama/blocks/mlp/up/kernel"].dtype == (
        np.int8 if how.decoder == "int8" else np.uint8
    )


def test_no_word_is_needed_at_load_and_another_kind_is_refused(small, plain):
    gen = Generator.load(small, kv="int8")
    asked = Generator.load(plain, quantize="int4", vision="int8", kv="int8")
    assert gen.need.weights == asked.need.weights
    assert gen.need.quantisation == Quantisation("int4", "int8", "int8")
    Generator.load(small, quantize="int4")  # as it is stored
    with pytest.raises(ConfigError, match="quantize='int8'.* is stored in int4; leave"):
        Generator.load(small, quantize="int8")


def test_what_is_stored_as_floats_can_still_be_rounded_at_load(files, plain, tmp_path):
    given, preset = files
    eight = Quantisation("", "int8")
    out = model.prepare(preset, given, quantisation=eight).write(tmp_path / "out")
    both = Quantisation("int8", "int8")
    got = values(checkpoint.load_model(out, quantisation=Quantisation("int8")))
    want = values(checkpoint.load_model(plain, quantisation=both))
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_weights_as_they_are_stored_stay_so(small):
    held = values(checkpoint.load_model(small, DTypes(param="file")))
    assert held["llama/blocks/mlp/up/kernel"].dtype == np.uint8
    assert held["llama/blocks/mlp/up/kernel_scale"].dtype == np.float16
    assert held["qformer/layers/mlp/up/kernel"].dtype == np.float32


def test_each_layer_is_read_once_and_written_before_the_next_but_one(files, tmp_path):
    given, preset = files
    made = model.prepare(preset, given, quantisation=Quantisation("int8"))
    name = "llama/blocks/mlp/up/kernel"
    _, fill = made.fills[name]
    source, read = made.files["llama"], []
    for tensor in fill.sources:
        old = source.tensors[tensor]

        class Told(type(old)):
            def __array__(self, *args, own=tensor, **kwargs):
                read.append(own)
                return super().__array__(*args, **kwargs)

        source.tensors[tensor] = Told(old.shape, old.dtype, old.read)
    arrays = made.arrays()
    two = {path: arrays[path] for path in (name, f"{name}_scale")}
    pieces = two[name].pieces()
    next(iter(pieces))
    assert read == fill.sources[:1]
    read.clear()
    storage.write_safetensors(tmp_path / "x.safetensors", two)
    assert read == fill.sources  # the scales did not read again
    assert sum(len(list(two[f"{name}_scale"].pieces())) for _ in range(2)) == 4


def test_the_manifest_and_the_report_say_so(files, small):
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["quantised"] == {"decoder": "int4", "vision": "int8"}
    assert manifest["dtypes"]["llama/blocks/mlp/up/kernel"] == "uint8"
    given, preset = files
    lines = model.prepare(preset, given, quantisation=INT4).report()
    (scale,) = [x for x in lines if x.startswith("llama/blocks/mlp/up/kernel_scale")]
    assert "float16 <- of llama/blocks/mlp/up/kernel, which is rounded" in scale


def test_the_doctor_names_the_bits_and_its_tests_run(tmp_path, capsys):
    plain = tiny.save(tmp_path / "plain")
    stored = values(checkpoint.load_model(plain, quantisation=INT4))
    manifest = {"quantised": {"decoder": "int4", "vision": "int8"}}
    tokenizer = {"tokenizer.json": tiny.tokenizer_json().encode()}
    storage.save_directory(tmp_path / "few", stored, tiny.CONFIG, tokenizer, manifest)
    found = doctor.examine([tmp_path / "few"])
    said = capsys.readouterr().out
    assert "its decoder in int4, its ViT in int8" in said
    assert "passed: stored values" in said and "passed: image" in said
    assert all("perplexity" in x or "stop string" in x for x in found.problems)


def test_a_scale_that_is_not_finite_is_found(small, tmp_path):
    stored = values(checkpoint.load_model(small, DTypes(param="file")))
    scales = stored["llama/blocks/mlp/up/kernel_scale"].copy()
    scales.flat[0] = np.inf
    stored["llama/blocks/mlp/up/kernel_scale"] = scales
    manifest = json.loads((small / "manifest.json").read_text())
    storage.save_directory(
        tmp_path / "bad", stored, checkpoint.read_config(small), {}, manifest
    )
    result = selftest.stored(tmp_path / "bad")
    assert result.state == selftest.FAILED and "up/kernel_scale" in result.says


def test_a_decoder_in_few_bits_is_not_exported_and_the_projector_is(small, tmp_path):
    with pytest.raises(CheckpointError, match="without --quantize"):
        export.export(small, None, tmp_path / "llm")
    assert export.export(small, tmp_path / "out.pth") == [tmp_path / "out.pth"]


def test_floats_are_not_read_into_whole_numbers(small, plain):
    loaded = checkpoint.load_model(plain, quantisation=Quantisation("int8"))
    before = values(loaded)["llama/blocks/mlp/up/kernel"]
    with pytest.raises(CheckpointError):
        checkpoint.load_trainables(loaded, plain)
    np.testing.assert_array_equal(values(loaded)["llama/blocks/mlp/up/kernel"], before)
    assert checkpoint.load_trainables(checkpoint.load_model(small), small)


def test_a_manifest_that_says_nonsense_is_damaged(plain, tmp_path):
    manifest = json.loads((plain / "manifest.json").read_text())
    for wrong in ({"decoder": "int5"}, {"text": "int8"}, ["int8"]):
        folder = tmp_path / str(len(str(wrong)))
        folder.mkdir()
        (folder / "preset.json").write_text("{}")
        text = json.dumps(manifest | {"quantised": wrong})
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="quantised is .*; convert again"):
            checkpoint.stored_quantisation(folder)
