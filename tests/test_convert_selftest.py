"""The self-test of converted directories: each fault is found, and by its own test."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import layerwise, selftest
from minigpt4_jax import checkpoint, storage
from tests import tiny


def results(path: Path) -> dict[str, selftest.Result]:
    return {result.name: result for result in selftest.run(path)}


def linked(directory: Path, path: Path, template: str) -> Path:
    """A converted directory whose preset says another template; weights are links."""
    path.mkdir()
    for file in directory.iterdir():
        os.symlink(file, path / file.name)
    preset = json.loads((path / "preset.json").read_text())
    (path / "preset.json").unlink()
    (path / "preset.json").write_text(json.dumps(preset | {"template": template}))
    return path


@pytest.mark.slow
def test_a_decoder_that_does_not_know_its_template_is_flagged(demo_directory, tmp_path):
    """As a base LLaMA, or Vicuna v1.1, under the template of v0."""
    found = results(linked(demo_directory, tmp_path / "v0", "vicuna_v0"))
    assert found["perplexity"].state == selftest.PASSED
    assert found["stop string"].state == selftest.UNCERTAIN
    assert "does the decoder know the template vicuna_v0?" in found["stop string"].says


@pytest.fixture(scope="module")
def under_v0(tmp_path_factory) -> selftest.Forward:
    """The tiny model under Vicuna v0's template; tests say what it predicts."""
    folder = tmp_path_factory.mktemp("marks")
    path = linked(tiny.save(folder / "tiny"), folder / "v0", "vicuna_v0")
    return selftest.Forward(path)


def predicting(
    test: selftest.Forward, own: float, copied: float, line: bool, eos: float = 0.0
) -> selftest.Forward:
    """`own` is the probability of ### behind answers, `copied` that of other marks.

    line: they stand on the line below, as in the format that Vicuna v0 was trained in.
    """
    length = max(len(ids) for ids, _ in test.rows)
    probs_BTV = np.full((len(test.rows), length, tiny.VOCABULARY), 1e-4)
    for b, (ids, _) in enumerate(test.rows[1:-2], start=1):
        template = test.templates[(b - 1) // len(selftest.ANSWERS)]
        mark = test.tokenizer.encode(template.stop[0])[0]
        behind, below = len(ids) - 2, len(ids) - 1
        probs_BTV[b, behind, test.newline] = 0.99 if line else 0.001
        probs_BTV[b, [behind, below], mark] = 0.0
        probs_BTV[b, below if line else behind, mark] = own if b <= 3 else copied
        probs_BTV[b, behind, test.cfg.eos_ids] = eos
    test.log_probs_BTV = np.log(probs_BTV, where=probs_BTV > 0, out=probs_BTV * 0 - 99)
    return test


@pytest.mark.parametrize("line", [False, True], ids=["behind", "below"])
def test_a_mark_is_known_where_it_is_likely_and_others_are_not(line, under_v0):
    result = predicting(under_v0, 0.93, 0.4, line).ends()
    assert result.state == selftest.PASSED
    assert "'###' is at 1, 1, 1" in result.says and "never taught 0.4" in result.says


@pytest.mark.parametrize("line", [False, True], ids=["behind", "below"])
@pytest.mark.parametrize("own, copied", [(0.93, 0.85), (0.3, 0.001)])
def test_a_mark_that_is_copied_from_the_prompt_is_uncertain(
    own, copied, line, under_v0
):
    """As a base LLaMA does, whose first choice it may well be."""
    assert predicting(under_v0, own, copied, line).ends().state == selftest.UNCERTAIN


def test_a_mark_that_is_unlikely_fails(under_v0):
    result = predicting(under_v0, 0.0, 0.0, line=False).ends()
    assert result.state == selftest.FAILED
    assert "does the decoder know the template vicuna_v0?" in result.says


def test_an_end_token_in_place_of_the_mark_is_said(under_v0):
    """As in Vicuna v1.1."""
    result = predicting(under_v0, 0.05, 0.05, line=False, eos=0.9).ends()
    assert result.state == selftest.UNCERTAIN
    assert "its end token is first, as in Vicuna v1.1" in result.says


def test_layer_after_layer_is_the_whole_model():
    model, rng = tiny.model(seed=4), np.random.default_rng(0)
    ids_BT = rng.integers(0, tiny.VOCABULARY, (3, 7))
    slots_BT = np.zeros((3, 7), bool)
    slots_BT[1:, 2:5] = True  # two images in the last rows
    size = tiny.CONFIG.vit.image_size
    pixels_BHWC = rng.standard_normal((2, size, size, 3), np.float32)
    image_BQD = jnp.pad(model.encode_image(pixels_BHWC), [(1, 0), (0, 0), (0, 0)])
    want_BTV = jax.nn.log_softmax(model(ids_BT, slots_BT, image_BQD))
    got_BTV = layerwise.log_probs(model, ids_BT, slots_BT, pixels_BHWC)
    np.testing.assert_allclose(got_BTV, want_BTV, atol=2e-5)  # float32, 2 layers


def test_features_in_another_rotary_order_are_told_by_perplexity(demo_directory):
    """A decoder still speaks then, but badly: 98 in place of 31."""
    test = selftest.Forward(demo_directory)
    attention = test.model.llama.blocks.attn
    for kernel in (attention.q.kernel, attention.k.kernel):
        halves_LDNXK = jnp.stack(jnp.split(kernel[...], 2, axis=-1), axis=-1)
        kernel[...] = halves_LDNXK.reshape(kernel.shape)
    result = test.perplexity()
    assert result.state == selftest.FAILED
    assert "weights in a wrong order" in result.says


def test_a_template_without_its_tokens_fails(demo_directory, tmp_path):
    found = results(linked(demo_directory, tmp_path / "llama2", "llama2"))
    assert "template and tokenizer belong together" in found["loading"].says


def changed(path: Path, change) -> Path:
    """The tiny model (random weights) with some arrays changed."""
    with pytest.MonkeyPatch.context() as patch:
        write = storage.write_shards

        def edited(folder, arrays, *rest):
            return write(folder, {k: change(k, v) for k, v in arrays.items()}, *rest)

        patch.setattr(storage, "write_shards", edited)
        return tiny.save(path / "changed")


def test_random_weights_are_told_by_perplexity(tmp_path):
    found = results(tiny.save(tmp_path / "tiny"))
    assert found["stored values"].state == selftest.PASSED
    assert found["perplexity"].state == selftest.FAILED
    assert "no better than random weights" in found["perplexity"].says
    assert found["image"].state == selftest.PASSED


def test_an_image_that_changes_nothing_is_named(tmp_path):
    def blind(name, array):
        return array * 0 if name == "projector/kernel" else array

    found = results(changed(tmp_path, blind))
    assert found["image"].state == selftest.FAILED
    assert "is the projector trained" in found["image"].says


def test_values_that_are_no_numbers_are_named(tmp_path):
    def broken(name, array):
        if name == "llama/blocks/mlp/up/kernel":
            array = array.copy()
            array[1, 2, 3] = np.inf
        return array

    found = results(changed(tmp_path, broken))
    assert found["stored values"].state == selftest.FAILED
    assert "llama/blocks/mlp/up/kernel" in found["stored values"].says


def test_another_count_than_the_manifests_is_named(tmp_path):
    path = tiny.save(tmp_path / "tiny")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["parameters"] == sum(
        int(np.prod(shape))
        for shape in checkpoint.parameter_shapes(tiny.CONFIG).values()
    )
    (path / "manifest.json").write_text(json.dumps(manifest | {"parameters": 7}))
    assert "and 7 in the manifest" in results(path)["stored values"].says
