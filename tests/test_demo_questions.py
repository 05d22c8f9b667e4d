"""An answer is right when it says what the captions say, and only then."""

import numpy as np
import pytest

from benchmarks.demo_questions import Asked, interval, questions, right, table
from tests.training import captions


@pytest.mark.parametrize(
    "question, answer, said, is_right",
    [
        ("Is there a dog in the image?", "Yes, there is a dog.", "Yes.", True),
        ("Is there a dog in the image?", "Yes, there is a dog.", "No, yes", False),
        ("Do you see snow in this picture?", "No, there is no snow.", "no", True),
        ("What animal is in the image?", "A dog.", "Two puppies.", True),
        ("What animal is in the image?", "A dog.", "A dog and a cat.", False),
        ("How many people are in the image?", "Two.", "There are 2.", True),
        ("How many people are in the image?", "Two.", "Three of two.", False),
        ("What color is the shirt?", "The shirt is gray.", "It is grey.", True),
        ("What color is the dog?", "The dog is black and white.", "Black.", False),
        ("What is the man doing?", "The man is riding a bike.", "He's riding.", True),
        ("What is the man doing?", "The man is riding a bike.", "A bike.", False),
    ],
)
def test_an_answer_is_held_to_what_was_asked(question, answer, said, is_right):
    assert right(Asked(0, question, answer), said) is is_right


def test_every_question_has_a_kind_and_comes_again():
    texts = [captions(i) for i in range(6)]
    asked = questions(texts)
    assert asked and asked == questions(texts)
    assert all(right(ask, ask.answer) for ask in asked), [
        ask for ask in asked if not right(ask, ask.answer)
    ]
    assert {ask.kind for ask in asked} >= {"yes or no", "doing what"}


def test_the_table_says_how_much_more_is_right_with_the_own_photo():
    asked = [
        Asked(0, "Is there a dog in the image?", "Yes, there is a dog."),
        Asked(1, "Is there a cat in the image?", "No, there is no cat."),
    ]
    rows = table(asked, ["yes", "no"], ["yes", "yes"]).splitlines()
    assert rows[1].split()[:7] == ["yes", "or", "no", "2", "100.0", "50.0", "50.0"]
    assert rows[-1].split()[0] == "all" and len(rows) == 3


def test_photos_are_drawn_with_all_their_questions():
    marks = np.array([[1, 0], [1, 0], [0, 0]], float)
    assert interval(marks, np.array([4, 4, 4])) == pytest.approx((200 / 3, 200 / 3))
    low, high = interval(marks, np.array([1, 2, 3]))
    assert low < 200 / 3 < high
