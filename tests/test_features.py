"""Features are computed once, never taken from elsewhere, and survive an interruption."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import features
from minigpt4_jax.data.images import preprocess, read_image
from minigpt4_jax.data.sources import TarShards
from minigpt4_jax.errors import ConfigError, DataError
from tests import tiny
from tests.training import one_device, write_shard


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def photos(tmp_path):
    return TarShards(write_shard(tmp_path / "photos.tar", range(5)))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 2)
    monkeypatch.setattr(features, "SAVE_EVERY", 1)


@pytest.fixture
def seen(monkeypatch):
    """Grows by an entry for each photo that goes through the ViT."""
    calls = []

    def counted(image_HWC, cfg):
        calls.append(image_HWC)
        return preprocess(image_HWC, cfg)

    monkeypatch.setattr(features, "preprocess", counted)
    return calls


def test_features_are_the_patches_of_each_photo(model, photos, tmp_path):
    found = features.patches(model, photos, tmp_path / "f", one_device())
    pixels_BHWC = np.stack(
        [preprocess(read_image(photo.image), model.cfg.vit) for photo in photos]
    )
    want_BPE = model.encode_patches(jnp.asarray(pixels_BHWC))
    assert found.shape == want_BPE.shape and found.dtype == np.float16
    np.testing.assert_allclose(found, want_BPE, rtol=1e-3, atol=1e-3)


def test_a_run_waits_for_another_that_makes_the_same_file(
    model, photos, tmp_path, seen, monkeypatch
):
    begun, go_on = threading.Event(), threading.Event()
    refuse = features._refuse_infinite

    def slow(*arguments):
        begun.set()
        assert go_on.wait(60)
        refuse(*arguments)

    monkeypatch.setattr(features, "_refuse_infinite", slow)
    with ThreadPoolExecutor(2) as pool:
        make = functools.partial(features.patches, model, photos, tmp_path)
        first = pool.submit(make, one_device())
        assert begun.wait(60)
        second = pool.submit(make, one_device())
        assert not wait([second], timeout=0.5).done
        go_on.set()
        np.testing.assert_array_equal(first.result(60), second.result(60))
    assert len(seen) == 5


def test_the_second_time_reads_the_file(model, photos, tmp_path, seen):
    first = features.patches(model, photos, tmp_path, one_device())
    assert len(seen) == 5
    second = features.patches(model, photos, tmp_path, one_device())
    assert len(seen) == 5
    np.testing.assert_array_equal(first, second)


def test_other_weights_pixels_or_data_are_computed_anew(photos, tmp_path, seen):
    folder = tmp_path / "f"
    weights, pixels, norm = tiny.model(), tiny.model(), tiny.model()
    features.patches(weights, photos, folder, one_device())
    weights.vit.patch.bias[...] += 1e-3
    norm.ln_vision.scale[...] += 1e-3
    vit = pixels.cfg.vit
    changed = type(vit)(**{**vars(vit), "mean": tuple(m + 0.1 for m in vit.mean)})
    pixels.cfg = type(pixels.cfg)(**{**vars(pixels.cfg), "vit": changed})
    # Same names, and files of the same size.
    other = TarShards(write_shard(tmp_path / "other" / "photos.tar", range(5), seed=1))
    for count, (model, examples) in enumerate(
        [(weights, photos), (norm, photos), (pixels, photos), (tiny.model(), other)],
        start=2,
    ):
        features.patches(model, examples, folder, one_device())
        assert len(seen) == 5 * count
        assert len(list(folder.glob("*.npy"))) == count


def test_what_does_not_make_the_features_does_not_matter(photos, tmp_path, seen):
    model = tiny.model()
    features.patches(model, photos, tmp_path, one_device())
    model.projector.bias[...] += 1
    model.llama.norm.scale[...] += 1
    features.patches(model, photos, tmp_path, one_device())
    assert len(seen) == 5


def test_an_interrupted_extraction_goes_on_where_it_stopped(
    model, photos, tmp_path, seen, monkeypatch
):
    whole = np.array(features.patches(model, photos, tmp_path / "whole", one_device()))
    refuse, seen[:] = features._refuse_infinite, []

    def interrupt(out, examples, rows):
        refuse(out, examples, rows)
        if rows.stop == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(features, "_refuse_infinite", interrupt)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        features.patches(model, photos, folder, one_device())
    assert not list(folder.glob("*.npy")) and len(seen) == 4
    monkeypatch.setattr(features, "_refuse_infinite", refuse)
    found = features.patches(model, photos, folder, one_device())
    assert len(seen) == 4 + 3  # the second batch was not on record
    np.testing.assert_array_equal(found, whole)
    assert [file.suffix for file in folder.iterdir()] == [".npy"]


@pytest.mark.parametrize("scale", [np.nan, 1e8])
def test_features_that_float16_cannot_hold_are_refused(photos, tmp_path, scale):
    model = tiny.model()
    model.ln_vision.scale[...] *= scale
    with pytest.raises(DataError, match="photo 00000: .* not finite in float16"):
        features.patches(model, photos, tmp_path, one_device())
    assert not list(tmp_path.glob("*.npy"))


def test_a_photo_that_cannot_be_decoded_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training.jpeg", lambda seed: b"not a photo")
    photos = TarShards(write_shard(tmp_path / "bad.tar", [7]))
    with pytest.raises(DataError, match="photo 00007: "):
        features.patches(model, photos, tmp_path, one_device())


def test_a_trainable_vision_tower_is_refused():
    features.check_frozen(["qformer/query_tokens", "projector/bias"])
    for path in ("vit/class_token", "ln_vision/scale"):
        with pytest.raises(ConfigError, match=f"{path}; .* stay frozen"):
            features.check_frozen(["projector/bias", path])
