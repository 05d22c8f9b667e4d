import json
import math
import subprocess
import sys

import numpy as np
import pytest

from minigpt4_jax.errors import DataError, InputError
from minigpt4_jax.evaluation.captions import (
    bleu4,
    cider_d,
    cider_d_per_image,
    exchanged,
    human,
    interval,
    read_pairs,
    report,
    words,
)

REFERENCES = [
    ["A brown dog runs over the green grass.", "The dog is running on a lawn."],
    ["Two men sit at a small table.", "Two old men are playing chess outside."],
    ["A red bus drives down the busy street.", "A bus stops in front of a shop."],
]


def test_words_are_lower_case_runs_of_letters_and_digits():
    assert words("A man's T-shirt, No. 12!") == [
        "a",
        "man",
        "s",
        "t",
        "shirt",
        "no",
        "12",
    ]


def test_cider_d_of_two_images_worked_out_by_hand():
    # Images: {"a dog runs"} and {"a cat"}; N = 2, so a word of one image weighs ln 2 and
    # "a", which is in both, weighs 0. Candidate of image 1: "a dog sits".
    #   n = 1: candidate (dog ln2, sits ln2), norm sqrt(2) ln2; reference (dog, runs)
    #          likewise; shared: dog, ln2 * ln2 / (2 ln2^2) = 1/2
    #   n = 2: candidate ("a dog", "dog sits"), reference ("a dog", "dog runs"): 1/2
    #   n = 3: "a dog sits" and "a dog runs": 0.   n = 4: none: 0
    # Same length, no penalty: (1/2 + 1/2 + 0 + 0) / 4 = 1/4, times 10, times 100.
    # Candidate of image 2: "a cat": n = 1: 1, n = 2: 1, none longer: (1 + 1) / 4 = 1/2.
    scores = cider_d_per_image(["a dog sits", "A cat."], [["A dog runs."], ["a cat"]])
    assert scores == pytest.approx([250.0, 500.0])
    assert cider_d(["a dog sits", "A cat."], [["A dog runs."], ["a cat"]]) == (
        pytest.approx(375.0)
    )


def test_repeated_words_are_clipped_as_by_hand():
    # n = 1: candidate (dog: 3 ln2), norm 3 ln2; reference (dog: ln2), norm ln2; clipped
    # product min(3, 1) * 1 ln2^2 / (3 ln2^2) = 1/3. No bigram is shared. The candidate
    # has 3 words, the reference 1: penalty exp(-2^2 / (2 * 6^2)) for 2 bigrams against 0.
    expected = 1000 * (1 / 3) / 4 * math.exp(-4 / 72)
    scores = cider_d_per_image(["dog dog dog", "cat"], [["dog"], ["cat"]])
    assert scores == pytest.approx([expected, 250.0])


def test_several_references_are_averaged_and_share_one_document():
    # "dog" is in both captions of image 1 and still in one document of two: idf ln 2.
    # Against "dog": 1 / 4; against "mouse": 0. Mean 1/8.
    scores = cider_d_per_image(["dog", "cat"], [["dog", "mouse"], ["cat"]])
    assert scores == pytest.approx([125.0, 250.0])


def test_words_outside_the_references_weigh_as_the_rarest():
    # "zebra" has document frequency 0, taken as 1: idf ln 2 as for "dog".
    # n = 1: 1 / sqrt(2); bigrams 1 against 0: penalty exp(-1 / 72).
    expected = 1000 * (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert cider_d_per_image(["dog zebra", "cat"], [["dog"], ["cat"]])[0] == (
        pytest.approx(expected)
    )


def test_the_reference_itself_scores_highest():
    references = [texts[:1] for texts in REFERENCES]
    best = cider_d_per_image([texts[0] for texts in references], references)
    assert best == pytest.approx([1000.0] * 3)
    longer = [texts[0] + " again" for texts in references]
    assert max(cider_d_per_image(longer, references)) < 1000


def test_an_empty_caption_scores_nothing():
    assert cider_d_per_image(["", "cat"], [["dog"], ["cat"]])[0] == 0


def test_exchanging_moves_every_answer_and_lowers_the_score():
    candidates = [texts[0] for texts in REFERENCES]
    swapped = exchanged(candidates)
    assert sorted(swapped) == sorted(candidates)
    assert all(a != b for a, b in zip(swapped, candidates))
    assert cider_d(swapped, REFERENCES) < 0.1 * cider_d(candidates, REFERENCES)


def test_exchanging_a_single_answer_is_refused():
    with pytest.raises(InputError, match="two images"):
        exchanged(["A dog."])


def test_bleu_4_worked_out_by_hand():
    # Candidate "the cat sat on the mat now", 7 words; reference "the cat sat on the mat".
    #   matched / total: 6/7, 5/6, 4/5, 3/4; the product is 3/7; longer, so no penalty.
    score = bleu4(["the cat sat on the mat now"], [["the cat sat on the mat"]])
    assert score == pytest.approx(100 * (3 / 7) ** 0.25)


def test_bleu_4_pools_counts_over_images_and_punishes_brevity():
    # Image 1: 4 words of 4 right: 4/4 3/3 2/2 1/1, reference of 6 words.
    # Image 2: 5 words, "a b c d x" against "a b c d e": 4/5 3/4 2/3 1/2.
    # Pooled: 8/9 6/7 4/5 2/3. Lengths 9 against 11: penalty exp(1 - 11/9).
    score = bleu4(["p q r s", "a b c d x"], [["p q r s t u"], ["a b c d e"]])
    precisions = (8 / 9) * (6 / 7) * (4 / 5) * (2 / 3)
    assert score == pytest.approx(100 * math.exp(1 - 11 / 9) * precisions**0.25)


def test_bleu_4_clips_by_the_most_of_any_reference_and_takes_the_closest_length():
    # "a a a a a": references have "a" at most 4 times (4/5), "a a" 3 of 4, 2 of 3,
    # 1 of 2. Reference lengths 4 and 6 are equally close: the shorter, no penalty.
    score = bleu4(["a a a a a"], [["a a a a", "b c d e f g"]])
    assert score == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_4_without_a_common_four_word_run_is_zero():
    assert bleu4(["a b c x"], [["a b c d"]]) == 0


def test_images_take_turns_in_the_caption_a_human_gives():
    candidates, others = human([["a", "b", "c"], ["d", "e"], ["f"], ["g", "h"]])
    assert candidates == ["a", "e", "g"]
    assert others == [["b", "c"], ["d"], ["h"]]


def test_the_interval_holds_the_mean_and_narrows_with_more_images():
    values = np.random.default_rng(0).normal(50, 10, 400)
    low, high = interval(values)
    # 1.96 standard errors of 10 / sqrt(400) on each side
    assert high - low == pytest.approx(2 * 1.96 * 0.5, rel=0.15)
    assert low < values.mean() < high
    few = interval(values[:25])
    assert few[1] - few[0] > 2 * (high - low)
    assert interval(values) == (low, high)


@pytest.mark.parametrize(
    ("candidates", "references"), [([], []), (["a"], [["a"], ["b"]]), (["a"], [[]])]
)
def test_a_set_that_does_not_match_is_refused(candidates, references):
    for score in (cider_d, bleu4):
        with pytest.raises(InputError):
            score(candidates, references)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    names = ["dog.jpg", "men.jpg", "bus.jpg"]
    answers = [
        {"image": name, "answer": texts[0]} for name, texts in zip(names, REFERENCES)
    ]
    captions = [
        {"image": name, "captions": texts} for name, texts in zip(names, REFERENCES)
    ]
    return (
        write(tmp_path / "answers.jsonl", answers[::-1]),
        write(tmp_path / "references.jsonl", captions),
    )


def test_answers_meet_their_references_by_image_whatever_the_order(files):
    candidates, references = read_pairs(*files)
    assert candidates == [texts[0] for texts in REFERENCES]
    assert references == REFERENCES


def test_an_answer_with_an_error_counts_as_empty(files):
    answers, references = files
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    lines[0] = {"image": lines[0]["image"], "error": "not an image"}
    candidates, _ = read_pairs(write(answers, lines), references)
    assert candidates.count("") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "cat.jpg", "answer": "A cat."}, "same images"),
        ({"image": "dog.jpg", "answer": "Again."}, "named before"),
        ({"image": "cat.jpg"}, "want a str"),
        ({"answer": "A cat."}, "string `image`"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(files, line, message):
    answers, references = files
    answers.write_text(answers.read_text() + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message):
        read_pairs(answers, references)


def test_the_command_prints_one_line_of_json(files):
    command = [sys.executable, "-m", "minigpt4_jax.evaluation.captions"]
    flags = [f"--answers={files[0]}", f"--references={files[1]}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line) == report(*read_pairs(*files))
    assert subprocess.run(command, capture_output=True).returncode == 2
