"""What a run looks at: always the same batches, their images exchanged, sample answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from minigpt4_jax import looks
from minigpt4_jax.data.sources import Example
from minigpt4_jax.sharding import Parts
from tests import tiny, training


def make(loss_fn, batches, **task) -> looks.Looks:
    mesh = training.one_device()
    trainables = SimpleNamespace(
        frozen={},
        mesh=mesh,
        parts=Parts({}, mesh),
        model=lambda params: params["model"],
        gathered=lambda params, frozen: params["model"],
    )
    fields = dict(val_batches=batches, loss_fn=loss_fn, vocabulary_size=10) | task
    return looks.Looks(trainables, SimpleNamespace(**fields), tiny.tokenizer(), mesh)


def test_the_held_out_loss_is_a_mean_over_tokens_not_over_batches():
    def loss_fn(model, batch):
        nll_B = batch["nll_B"] * batch["queries_BQD"][:, 0, 0]
        return nll_B.sum(), batch["count_B"].sum()

    batches = [
        {"nll_B": np.array([6.0, 0.0]), "count_B": np.array([2.0, 0.0])},
        {"nll_B": np.array([1.0, 1.0]), "count_B": np.array([1.0, 5.0])},
    ]
    # The second photo makes its row twice as hard.
    images = {"queries_BQD": np.array([1.0, 2.0])[:, None, None], "ok_B": np.ones(2)}
    batches = [batch | images for batch in batches]
    found = make(loss_fn, batches).losses({"model": 0})
    own, exchanged = 6 * 1 + 1 * 1 + 1 * 2, 6 * 2 + 1 * 2 + 1 * 1  # nats of 8 tokens
    assert found == {"val_loss": own / 8, "val_loss_exchanged": exchanged / 8}


def test_exchanged_images_belong_to_another_example_and_nothing_else_moves():
    batch = {
        "patches_BPE": np.arange(12).reshape(3, 2, 2),
        "ids_RT": np.arange(6).reshape(3, 2),
        "ok_B": np.arange(3),
    }
    found = looks.exchange(batch)
    np.testing.assert_array_equal(found["patches_BPE"], batch["patches_BPE"][[2, 0, 1]])
    np.testing.assert_array_equal(found["ok_B"], [2, 0, 1])
    np.testing.assert_array_equal(found["ids_RT"], batch["ids_RT"])


def test_one_image_is_exchanged_with_none():
    def loss_fn(model, batch):
        return batch["ok_B"].sum(), batch["ok_B"].sum()

    found = make(loss_fn, [{"ok_B": np.ones(1)}]).losses({"model": 0})
    assert found == {"val_loss": 1.0}


def test_a_loss_of_chance_is_said_once(caplog):
    watched = make(None, [])
    watched.diagnosis = looks.Diagnosis(10, after=3)
    for step in range(12):
        watched.say(step, {"loss": float(np.log(10)), "lr": 0.1})
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "guessing evenly" in said[0]


def test_samples_stand_beside_what_people_say(tmp_path, monkeypatch):
    photos = [
        Example(key, training.jpeg(i), (f"caption {i}",), "", "")
        for i, key in enumerate(("same", "same"))  # of two shards
    ]
    watched = make(None, [], photos=photos, prompt=["what"], stop=())
    monkeypatch.setattr(looks, "sample", lambda *_: ["a dog", "a cat"])
    found = watched.samples({"model": 0}, tmp_path)
    assert [line["says"] for line in found] == ["a dog", "a cat"]
    assert [line["captions"] for line in found] == [["caption 0"], ["caption 1"]]
    assert all((tmp_path / "samples" / line["file"]).exists() for line in found)


@pytest.mark.parametrize("task", [dict(prompt=None), dict(prompt=["x"], photos=[])])
def test_nothing_is_asked_where_there_is_no_decoder_or_no_photo(tmp_path, task):
    assert make(None, [], **{"photos": [1], **task}).samples({}, tmp_path) == []
    assert not list(tmp_path.iterdir())
