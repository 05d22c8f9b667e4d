"""Runs that learn nothing, or do not look at their images, are told so once."""

import math

import pytest

from minigpt4_jax.diagnosis import Diagnosis, diagnose

CHANCE = math.log(32_000)


def test_a_loss_at_chance_names_the_likely_causes():
    (text,) = diagnose(300, loss=CHANCE + 0.1, vocabulary_size=32_000).values()
    assert text.startswith(
        "step 300: the loss is 10.47, and guessing evenly among the "
    )
    assert "32000 tokens gives 10.37" in text
    for cause in ("weights", "tokenizer", "shuffled", "learning rate"):
        assert cause in text


def test_images_that_change_nothing_name_the_likely_causes():
    (text,) = diagnose(40, val_loss=2.5, val_loss_exchanged=2.51).values()
    assert "do not depend on the image" in text
    assert "2.5000, and 2.5100 (+0.4%) with images exchanged" in text
    for cause in ("wrong images", "config.trainable", "learning rate", "captions"):
        assert cause in text


@pytest.mark.parametrize(
    "measured",
    [
        {},
        dict(loss=4.0, vocabulary_size=32_000),
        dict(loss=CHANCE),  # of a loss that is not over a vocabulary
        dict(val_loss=2.5),
        dict(val_loss=2.5, val_loss_exchanged=2.6),
        dict(val_loss=math.nan, val_loss_exchanged=math.nan),
        dict(loss=math.nan, vocabulary_size=32_000),
    ],
)
def test_a_run_that_learns_or_was_not_measured_is_told_nothing(measured):
    assert diagnose(300, **measured) == {}


def test_each_sentence_is_said_once_and_not_at_the_beginning():
    diagnosis = Diagnosis(32_000, after=30)
    said = {
        step: diagnosis.look(step, loss=CHANCE, val_loss=9.0, val_loss_exchanged=9.0)
        for step in range(10, 90, 10)
    }
    # The images can be judged by one evaluation, the loss by five batches.
    assert {step: len(texts) for step, texts in said.items() if texts} == {30: 1, 50: 1}


def test_one_odd_batch_among_good_ones_is_no_news():
    diagnosis = Diagnosis(32_000, after=0)
    losses = (3.0, CHANCE, math.nan, 3.0, CHANCE, 3.1, 2.9)
    assert not any(diagnosis.look(step, loss=x) for step, x in enumerate(losses))
