"""Short questions about the photos of a split, answered with the photo and with another.

    python -m benchmarks.demo_questions --data=DATA [--split=test] [--checkpoint=demo]

Questions and answers follow from the captions (data/demo_texts.py): only what they agree
on is asked. The same question is asked about the next photo of the split ("exchanged"):
what a model gets right there, it says without looking. Greedy. Right is: yes or no as the
first word; the animal, number or participle among the words; the same colours, no others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from absl import flags

from minigpt4_jax import Generator, errors
from minigpt4_jax.data import demo_texts
from minigpt4_jax.data.demo_words import ANIMALS, COLORS, NUMBERS
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import InputError
from minigpt4_jax.request import GREEDY, Request, user

KINDS = {  # beginning of a question -> its name in the table
    "Is there": "yes or no",
    "Do you see": "yes or no",
    "Can you see": "yes or no",
    "What animal": "what animal",
    "How many": "how many",
    "What color": "what colour",
    "What": "doing what",
}
FEW = replace(GREEDY, max_tokens=24)
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Asked:
    photo: int
    question: str
    answer: str

    @property
    def kind(self) -> str:
        return next(k for start, k in KINDS.items() if self.question.startswith(start))


def main(argv: list[str]) -> None:
    args = flags.FLAGS
    if not args.data or len(argv) > 1:
        raise InputError("give --data=FOLDER, which has SPLIT/*.tar, and only flags")
    examples = open_data(Path(args.data) / args.split)
    count = min(len(examples), args.limit or len(examples))
    asked = questions([examples.captions(i) for i in range(count)])
    images = [examples.image(i) for i in range(count)]
    generator = Generator.load(args.checkpoint)
    own = answers(generator, asked, images)
    exchanged = answers(generator, asked, images[1:] + images[:1])
    if args.show:
        for ask, said, other in zip(asked, own, exchanged):
            print(f"{ask.question} | {ask.answer} | {said} | {other}")
    print(table(asked, own, exchanged))


def questions(captions: Sequence[Sequence[str]]) -> list[Asked]:
    """What can be asked of each photo; the same every time."""
    return [
        Asked(photo, question, answer)
        for photo, texts in enumerate(captions)
        for question, answer in demo_texts.short_questions(
            texts, np.random.default_rng([0, photo])
        )
    ]


def answers(generator: Generator, asked: Sequence[Asked], images) -> list[str]:
    said = [""] * len(asked)
    requests = (
        Request([user(ask.question, images[ask.photo])], sampling=FEW, id=str(i))
        for i, ask in enumerate(asked)
    )
    for event in generator.submit(requests):
        said[int(event.request_id)] += event.piece
    return said


def right(ask: Asked, said: str) -> bool:
    """Whether an answer says what the captions say."""
    want, got = _words(ask.answer), _words(said)
    if ask.kind == "yes or no":
        return got[:1] == want[:1]
    if ask.kind == "what animal":
        return _animals(got) == _animals(want)
    if ask.kind == "how many":
        return _numbers(got)[:1] == _numbers(want)[:1]
    if ask.kind == "what colour":
        return set(got) & COLORS == set(want) & COLORS
    verb = next(word for word in want[2:] if word.endswith("ing"))
    return verb in got


def table(asked: Sequence[Asked], own: Sequence[str], exchanged: Sequence[str]) -> str:
    """Shares of right answers by kind, and the difference with its 95 % interval."""
    rows = [
        f"{'':12}{'asked':>6}{'right':>8}{'exchanged':>11}{'more':>7}{'interval':>16}"
    ]
    kinds = [*dict.fromkeys(KINDS.values()), "all"]
    marks = np.array(
        [[right(a, x), right(a, y)] for a, x, y in zip(asked, own, exchanged)], float
    ).reshape(-1, 2)
    photos = np.array([ask.photo for ask in asked])
    for kind in kinds:
        chosen = np.array([kind in (ask.kind, "all") for ask in asked], bool)
        if not chosen.any():
            continue
        mine, other = 100 * marks[chosen].mean(0)
        low, high = interval(marks[chosen], photos[chosen])
        rows.append(
            f"{kind:12}{chosen.sum():6}{mine:8.1f}{other:11.1f}{mine - other:7.1f}"
            f"{f'{low:.1f} to {high:.1f}':>16}"
        )
    return "\n".join(rows)


def interval(marks: np.ndarray, photos: np.ndarray) -> tuple[float, float]:
    """95 % of the difference in points, by drawing photos with all their questions."""
    rng = np.random.default_rng(0)
    gains = np.zeros((photos.max() + 1, 2))
    np.add.at(gains[:, 0], photos, marks[:, 0] - marks[:, 1])
    np.add.at(gains[:, 1], photos, 1)
    gains = gains[gains[:, 1] > 0]
    drawn = gains[rng.integers(len(gains), size=(DRAWS, len(gains)))].sum(1)
    low, high = np.percentile(100 * drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(low), float(high)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("grey", "gray"))


def _animals(words: list[str]) -> set[str]:
    return {a for a, names in ANIMALS.items() if set(names.split()) & set(words)}


def _numbers(words: list[str]) -> list[int]:
    known = {**NUMBERS, "a": 1, "an": 1}
    return [
        known.get(w, int(w) if w.isdigit() else -1)
        for w in words
        if w in known or w.isdigit()
    ]


if __name__ == "__main__":  # flags here: tests import this file beside other commands
    flags.DEFINE_string("data", None, "Folder with a folder of tar shards per split.")
    flags.DEFINE_string("split", "test", "Split to ask about.")
    flags.DEFINE_string("checkpoint", "demo", "What Generator.load takes.")
    flags.DEFINE_integer(
        "limit", None, "Ask only about the first photos.", lower_bound=2
    )
    flags.DEFINE_bool("show", False, "Print every question with its answers.")
    errors.run(main)
