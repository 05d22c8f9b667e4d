"""Converted directories and trainables: exact round trips, and errors that say what to do."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from minigpt4_jax import checkpoint, locate, sharding, storage
from minigpt4_jax.errors import CheckpointError, ConfigError
from minigpt4_jax.models.layers import DTypes
from minigpt4_jax.models.minigpt4 import PRESETS
from minigpt4_jax.models.quantised import Quantisation
from tests import tiny

CONNECTOR = ("qformer/.*", "projector/.*")


def values(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(param[...]) for path, param in flat}


def frozen_part(arrays: dict) -> dict:
    return {k: v for k, v in arrays.items() if k.split("/")[0] in ("vit", "llama")} | {
        k: v for k, v in arrays.items() if k.startswith("ln_vision")
    }


def save(path, arrays, config=tiny.CONFIG):
    tokenizer = {"tokenizer.json": tiny.tokenizer_json().encode()}
    storage.save_directory(path, arrays, config, tokenizer, {"sources": []})
    return path


@pytest.fixture(scope="module")
def arrays():
    """Every weight of a tiny model, biases and norms random too."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(value.shape).astype(np.float32)
        for name, value in values(tiny.model()).items()
    }


@pytest.fixture
def directory(arrays, tmp_path):
    return save(tmp_path / "model", arrays)


def edit(path, **changes):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def work_directory(path, base, params):
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"format": 1, "checkpoint": str(base), "config": {}})
    )
    if params is not None:
        storage.save_trainables(path, params)
    return path


def test_a_saved_model_loads_bit_for_bit(arrays, directory):
    loaded = values(checkpoint.load_model(directory))
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert checkpoint.read_config(directory) == tiny.CONFIG


def test_a_directory_without_a_qformer_loads(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, qformer=None, patches_per_token=3)
    shapes = checkpoint.parameter_shapes(config)
    assert shapes["projector/kernel"] == (60, 24)
    save(tmp_path / "m", {k: np.ones(s, np.float32) for k, s in shapes.items()}, config)
    assert checkpoint.load_model(tmp_path / "m").qformer is None


def test_bfloat16_is_stored_and_cast_as_asked(arrays, tmp_path):
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in arrays.items()}
    half["llama/norm/scale"] = arrays["llama/norm/scale"]
    save(tmp_path / "half", half)
    as_stored = values(checkpoint.load_model(tmp_path / "half", DTypes(param="file")))
    wide = values(checkpoint.load_model(tmp_path / "half"))
    for name, array in half.items():
        assert as_stored[name].dtype == array.dtype, name
        np.testing.assert_array_equal(wide[name], array.astype(np.float32))
    assert {a.dtype for a in wide.values()} == {np.dtype(np.float32)}


def test_every_device_reads_only_its_own_part(arrays, directory):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = checkpoint.load_model(directory, mesh=mesh)
    kernel = model.llama.blocks.mlp.up.kernel[...]
    assert kernel.sharding == sharding.parameter_sharding(
        "llama/blocks/mlp/up/kernel", kernel.shape, mesh
    )
    assert kernel.addressable_shards[0].data.shape == (2, 12, 17)
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_parameters_that_may_be_absent_are_drawn_and_listed(arrays, tmp_path, caplog):
    save(tmp_path / "frozen", frozen_part(arrays))
    with caplog.at_level("INFO"):
        model = checkpoint.load_model(tmp_path / "frozen", absent=CONNECTOR, seed=3)
    assert "qformer/query_tokens" in caplog.text and "llama/" not in caplog.text
    again = checkpoint.load_model(tmp_path / "frozen", absent=CONNECTOR, seed=3)
    other = checkpoint.load_model(tmp_path / "frozen", absent=CONNECTOR, seed=4)
    kernels = [np.asarray(m.projector.kernel[...]) for m in (model, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert kernels[0].std() > 0 and not np.array_equal(kernels[0], kernels[2])
    np.testing.assert_array_equal(
        values(model)["llama/norm/scale"], arrays["llama/norm/scale"]
    )
    with pytest.raises(CheckpointError, match="qformer/query_tokens: absent"):
        checkpoint.load_model(tmp_path / "frozen", absent=("projector/.*",))


def test_one_error_lists_absent_unknown_and_misshaped(arrays, tmp_path):
    bad = dict(arrays)
    del bad["ln_vision/bias"]
    bad["llama/blocks/attn/q/kernel"] = bad["llama/blocks/attn/q/kernel"][:, :, :2]
    bad["extra"] = np.zeros((2, 5), np.float32)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_model(save(tmp_path / "bad", bad))
    text = str(error.value)
    assert "3 problems" in text and "ln_vision/bias: absent" in text
    assert "extra [2, 5]: the model has no such parameter" in text
    assert "attn/q/kernel: got [2, 24, 2, 10], want [2, 24, 4, 10]" in text


def test_an_absent_directory_says_what_makes_one(tmp_path):
    with pytest.raises(CheckpointError, match="python -m convert"):
        checkpoint.load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file", ["preset.json", "manifest.json", "model.safetensors.index.json"]
)
def test_a_directory_that_lacks_a_file_is_refused(directory, file):
    (directory / file).unlink()
    with pytest.raises(CheckpointError, match="absent.*convert"):
        checkpoint.load_model(directory)


def test_a_truncated_shard_is_refused(directory):
    shard = next(directory.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{shard.name}.*delete"):
        checkpoint.load_model(directory)


def test_a_scrambled_shard_is_refused(directory):
    shard = next(directory.glob("*.safetensors"))
    with open(shard, "r+b") as file:
        file.write(b"\xff" * 16)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_model(directory)


def test_damaged_json_is_refused(directory):
    (directory / "preset.json").write_text('{"format": 1, "name": ')
    with pytest.raises(CheckpointError, match="preset.json is damaged"):
        checkpoint.read_config(directory)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        (
            "preset.json",
            {"vit": None},
            "preset.json: preset.vit: got None, want an obj",
        ),
        (
            "preset.json",
            {"eos_ids": 2},
            "preset.json: preset.eos_ids: got 2, want a li",
        ),
        ("manifest.json", {"files": 3}, "manifest.json is damaged: files is 3, want"),
        (locate.INDEX, {"metadata": []}, "index.json is absent or damaged"),
        (locate.INDEX, {"weight_map": []}, "index.json is absent or damaged"),
        (locate.INDEX, {"weight_map": {"a": 3}}, "index.json is absent or damaged"),
        (locate.INDEX, None, "index.json is absent or damaged"),
    ],
)
def test_json_of_another_shape_is_refused(directory, file, changes, words):
    if changes is None:
        (directory / file).write_text("[]")
    else:
        edit(directory / file, **changes)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_model(directory)


@pytest.mark.parametrize("file", ["preset.json", "manifest.json"])
def test_a_newer_format_is_refused(directory, file):
    edit(directory / file, format=2)
    with pytest.raises(CheckpointError, match="format 2.*reads 1; update minigpt4_jax"):
        checkpoint.load_model(directory)


@pytest.mark.parametrize("name", ["trainables", "connector-00001-of-00001"])
def test_trainables_of_a_newer_format_are_refused(directory, tmp_path, name):
    bias = {"projector/bias": np.ones(24, np.float32)}
    path = tmp_path / f"{name}.safetensors"
    model = checkpoint.load_model(directory)
    save_file(bias, path)  # no metadata: by another program
    assert checkpoint.load_trainables(model, tmp_path) == ["projector/bias"]
    for newer in ("2", "next"):
        save_file(bias, path, metadata={"format": newer})
        with pytest.raises(CheckpointError, match=f"{name}.*format '?{newer}'?, this"):
            checkpoint.load_trainables(model, tmp_path)
        with pytest.raises(CheckpointError, match="update minigpt4_jax"):
            checkpoint.read_arrays(tmp_path, {"projector/bias": (24,)})


def test_an_index_of_a_newer_format_is_refused(directory):
    index = json.loads((directory / locate.INDEX).read_text())
    edit(directory / locate.INDEX, metadata=index["metadata"] | {"format": 2})
    with pytest.raises(CheckpointError, match="index.json: got format 2"):
        checkpoint.load_model(directory)


def test_a_preset_is_a_name_or_a_json_file(directory, tmp_path):
    assert checkpoint.read_preset("demo") == PRESETS["demo"]
    assert checkpoint.read_preset(directory / "preset.json") == tiny.CONFIG
    with pytest.raises(ConfigError, match="did you mean 'minigpt4_vicuna_7b'"):
        checkpoint.read_preset("minigpt4_vicuna_7")
    with pytest.raises(ConfigError, match="no preset file at .*mine.json"):
        checkpoint.read_preset(tmp_path / "mine.json")
    values = {"format": 1, **tiny.CONFIG.to_dict()}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(values | {"llama": values["llama"] | {"head_size": 9}}))
    with pytest.raises(ConfigError, match="mine.json: llama: head_size=9 is odd"):
        checkpoint.read_preset(mine)
    mine.write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2.*update minigpt4_jax"):
        checkpoint.read_preset(mine)


def test_the_towers_of_a_json_preset_may_be_names(tmp_path):
    mine = tmp_path / "mine.json"
    values = dict(format=1, name="mine", template="vicuna_v0", bos_id=1, eos_ids=[2])
    towers = dict(vit="eva_g", qformer="blip2", llama="vicuna_7b")
    mine.write_text(json.dumps(values | towers))
    config = checkpoint.read_preset(str(mine))
    assert config == dataclasses.replace(PRESETS["minigpt4_vicuna_7b"], name="mine")
    small = PRESETS["demo"].to_dict()["llama"]  # a name beside an object beside none
    mine.write_text(json.dumps(values | towers | {"llama": small, "qformer": None}))
    config = checkpoint.read_preset(mine)
    assert (config.llama, config.qformer) == (PRESETS["demo"].llama, None)
    for key, name, near in (
        ("vit", "eva", "eva_g"),
        ("qformer", "blip", "blip2"),
        ("llama", "vicuna_7", "vicuna_7b"),
    ):
        mine.write_text(json.dumps(values | towers | {key: name}))
        words = f"mine.json: unknown preset.{key} '{name}'; did you mean '{near}'"
        with pytest.raises(ConfigError, match=words):
            checkpoint.read_preset(mine)


def test_a_preset_with_an_unknown_key_is_refused(directory):
    edit(directory / "preset.json", flavour="vanilla")
    with pytest.raises(CheckpointError, match="flavour"):
        checkpoint.read_config(directory)


def test_weights_of_another_preset_are_refused(directory):
    preset = json.loads((directory / "preset.json").read_text())
    edit(directory / "preset.json", qformer=preset["qformer"] | {"num_queries": 4})
    with pytest.raises(
        CheckpointError, match=r"query_tokens: got \[3, 18\], want \[4, 18"
    ):
        checkpoint.load_model(directory)


def test_a_work_directory_loads_with_its_trainables(arrays, tmp_path):
    base = save(tmp_path / "frozen", frozen_part(arrays))
    trained = {
        k: jnp.full(v.shape, 0.5)
        for k, v in arrays.items()
        if k not in frozen_part(arrays)
    }
    workdir = work_directory(tmp_path / "run", base, trained)
    model = checkpoint.load_model(workdir)
    assert float(model.projector.kernel[...].mean()) == 0.5
    np.testing.assert_array_equal(
        values(model)["ln_vision/scale"], arrays["ln_vision/scale"]
    )
    assert locate.base_directory(workdir) == base
    assert checkpoint.read_config(workdir) == tiny.CONFIG


def test_a_work_directory_that_saved_nothing_yet_says_so(directory, tmp_path):
    workdir = work_directory(tmp_path / "run", directory, None)
    with pytest.raises(CheckpointError, match="no trainables.safetensors.*train first"):
        checkpoint.load_model(workdir)


def test_a_run_finds_its_model_in_another_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path / "new"))
    fingerprinted = "any-model-0123456789abcdef"
    run = work_directory(tmp_path / "run", tmp_path / "old" / fingerprinted, None)
    (tmp_path / "new" / fingerprinted).mkdir(parents=True)
    assert locate.base_directory(run) == tmp_path / "new" / fingerprinted
    (tmp_path / "old" / fingerprinted).mkdir(parents=True)
    assert locate.base_directory(run) == tmp_path / "old" / fingerprinted


def test_a_run_whose_model_is_gone_says_which_and_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path / "new"))
    frozen = locate.demo_directory(None).name
    (tmp_path / "new/model").mkdir(parents=True)  # of this name may be any model
    for name, advice in (
        (frozen, "`python -m convert demo --no-connector` in a clone makes it"),
        ("model", "put it back or convert it there"),
        ("demo-frozen-0123456789abcdef", "put it back or convert it there"),
    ):
        run = work_directory(tmp_path / f"run of {name}", tmp_path / "old" / name, None)
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_model(run)
        assert f"the model {tmp_path}/old/{name}, which is no" in str(error.value)
        assert str(error.value).endswith(advice)


def test_trainables_overwrite_only_themselves(arrays, directory, tmp_path):
    params = {
        "projector/bias": jnp.arange(24.0),
        "projector/kernel": jnp.ones((18, 24)),
    }
    storage.save_trainables(tmp_path, params)
    model = checkpoint.load_model(directory)
    assert checkpoint.load_trainables(model, tmp_path) == sorted(params)
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, params.get(name, arrays[name]))


def test_trainables_of_another_model_are_refused(directory, tmp_path):
    storage.save_trainables(
        tmp_path, {"projector/bias": jnp.ones(5), "lora/a": jnp.ones(2)}
    )
    model = checkpoint.load_model(directory)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_trainables(model, tmp_path)
    assert "projector/bias: got [5], want [24]" in str(error.value)
    assert "lora/a [2]: the model has no such parameter" in str(error.value)


def test_the_cache_folder_is_the_users_or_as_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path))
    assert locate.cache_root() == tmp_path
    monkeypatch.delenv("MINIGPT4_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(locate.sys, "platform", "linux")
    assert locate.cache_root() == tmp_path / "xdg/minigpt4_jax"


def test_names_and_paths_resolve_or_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="convert demo --no-connector"):
        locate.resolve("demo-frozen")
    with pytest.raises(CheckpointError, match="did you mean 'demo'"):
        locate.resolve("demmo")
    with pytest.raises(CheckpointError, match="no directory at"):
        locate.resolve(tmp_path / "nowhere")
    assert locate.resolve(str(tmp_path)) == tmp_path


def test_the_fingerprint_changes_with_all_that_the_demo_is_made_of(
    tmp_path, monkeypatch
):
    pins = locate.demo_pins()
    folder = tmp_path / "connector"
    folder.mkdir()
    (folder / "connector.safetensors").write_bytes(b"one")

    def fingerprint(**changes):
        monkeypatch.setattr(locate, "demo_pins", lambda: pins | changes)
        return locate.demo_fingerprint(folder)

    source = [pins["sources"][0], pins["sources"][1] | {"sha256": "0"}]
    found = {
        locate.demo_fingerprint(None),
        fingerprint(),
        fingerprint(rules="x"),
        fingerprint(preset="x"),
        fingerprint(sources=source),
    }
    (folder / "connector.safetensors").write_bytes(b"two")
    found.add(fingerprint())
    monkeypatch.setattr(locate, "FORMAT", 2)
    found.add(fingerprint())
    assert len(found) == 7


def test_finding_a_model_needs_no_jax():
    import subprocess
    import sys

    code = "import sys, minigpt4_jax.locate; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_reloaded_model_computes_the_same(directory):
    first, second = (checkpoint.load_model(directory) for _ in range(2))
    pixels_BHWC = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    np.testing.assert_array_equal(
        first.encode_image(pixels_BHWC), second.encode_image(pixels_BHWC)
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_rounded_while_read_are_those_rounded_afterwards(tmp_path, kind):
    how = Quantisation(kind, vision="int8", kv="int8")
    loaded = checkpoint.load_model(tiny.save(tmp_path / "m"), quantisation=how)
    model = tiny.model()
    model.quantise(how)
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (loaded, model))
    assert ours.keys() == theirs.keys()
    for path, param in theirs.items():
        np.testing.assert_array_equal(ours[path][...], param[...], str(path))


def test_float_weights_are_read_a_layer_at_a_time_when_they_are_rounded():
    class Tensor:
        read = []

        def get_shape(self):
            return [3, 64, 5]

        def __getitem__(self, index):
            self.read.append(index)
            return np.ones((1, 64, 5), np.float32)

    like = jax.ShapeDtypeStruct((3, 32, 5), jnp.uint8)
    scale = jax.ShapeDtypeStruct((3, 2, 2, 5), jnp.float16)
    checkpoint._rounded("llama/blocks/mlp/up/kernel", Tensor(), like, scale)
    assert Tensor.read == [slice(0, 1), slice(1, 2), slice(2, 3)]
