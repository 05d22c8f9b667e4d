"""Features are computed once, never taken from elsewhere, and survive an interruption."""

import dataclasses
import functools
import pickle
import threading
import types
from concurrent.futures import ThreadPoolExecutor, wait

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import alive, checkpoint, features, sharding, storage
from minigpt4_jax.data.feature_files import FeatureFiles
from minigpt4_jax.data.images import read_image, squash
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import CheckpointError, DataError, InputError
from minigpt4_jax.models.vit import normalise
from tests import tiny
from tests.training import one_device, write_shard


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def photos(tmp_path):
    return open_data(write_shard(tmp_path / "data" / "photos.tar", range(5)))


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
        return squash(image_HWC, cfg)

    monkeypatch.setattr(features, "squash", counted)
    return calls


def made(
    model, photos, folder, part="patches", dtype="float16", mesh=None
) -> FeatureFiles:
    towers, mesh = features.towers_digest(model, part), mesh or one_device()
    path = features.make(model, part, dtype, towers, photos, folder, mesh)
    return FeatureFiles([path], np.dtype(getattr(jnp, dtype)))


def rows(files: FeatureFiles, count: int = 5) -> np.ndarray:
    return np.stack([files(0, i) for i in range(count)])


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("part", ["patches", "queries"])
def test_features_are_what_the_frozen_towers_make(
    model, photos, tmp_path, part, dtype, tolerance
):
    found = rows(made(model, photos, tmp_path / "f", part, dtype))
    images_BHWC = np.stack(
        [squash(read_image(photo.image), model.cfg.vit) for photo in photos]
    )
    want = model.encode_patches(normalise(jnp.asarray(images_BHWC), model.cfg.vit))
    if part == "queries":
        want = model.qformer(want)
    assert found.shape == want.shape and found.dtype == getattr(jnp, dtype)
    np.testing.assert_allclose(
        found.astype(np.float32), want, rtol=tolerance, atol=tolerance
    )


def test_features_can_be_read_in_another_process(model, photos, tmp_path):
    files = made(model, photos, tmp_path / "f")
    again = pickle.loads(pickle.dumps(files))
    np.testing.assert_array_equal(rows(again), rows(files))


@pytest.mark.parametrize(
    "trainable, part",
    [
        (["projector/bias"], "queries"),
        (["qformer/query_tokens", "projector/bias"], "patches"),
        (["projector/bias", "ln_vision/scale"], "pixels"),
        (["vit/class_token"], "pixels"),
        (["llama/norm/scale"], "queries"),
    ],
)
def test_what_is_kept_lies_before_the_first_trainable(trainable, part):
    assert features.frozen_part(tiny.CONFIG, trainable) == part
    without = dataclasses.replace(tiny.CONFIG, qformer=None, patches_per_token=1)
    want = "patches" if part == "queries" else part
    assert features.frozen_part(without, trainable) == want


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
        make = functools.partial(made, model, photos, tmp_path)
        first = pool.submit(make)
        assert begun.wait(60)
        second = pool.submit(make)
        assert not wait([second], timeout=0.5).done
        go_on.set()
        np.testing.assert_array_equal(rows(first.result(60)), rows(second.result(60)))
    assert len(seen) == 5


def test_the_second_time_reads_the_file(model, photos, tmp_path, seen):
    first = made(model, photos, tmp_path)
    assert len(seen) == 5
    second = made(model, photos, tmp_path)
    assert len(seen) == 5
    np.testing.assert_array_equal(rows(first), rows(second))


def test_other_weights_pixels_or_data_are_computed_anew(photos, tmp_path, seen):
    folder = tmp_path / "f"
    weights, pixels, norm = tiny.model(), tiny.model(), tiny.model()
    made(weights, photos, folder)
    weights.vit.patch.bias[...] += 1e-3
    norm.ln_vision.scale[...] += 1e-3
    vit = pixels.cfg.vit
    changed = type(vit)(**{**vars(vit), "mean": tuple(m + 0.1 for m in vit.mean)})
    pixels.cfg = type(pixels.cfg)(**{**vars(pixels.cfg), "vit": changed})
    # Same names, and files of the same size.
    other = open_data(write_shard(tmp_path / "other" / "photos.tar", range(5), seed=1))
    for count, (model, examples) in enumerate(
        [(weights, photos), (norm, photos), (pixels, photos), (tiny.model(), other)],
        start=2,
    ):
        made(model, examples, folder)
        assert len(seen) == 5 * count
        assert len(list(folder.glob("*.npy"))) == count


def test_features_made_on_a_mesh_are_read_on_one_device(
    photos, tmp_path, seen, monkeypatch
):
    """A run over many chips holds kernels in column blocks: the same weights."""
    monkeypatch.setattr(sharding, "TILE", (2, 1))  # 8 parts of 20 rows are not
    mesh = sharding.make_mesh(data=1, fsdp=8)
    model, plain = tiny.model(), tiny.model()
    sharding.hold(model, set(checkpoint.parameter_shapes(model.cfg)), mesh)
    kernels = (m.vit.blocks.mlp.up.kernel[...] for m in (model, plain))
    assert len({kernel.shape for kernel in kernels}) == 2
    first = made(model, photos, tmp_path, mesh=mesh)
    assert len(seen) == 5
    np.testing.assert_array_equal(rows(made(plain, photos, tmp_path)), rows(first))
    assert len(seen) == 5


def test_a_run_that_makes_features_or_waits_for_them_gives_signs_of_life(
    model, photos, tmp_path
):
    before = alive.signs()
    made(model, photos, tmp_path)
    assert alive.signs() == before + 3  # batches of two
    with ThreadPoolExecutor(1) as pool:
        with features._alone(tmp_path):
            waits = pool.submit(made, model, photos, tmp_path)
            while alive.signs() < before + 5:
                assert not wait([waits], timeout=0.1).done
        waits.result(60)


def test_what_does_not_make_the_features_does_not_matter(photos, tmp_path, seen):
    model = tiny.model()
    made(model, photos, tmp_path)
    model.projector.bias[...] += 1
    model.llama.norm.scale[...] += 1
    made(model, photos, tmp_path)
    assert len(seen) == 5


def test_an_interrupted_extraction_goes_on_where_it_stopped(
    model, photos, tmp_path, seen, monkeypatch
):
    whole = rows(made(model, photos, tmp_path / "whole"))
    refuse, seen[:] = features._refuse_infinite, []

    def interrupt(row, examples, i):
        refuse(row, examples, i)
        if i == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(features, "_refuse_infinite", interrupt)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        made(model, photos, folder)
    assert not list(folder.glob("*.npy")) and len(seen) == 4
    monkeypatch.setattr(features, "_refuse_infinite", refuse)
    found = made(model, photos, folder)
    assert len(seen) == 4 + 3  # the second batch was not on record
    np.testing.assert_array_equal(rows(found), whole)
    assert [file.suffix for file in folder.iterdir()] == [".npy"]


@pytest.mark.parametrize("scale", [np.nan, 1e8])
def test_features_that_float16_cannot_hold_are_refused(photos, tmp_path, scale):
    model = tiny.model()
    model.ln_vision.scale[...] *= scale
    with pytest.raises(DataError, match="00000: features are not finite in float16"):
        made(model, photos, tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_a_photo_that_cannot_be_decoded_is_told_when_it_is_read(
    model, photos, tmp_path, monkeypatch, caplog
):
    def damaged(image, **_):
        if image == photos.image(2):
            raise InputError("image: damaged")
        return read_image(image)

    monkeypatch.setattr(features, "read_image", damaged)
    files = made(model, photos, tmp_path)
    assert "00002: image: damaged" in caplog.text
    with pytest.raises(InputError, match="example 2 was unreadable"):
        files(0, 2)
    assert np.isfinite(files(0, 1)).all() and np.isfinite(files(0, 3)).all()


def test_a_disk_without_room_is_told_before_anything_is_made(
    model, photos, tmp_path, monkeypatch, seen
):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="0.00 GB are free; name another cache"):
        made(model, photos, tmp_path / "f")
    assert not seen and not list((tmp_path / "f").iterdir())
