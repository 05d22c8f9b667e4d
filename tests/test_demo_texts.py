import numpy as np
import pytest

from minigpt4_jax.data import demo_texts
from minigpt4_jax.data.demo_texts import (
    ONE_SENTENCE,
    PARAPHRASES,
    in_detail,
    one_sentence,
    short_questions,
    tidy,
)
from minigpt4_jax.data.prompts import ALIGNMENT_QUESTIONS

BROWN_DOG = [
    "A brown dog is running through the grass.",
    "A brown dog runs.",
    "A dog runs through a green field.",
    "The brown dog is outside.",
    "A dog in a field.",
]


def asked(captions, tries=60):
    """Every short question that any seed asks, with the set of its answers."""
    answers = {}
    for seed in range(tries):
        for question, answer in short_questions(captions, np.random.default_rng(seed)):
            answers.setdefault(question, set()).add(answer)
    return answers


def noes(captions):
    return {a for answers in asked(captions).values() for a in answers if a[:2] == "No"}


def test_the_same_seed_gives_the_same_texts():
    for make in (one_sentence, in_detail, short_questions):
        first, second, *others = (
            make(BROWN_DOG, np.random.default_rng(seed)) for seed in (3, 3, *range(9))
        )
        assert first == second
        assert any(first != other for other in others)


def test_each_caption_is_the_answer_of_one_sentence_once():
    turns = one_sentence(BROWN_DOG, np.random.default_rng(0))
    assert [answer for _, answer in turns] == BROWN_DOG
    assert {question for question, _ in turns} <= {ONE_SENTENCE, *PARAPHRASES}


def test_a_caption_is_tidied_but_not_reworded():
    assert tidy("a dog ,  running") == "A dog, running."
    assert tidy("Is it a dog?") == "Is it a dog?"


def test_details_are_captions_that_add_something():
    captions = [
        "A man in a red hat rides a horse.",
        "A man in a red hat riding a horse.",
        "A cowboy throws his rope at a small calf.",
    ]
    ((question, answer),) = in_detail(captions, np.random.default_rng(0))
    assert question in ALIGNMENT_QUESTIONS
    assert answer.count(".") == 2
    assert "calf" in answer and "hat" in answer


def test_captions_that_say_the_same_give_no_details():
    captions = ["A dog runs in the grass.", "The dog is running in grass."]
    assert in_detail(captions, np.random.default_rng(0)) == []


def test_details_leave_out_the_caption_that_contradicts_the_others():
    captions = [
        "A man with heavy equipment is hanging from a vertical white cliff.",
        "A woman climbing a rocky wall.",
        "A woman with a ponytail climbs near the sea.",
        "A woman is wearing a blue harness.",
    ]
    ((_, answer),) = in_detail(captions, np.random.default_rng(0))
    assert "man " not in answer.replace("woman", "")


def test_what_the_captions_agree_on_is_answered():
    answers = asked(BROWN_DOG)
    assert answers["What animal is in the image?"] == {"A dog."}
    assert answers["How many dogs are in the image?"] == {"One."}
    assert answers["What color is the dog?"] == {"The dog is brown."}
    assert answers["What is the dog doing?"] == {
        "The dog is running through the grass.",
        "The dog is running through a green field.",
        "The dog is running.",
    }
    assert answers["Is there a dog in the image?"] == {"Yes, there is a dog."}


def test_too_few_captions_are_no_agreement():
    assert asked(BROWN_DOG[:3]) == {}


def test_captions_that_disagree_on_a_colour_leave_it_unasked():
    captions = [*BROWN_DOG[:4], "A black dog in a field."]
    assert "What color is the dog?" not in asked(captions)


def test_the_colour_of_a_shirt_is_not_given_to_the_hat():
    captions = ["A man in a red shirt and hat."] * 4
    answers = asked(captions)
    assert answers["What color is the shirt?"] == {"The shirt is red."}
    assert "What color is the hat?" not in answers


def test_numbers_of_a_caption_add_up():
    captions = [
        "A man and two boys jump on a trampoline.",
        "The man and two boys are playing.",
        "Three people on a trampoline.",
        "Jumping on a trampoline.",
    ]
    assert asked(captions)["How many people are in the image?"] == {"Three."}


@pytest.mark.parametrize(
    "other",
    ["Four people play.", "Three people and others.", "A group of people.", "A skier."],
)
def test_a_number_that_one_caption_doubts_is_not_asked(other):
    captions = ["Three men play.", "Three men run.", "Three people in a park.", other]
    assert "How many people are in the image?" not in asked(captions)


@pytest.mark.parametrize(
    "word", ["poodle", "puppies", "terrier", "animal", "greyhound", "it"]
)
def test_no_dog_is_never_said_where_a_word_may_mean_one(word):
    captions = ["Red flowers in a vase."] * 3
    assert "No, there is no dog." in noes([*captions, "A vase on a table."])
    assert "No, there is no dog." not in noes([*captions, f"Flowers and {word}."])


@pytest.mark.parametrize("word", ["people", "a crowd", "a skier", "his hand", "a boy"])
def test_no_man_is_never_said_where_a_word_may_mean_one(word):
    captions = ["A brown dog on the grass."] * 3
    assert "No, there is no man." in noes([*captions, "A dog."])
    assert "No, there is no man." not in noes([*captions, f"A dog and {word}."])


def test_toys_and_hot_dogs_are_no_animals():
    captions = ["A hot dog on a plate.", "A toy dog.", "A dog costume.", "A hot dog."]
    questions = asked(captions)
    assert "What animal is in the image?" not in questions
    assert not any("Yes" in answer for found in questions.values() for answer in found)


def test_what_somebody_wears_is_not_an_action():
    captions = ["A man is wearing a red hat."] * 4
    assert "What is the man doing?" not in asked(captions)


def test_one_of_several_men_is_not_asked_for_as_the_man():
    captions = ["A man is riding a bike."] * 4
    assert "What is the man doing?" in asked(captions)
    captions[3] = "A man is riding a bike past another man."
    assert "What is the man doing?" not in asked(captions)


def test_rates_and_words_of_the_table_are_sound():
    names = [thing.name for thing in demo_texts.THINGS]
    assert len(set(names)) == len(names)
    for thing in demo_texts.THINGS:
        assert 0 < thing.rate <= 1
        assert not demo_texts._hinted(thing, [["a", "stove", "and", "plates"]])
        for word in thing.words:
            assert demo_texts._hinted(thing, [[word]]), (thing.name, word)
