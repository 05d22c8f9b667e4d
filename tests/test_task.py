"""What a config trains: texts by its loss, images from pixels or from what is kept."""

import jax
import numpy as np
import pytest

from minigpt4_jax import task
from minigpt4_jax.data.prompts import ALIGNMENT_QUESTIONS
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import ConfigError
from minigpt4_jax.step import answer_loss, word_loss
from tests import tiny, training

PROJECTOR = ["projector/bias", "projector/kernel"]
QFORMER = [*PROJECTOR, "qformer/query_tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    return training.write_photos(folder / "data", train=5, val=3).parent


def make(folder, trainable=PROJECTOR, val=True, **changes) -> task.Task:
    cfg = training.config(folder / "frozen", **changes)
    return task.make_task(
        cfg,
        tiny.model(),
        trainable,
        tiny.tokenizer(),
        [open_data(folder / "data/train")],
        open_data(folder / "data/val") if val else None,
        training.one_device(),
        folder,
    )


@pytest.mark.parametrize("loss", ["captions", "dialogues", "descriptions", "words"])
def test_each_loss_has_its_texts(folder, loss):
    found = make(folder, loss=loss)
    assert found.loss_fn is (word_loss if loss == "words" else answer_loss)
    batch = next(found.loader())
    if loss == "words":
        assert found.prompt is None and found.photos == []
        assert batch["target_BV"].max() > 0
        return
    text = tiny.tokenizer().decode(batch["ids_RT"][0].tolist())
    asked = any(question in text for question in ALIGNMENT_QUESTIONS)
    assert asked or loss != "descriptions"
    assert ("user" in text) == (loss != "captions")
    assert len(found.photos) == 3  # all of val
    assert found.vocabulary_size == tiny.VOCABULARY


@pytest.mark.parametrize(
    "trainable, dtype, name",
    [
        (PROJECTOR, "", "pixels_BHWC"),
        (PROJECTOR, "float32", "queries_BQD"),
        (QFORMER, "float16", "patches_BPE"),
        (QFORMER, "bfloat16", "patches_BPE"),
    ],
)
def test_images_are_given_from_as_far_as_they_are_kept(folder, trainable, dtype, name):
    found = make(folder, trainable, cache__dtype=dtype)
    batches = [next(found.loader()), *found.val_batches]
    for batch in batches:
        assert batch[name].dtype == (jax.numpy.dtype(dtype) if dtype else np.uint8)
        assert len({"pixels_BHWC", "queries_BQD", "patches_BPE"} & set(batch)) == 1


def test_what_a_trained_vit_makes_cannot_be_kept(folder):
    with pytest.raises(ConfigError, match="cache.dtype='float16': the ViT is trained"):
        make(folder, ["vit/class_token"], cache__dtype="float16")
    batch = next(make(folder, ["vit/class_token"], cache__dtype="").loader())
    assert "pixels_BHWC" in batch


def test_a_loader_begins_anywhere_and_ends_with_the_run(folder):
    found = make(folder, optim__accumulate=2, batch_size=4)
    whole = list(found.loader())
    assert len(whole) == 8 * 2 and len(whole[0]["ok_B"]) == 2
    again = found.loader()
    again.set_state({"step": 6, "seen": 12, "bad": {}})
    for batch, same in zip(whole[6:], again, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], same[name], err_msg=name)


def test_packed_rows_hold_the_same_tokens_in_fewer_places(folder):
    apart, packed = (
        make(folder, batch_size=4),
        make(folder, batch_size=4, row__packed=600),
    )
    for one, other in zip(apart.loader(), packed.loader(), strict=True):
        assert len(other["ids_RT"]) < len(one["ids_RT"])
        kept = [
            sorted(b["answer_ids_RA"][b["loss_mask_RA"] == 1]) for b in (one, other)
        ]
        assert kept[0] == kept[1]


def test_held_out_batches_are_always_the_same_and_need_no_val(folder):
    first, second = make(folder), make(folder, optim__total_steps=9)
    for one, other in zip(first.val_batches, second.val_batches, strict=True):
        np.testing.assert_array_equal(one["ids_RT"], other["ids_RT"])
    without = make(folder, val=False)
    assert (
        without.val_batches == [] and len(without.photos) == 4
    )  # of those it trains on


def test_photos_that_cannot_be_decoded_are_not_asked_about(folder, monkeypatch):
    read = task.read_image
    damaged = open_data(folder / "data/val").image(0)

    def refuse(image):
        if image == damaged:
            raise task.InputError("image: damaged")
        return read(image)

    monkeypatch.setattr(task, "read_image", refuse)
    assert [photo.key for photo in make(folder).photos] == ["00006", "00007"]


def test_each_example_of_a_small_val_is_looked_at_once_in_rows_of_its_length(folder):
    batch_size = 1
    found = make(folder, loss="descriptions", batch_size=batch_size)
    seen = [tuple(batch["ids_RT"][batch["ids_RT"] > 0]) for batch in found.val_batches]
    assert len(seen) == len(set(seen)) == 3
    tokens = [batch["ids_RT"].shape[1] for batch in found.val_batches]
    longest = max(int((batch["segments_RT"] > 0).sum()) for batch in found.val_batches)
    assert set(tokens) == {longest}
