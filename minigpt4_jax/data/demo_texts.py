"""Conversation texts of the demo's stage 2: a photo's human captions -> (question, answer).

Nothing is invented: an answer is a caption, several captions, or a short sentence about
something on which the captions agree. "No" is said only when no caption has a word that
even hints at the thing, and a question is dropped as soon as two captions disagree.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from minigpt4_jax.data.demo_words import (
    AFTER_FALSE,
    ANIMALS,
    BEFORE_FALSE,
    COLORED,
    COLORS,
    COMMON,
    DOG_MANY,
    DOG_ONE,
    FEMALE,
    MALE,
    NOT_ACTIONS,
    NOT_ADJECTIVE,
    NOT_PEOPLE,
    NUMBERS,
    PEOPLE_MANY,
    PEOPLE_ONE,
    PRESENT,
    THINGS,
    VAGUE,
    Thing,
)
from minigpt4_jax.data.prompts import ALIGNMENT_QUESTIONS

Turn = tuple[str, str]
Captions = list[list[str]]  # the words of each caption

ONE_SENTENCE = "Describe this image in one sentence."
PARAPHRASES = (
    "Briefly describe this image.",
    "What is shown in this picture?",
    "Write a short caption for this photo.",
    "What do you see in the image?",
    "Summarize this image in a few words.",
)
IS_THERE = (
    "Is there {} in the image?",
    "Do you see {} in this picture?",
    "Can you see {} in the photo?",
)

# The first noun of a caption, its verb, and the rest, as written.
ACTION = re.compile(
    r"(?:a|an|the|one|two|three|four|five|some)(?: [a-z]+){0,3}? "
    r"(?P<subject>dogs?|man|woman|boy|girl|men|women|boys|girls|people|children|person)"
    r" (?P<is>is |are )?(?P<verb>[a-z]+)(?P<rest>[^.]*)\.",
    re.IGNORECASE,
)


def one_sentence(captions: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    """Each caption once as the answer; every other question is ONE_SENTENCE itself."""
    return [
        (ONE_SENTENCE if rng.random() < 0.5 else _pick(PARAPHRASES, rng), tidy(caption))
        for caption in dict.fromkeys(captions)
    ]


def in_detail(captions: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    """Two to four captions that add to one another, or [] where they all say the same.

    Captions that disagree with most others or with a chosen one (how many people or
    dogs, man or woman, the dog's colour) are left out.
    """
    left = _consensus(list(dict.fromkeys(captions)))
    chosen: list[str] = []
    said: set[str] = set()
    while left and len(chosen) < 4:
        new = [len(_content(caption) - said) for caption in left]
        best = int(np.argmax(new))
        caption = left.pop(best)
        content = _content(caption)
        if chosen and (new[best] < 2 or new[best] < 0.4 * len(content)):
            continue
        if any(_contradict(caption, other) for other in chosen):
            continue
        chosen.append(caption)
        said |= content
    if len(chosen) < 2:
        return []
    return [
        (_pick(ALIGNMENT_QUESTIONS, rng), " ".join(tidy(caption) for caption in chosen))
    ]


def short_questions(captions: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    """Questions with an answer of a few words on which the captions agree."""
    if len(captions) < 4:  # too few to speak of agreement
        return []
    texts = [words(caption) for caption in captions]
    return [
        *_is_there(texts, rng),
        *_which_animal(texts, rng),
        *_how_many(texts, rng),
        *_which_color(texts, rng),
        *_doing_what(captions, rng),
    ]


def tidy(caption: str) -> str:
    """The caption with single spaces, a capital first letter and a full stop."""
    text = re.sub(r"\s+([.,!?])", r"\1", " ".join(caption.split())).rstrip(" ,;")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def words(caption: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", caption.lower())


def _is_there(texts: Captions, rng: np.random.Generator) -> list[Turn]:
    turns = []
    seen = [thing for thing in THINGS if _seen(thing, texts)]
    if seen:
        thing = seen[rng.integers(len(seen))]
        plural = _agree(_plural(thing, text) for text in texts)
        if plural is not None:
            name = thing.many.split()[0] if plural else thing.name
            answer = f"Yes, there {'are' if plural else 'is'} {name}."
            turns.append((_pick(IS_THERE, rng).format(thing.name), answer))
    for thing in THINGS:
        if not _hinted(thing, texts) and rng.random() < thing.rate:
            answer = f"No, there is no {thing.name.removeprefix('a ')}."
            turns.append((_pick(IS_THERE, rng).format(thing.name), answer))
    return turns


def _which_animal(texts: Captions, rng: np.random.Generator) -> list[Turn]:
    named = {
        animal: sum(bool(_places(text, frozenset(names.split()))) for text in texts)
        for animal, names in ANIMALS.items()
    }
    present = [animal for animal, count in named.items() if count]
    if len(present) != 1 or named[present[0]] < 3:
        return []
    (animal,) = present
    plural = animal if animal == "sheep" else animal + "s"
    one, many = frozenset({animal}), frozenset({plural})
    if animal == "dog":
        one, many = DOG_ONE, DOG_MANY
    number = _agreed_number(texts, one, many)
    if number is None or (animal == "dog" and number == 1 and rng.random() > COMMON):
        return []
    article = "An" if animal[0] in "aeiou" else "A"
    count = _spelled(number).capitalize()
    answer = f"{article} {animal}." if number == 1 else f"{count} {plural}."
    return [("What animal is in the image?", answer)]


def _how_many(texts: Captions, rng: np.random.Generator) -> list[Turn]:
    turns = []
    for name, one, many in (
        ("people", PEOPLE_ONE, PEOPLE_MANY),
        ("dogs", DOG_ONE, DOG_MANY),
    ):
        if name == "people" and any(_unlisted_people(text) for text in texts):
            continue
        number = _agreed_number(texts, one, many)
        if number is not None and (number > 1 or rng.random() < COMMON):
            answer = _spelled(number).capitalize() + "."
            turns.append((f"How many {name} are in the image?", answer))
    return turns


def _which_color(texts: Captions, rng: np.random.Generator) -> list[Turn]:
    turns = []
    for noun in COLORED:
        colors = [_color(text, noun) for text in texts]
        said = [color for color in colors if color]
        several = any(noun + "s" in text or text.count(noun) > 1 for text in texts)
        if len(said) >= 2 and len(set(said)) == 1 and not several:
            color = " and ".join(said[0])
            turns.append((f"What color is the {noun}?", f"The {noun} is {color}."))
    if len(turns) > 1:
        turns = [turns[rng.integers(len(turns))]]
    return turns


def _doing_what(captions: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    texts = [words(caption) for caption in captions]
    turns = []
    for caption in captions:
        match = ACTION.fullmatch(tidy(caption))
        if match is None or len(caption.split()) > 18:
            continue
        subject, verb = match["subject"].lower(), match["verb"].lower()
        before = words(caption[: match.start("subject")])[1:]
        if NOT_ADJECTIVE & set(before) or sum(subject in text for text in texts) < 3:
            continue
        plural = subject.endswith("s") or subject in ("men", "women", "people")
        plural |= subject == "children"
        if not plural and any(_several(text, subject) for text in texts):
            continue  # "the man" would not say which one
        if match["is"] is None:
            verb = PRESENT.get(verb, "")
            if re.search(r" (and|then) [a-z]+s\b", match["rest"]):
                continue  # "is running and jumps"
        if not verb.endswith("ing") or verb in NOT_ACTIONS:
            continue
        be = "are" if plural else "is"
        rest = match["rest"].rstrip(" ,")
        answer = f"The {subject} {be} {verb}{rest}."
        turns.append((f"What {be} the {subject} doing?", answer))
    return [turns[rng.integers(len(turns))]] if turns else []


def _seen(thing: Thing, texts: Captions) -> bool:
    unless = tuple(thing.unless.split())
    if any(word.startswith(unless) for text in texts for word in text if unless):
        return False
    return sum(bool(_places(text, thing.words)) for text in texts) >= thing.least


def _hinted(thing: Thing, texts: Captions) -> bool:
    every = set().union(*texts)
    if any(word in thing.whole or word.startswith(thing.starts) for word in every):
        return True
    person = thing.name in ("a man", "a woman", "a boy", "a girl")
    return person and any(_may_be_person(word) for word in every)


def _may_be_person(word: str) -> bool:
    """Ends like a skier, cyclist, sailor or policeman, and is not a listed person."""
    if word in NOT_PEOPLE or word in PEOPLE_ONE or word in PEOPLE_MANY:
        return False
    return re.search(r"(er|or|ist|man)s?$|men$|^athlet|^team", word) is not None


def _unlisted_people(text: list[str]) -> bool:
    more = {"baby", "couple", "adult", "adults", "male", "female", "someone", "family"}
    return bool(more & set(text)) or any(_may_be_person(word) for word in text)


def _places(text: list[str], names: Iterable[str]) -> list[int]:
    """Where a caption names something, toys and dog houses left out."""
    return [
        i
        for i, word in enumerate(text)
        if word in names
        and not BEFORE_FALSE.intersection(text[max(i - 1, 0) : i])
        and not AFTER_FALSE.intersection(text[i + 1 : i + 2])
    ]


def _plural(thing: Thing, text: list[str]) -> bool | None:
    places = _places(text, thing.words)
    if not places:
        return None
    return len(places) == 1 and text[places[0]] in thing.many.split()


def _number(
    text: list[str], one: frozenset[str], many: frozenset[str]
) -> tuple[int | None, bool]:
    """(how many a caption counts, whether by a number word); None where it is vague."""
    total, spelled = 0, False
    for i, word in enumerate(text):
        if word not in one and word not in many:
            continue
        start = next(
            (j for j in range(i - 1, max(i - 6, -1), -1) if _determines(text[j])), None
        )
        first = "a" if start is None and i <= 2 else start and text[start]
        if start == 0:
            first = text[0]
        between = text[(start or 0) + 1 : i] if start is not None else []
        if first is None or NOT_ADJECTIVE & (set(between) - {"and"}):
            return None, False
        if first in ("the", "one") and total:
            return None, False  # may be one that was counted before
        if word in many:
            if NUMBERS.get(first, 0) < 2:
                return None, False
            total, spelled = total + NUMBERS[first], True
        elif NUMBERS.get(first, 1) != 1:
            return None, False
        else:
            total += 1
    return (total or None), spelled


def _agreed_number(
    texts: Captions, one: frozenset[str], many: frozenset[str]
) -> int | None:
    """The number that three captions give and none contradicts.

    Above one, two captions must spell it ("two", "three"); one needs every caption.
    """
    if any(VAGUE & set(text) for text in texts):
        return None
    counts = [_number(text, one, many) for text in texts]
    known = [number for number, _ in counts if number is not None]
    if len(known) < 3 or len(set(known)) > 1:
        return None
    if known[0] == 1:
        return 1 if len(known) == len(texts) else None
    return known[0] if sum(spelled for _, spelled in counts) >= 2 else None


def _determines(word: str) -> bool:
    return word in NUMBERS or word in ("a", "an", "the", "another", "his", "her", "its")


def _spelled(number: int) -> str:
    return {value: word for word, value in NUMBERS.items()}.get(number, str(number))


def _color(text: list[str], noun: str) -> tuple[str, ...]:
    """The colours just before a noun, in alphabetical order; () where there is none."""
    colors = []
    for i in _places(text, {noun}):
        for word in reversed(text[:i]):
            if word in COLORS:
                colors.append("gray" if word == "grey" else word)
            elif word == "and" and colors:
                continue  # "black and white"; in "red shirt and hat" the hat has none
            elif colors or word == "and" or word in NOT_ADJECTIVE or _determines(word):
                break
    return tuple(sorted(set(colors)))


def _several(text: list[str], subject: str) -> bool:
    plural = {"man": "men", "woman": "women", "person": "people"}
    other = {"another", "other", "others", "two", "three", "group", "couple", "people"}
    return (
        text.count(subject) > 1
        or plural.get(subject, subject + "s") in text
        or bool(other & set(text))
    )


def _consensus(captions: list[str]) -> list[str]:
    """Without the captions that contradict at least half of the others."""
    return [
        caption
        for caption in captions
        if 2 * sum(_contradict(caption, other) for other in captions)
        < max(len(captions) - 1, 1)
    ]


def _contradict(caption: str, other: str) -> bool:
    ours, theirs = words(caption), words(other)
    numbers = [_number(text, PEOPLE_ONE, PEOPLE_MANY)[0] for text in (ours, theirs)]
    if None not in numbers:
        if numbers[0] != numbers[1]:
            return True
        male, female = (
            [bool(sex & set(text)) for text in (ours, theirs)] for sex in (MALE, FEMALE)
        )
        if male[0] != male[1] and female[0] != female[1] and male[0] != female[0]:
            return True
    numbers = [_number(text, DOG_ONE, DOG_MANY)[0] for text in (ours, theirs)]
    if None not in numbers and numbers[0] != numbers[1]:
        return True
    colors = _color(ours, "dog"), _color(theirs, "dog")
    return all(colors) and colors[0] != colors[1]


def _content(caption: str) -> set[str]:
    """Words that carry meaning, with the plainest endings and synonyms removed."""
    same = {"guy": "man", "lady": "woman", "kid": "child", "bike": "bicycle"}
    filler = "a an the is are in on of with by at and to it its his her their while"
    stems = {re.sub(r"(ing|es|s|ed)$", "", word) for word in words(caption)}
    return {same.get(stem, stem) for stem in stems} - set(filler.split()) - {"", "i"}


def _agree(values: Iterable[bool | None]) -> bool | None:
    known = {value for value in values if value is not None}
    return known.pop() if len(known) == 1 else None


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]
