"""What a data set holds, told before anything is trained on it: Examples -> lines of text.

Counts, sizes and copies come from the index. Whether an image can be read shows only when
it is decoded: all of them, or a sample.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt4_jax.data import workers
from minigpt4_jax.data.contact_sheet import contact_sheet
from minigpt4_jax.data.images import read_image
from minigpt4_jax.data.sources import Examples
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.errors import DataError, InputError

SAMPLE = 1_000  # examples looked at, unless all are
AT_ONCE = 250  # of them, in one worker
FEW = 3  # named of a kind
SHOWN = 36  # on a contact sheet


@dataclass
class Looked:
    """What the examples themselves show."""

    examples: int = 0
    words: Counter[int] = field(default_factory=Counter)  # captions by their words
    licenses: Counter[str] = field(default_factory=Counter)  # "": not recorded
    sources: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    places: list[str] = field(default_factory=list)  # of some unreadable, with reasons

    def add(self, other: "Looked") -> None:
        self.examples += other.examples
        self.words.update(other.words)
        self.licenses.update(other.licenses)
        self.sources.update(other.sources)
        self.unreadable += other.unreadable
        self.places = [*self.places, *other.places][:FEW]


def look(examples: Examples, decode: bool = False) -> Looked:
    """Read and decode all examples, or SAMPLE of them, the same ones each time.

    Raises DataError if not one image can be decoded.
    """
    chosen = sample(len(examples), len(examples) if decode else SAMPLE)
    parts = [chosen[i : i + AT_ONCE] for i in range(0, len(chosen), AT_ONCE)]
    several = workers.available() if len(parts) > 4 else 1
    found = Looked()
    with tqdm(desc="images", total=len(chosen), unit_scale=True, disable=None) as bar:
        for part in workers.ordered(partial(look_at, examples), parts, several):
            found.add(part)
            bar.update(part.examples)
    if found.unreadable == found.examples:
        raise DataError(
            f"no usable example: none of {found.examples:,} images can be decoded: "
            f"{'; '.join(found.places)}"
        )
    return found


def look_at(examples: Examples, numbers: np.ndarray) -> Looked:
    """What some examples show."""
    found = Looked(examples=len(numbers))
    for i in numbers:
        found.words.update(len(text.split()) for text in examples.captions(i))
        try:
            example = examples[i]
            read_image(example.image)
        except (DataError, InputError) as error:
            found.unreadable += 1
            found.places.append(f"{examples.where(i)} ({error})")
            continue
        found.licenses[example.license] += 1
        found.sources[_host(example.source)] += 1
    return found


def told(
    examples: Examples, looked: Looked, tokenizer: Tokenizer | None = None
) -> Iterator[str]:
    """The report, line by line; the tokenizer counts captions as they are written."""
    whole = looked.examples == len(examples)
    part = "" if whole else f" of {looked.examples:,} looked at"
    captions = examples.caption_count
    yield f"examples    {len(examples):,}"
    yield f"captions    {captions:,}, {captions / len(examples):.3g} an image"
    yield f"  words     {_spread(_values(looked.words))}{part}"
    if tokenizer is not None:
        _, tokens = examples.token_counts(tokenizer, None)
        yield f"  tokens    {_spread(np.sort(tokens))}"
    total = int(examples.image_bytes.sum(dtype=np.int64))
    yield f"images      {_size(total)} in {_names(examples.paths)}"
    for name, sides in zip(("width", "height"), examples.image_sizes.T):
        yield f"  {name:<10}{_spread(np.sort(sides))} pixels"
    yield f"unreadable  {looked.unreadable or 'none'}{part}"
    yield from (f"  {place}" for place in looked.places)
    yield from _copies(examples)
    yield from _left_out(examples)
    yield from _most("licences", looked.licenses, part)
    yield from _most("sources", looked.sources, part)


def check_sheet(path: Path) -> None:
    """Raise InputError for a name that is no picture's."""
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
        raise InputError(
            f"--sheet {path}: want a name that ends in .jpg, .png or .webp"
        )


def draw(examples: Examples, path: Path) -> None:
    """Write a contact sheet of some examples, each with its first caption."""
    photos = [
        (_readable(examples, i), examples.captions(i)[0])
        for i in sample(len(examples), SHOWN)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(photos).save(path)


def sample(count: int, most: int) -> np.ndarray:
    """At most so many of `count` numbers, in order; the same ones each time."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _left_out(examples: Examples) -> Iterator[str]:
    total = examples.skipped.total()
    yield f"left out    {f'{total:,}' if total else 'nothing'}"
    for reason, count in examples.skipped.most_common():
        places = examples.places.get(reason, [])
        more = ["..."] if 0 < len(places) < count else []
        where = f" ({', '.join([*places, *more])})" if places else ""
        yield f"  {count:,} {reason}{where}"


def _copies(examples: Examples) -> Iterator[str]:
    """Images with the content of another one."""
    order = np.argsort(examples.hashes, kind="stable")
    hashes = examples.hashes[order]
    again = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    yield f"duplicates  {len(again) or 'none'}"
    for i in again[:FEW]:
        yield f"  {examples.where(order[i])} is also {examples.where(order[i - 1])}"


def _readable(examples: Examples, i: int) -> np.ndarray | None:
    try:
        return read_image(examples.image(i))
    except (DataError, InputError):
        return None


def _values(counts: Counter[int]) -> np.ndarray:
    """The values counted, each as often as it was, in order."""
    values = np.array(sorted(counts))
    return np.repeat(values, [counts[value] for value in values])


def _spread(values: np.ndarray) -> str:
    """Least, median and most of sorted values."""
    return f"{values[0]} to {values[-1]}, median {values[len(values) // 2]}"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1_000:
            return f"{count:.3g} {unit}"
        count /= 1_000
    return f"{count:,.3g} TB"


def _names(paths: Sequence[Path]) -> str:
    if len(paths) == 1:
        return paths[0].name or str(paths[0])
    return f"{len(paths):,} shards"


def _most(title: str, counts: Counter[str], part: str) -> Iterator[str]:
    """The most frequent, with their counts."""
    named = [name for name in counts if name]
    known = sum(counts[name] for name in named)
    yield f"{title:<12}{f'{known:,} recorded' if known else 'not recorded'}{part}"
    most = counts.most_common(2 * FEW + 1)
    yield from (f"  {count:,} {name}" for name, count in most if name)
    if rest := len(named) - sum(bool(name) for name, _ in most):
        yield f"  and {rest:,} others"


def _host(source: str) -> str:
    """A source's site; a source that is no address stays as it is."""
    address = re.match(r"\w+://([^/?#]+)", source)
    return address[1] if address else source
