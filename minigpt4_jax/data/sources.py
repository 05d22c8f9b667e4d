"""Where images come from: captioned photos of a data set, or a user's files.

`open_data` gives training examples by index, whatever the data lies in; `list_images`
lists what a batch run answers about. Neither decodes an image.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index as as_index
from pathlib import Path

import numpy as np

from minigpt4_jax.data import build, index, layouts
from minigpt4_jax.data.images import SUFFIXES
from minigpt4_jax.data.scan import hidden
from minigpt4_jax.data.token_counts import Clean, token_counts
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.errors import DataError, InputError

OPEN_FILES = 256  # kept open; systems allow 1,024 or more
BUDGET = 0.01


@dataclass(frozen=True)
class Example:
    """A photo and what people wrote about it."""

    key: str  # name in its shard without suffix, or as a list names it
    image: bytes  # the encoded file
    captions: tuple[str, ...]  # at least one, none blank
    license: str  # "" if not recorded
    source: str  # "" if not recorded


@dataclass(frozen=True)
class ImageRecord:
    """One input of a batch run; the file may be absent or damaged."""

    name: str  # as the user would write it: relative to the folder, or as in the list
    path: Path
    prompt: str | None = None  # None: the prompt of the run


def open_data(
    path: str | Path, *, budget: float = BUDGET, index_dir: str | Path | None = None
) -> "Examples":
    """The examples of a data set in any layout of data/layouts.py.

    The first time the data is scanned and an index written, beside it, or where it is
    read-only into the cache folder; a scan that is interrupted goes on where it stopped.

    Args:
        budget: share of a shard's examples that may be unusable.
        index_dir: where the index is kept instead.

    Raises:
        DataError: nothing there, no usable example, or a shard over the budget.
    """
    path = Path(path).expanduser()
    if path.is_dir() and any(
        ".array_record" in entry.name for entry in os.scandir(path)
    ):
        from minigpt4_jax.data import records  # it needs array_record, most do not

        return records.open_records(path, budget=budget, index_dir=index_dir)
    listing = layouts.listing(path)
    folder = build.made(listing, Path(index_dir) if index_dir else None)
    examples = Examples(folder, listing.base)
    examples.check(budget)
    return examples


class Examples(Sequence[Example]):
    """Random access to the examples of a scanned data set.

    Picklable and read from any number of threads and processes. In memory is what has been
    touched of the index (data/index.py), and nothing of it has to stay.

    Attributes:
        paths: the shards (or the list, or the folder).
        digest: hex sha256 of all images, keys and captions in order.
        keys: key of each example, read as needed.
        hashes: first 8 bytes of each image's sha256, uint64.
        image_sizes: uint16 [N 2], width and height as the headers say, mapped.
        image_bytes: uint32 [N], how large each encoded image is, mapped.
        caption_count: captions of all examples.
        skipped: how many examples, and captions of others, were left out, by reason.
        places: some of those examples for each reason.
    """

    def __init__(self, folder: Path, base: Path):
        """Args: folder of the index; base, which the names of shards are relative to."""
        self._state = (folder, base)
        self._index = index.read(folder)
        meta = self._index.meta
        self.paths = tuple(base / shard["name"] for shard in meta["shards"])
        self.digest: str = meta["digest"]
        self.caption_count: int = meta["captions"]
        self.keys: Sequence[str] = _Keys(self)
        self.hashes: np.ndarray = self._index.rows["hash"]
        self.image_sizes: np.ndarray = self._index.rows["image_size"]
        self.image_bytes: np.ndarray = self._index.rows["size"]
        self.skipped: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        for path, shard in zip(self.paths, meta["shards"]):
            self.skipped += Counter(shard["lost"]) + Counter(shard["notes"])
            for reason, keys in shard["places"].items():
                known = self.places.setdefault(reason, [])
                known += [f"{path}: {key}" for key in keys][: index.PLACES - len(known)]
        # Per object: another file under the same name belongs to another index.
        self._open = lru_cache(OPEN_FILES)(_open)

    def __len__(self) -> int:
        return len(self._index.rows)

    def __getstate__(self) -> tuple[Path, Path]:
        return self._state

    def __setstate__(self, state: tuple[Path, Path]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __getitem__(self, i: int) -> Example:  # type: ignore[override]
        """Raises DataError if the image cannot be read any more."""
        key, license, source, file, *captions = self._index.text(self._at(i))
        image = self._image(self._at(i), file)
        return Example(key, image, tuple(captions), license, source)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def captions(self, i: int) -> tuple[str, ...]:
        """An example's captions alone: its image is not read."""
        return tuple(self._index.text(self._at(i))[4:])

    def image(self, i: int) -> bytes:
        """An example's encoded image alone; raises as indexing."""
        i = self._at(i)
        return self._image(i, self._index.text(i)[3])

    def token_counts(
        self, tokenizer: Tokenizer, clean: Clean | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every caption: `starts` int64 [N + 1], `counts` int32.

        Example i has counts[starts[i]:starts[i + 1]]. `clean` is done to a caption first.
        Kept beside the index.
        """
        return token_counts(self._index, tokenizer, clean)

    def where(self, i: int) -> str:
        """ "shard.tar: KEY", for messages."""
        i = self._at(i)
        return f"{self.paths[self._index.rows[i]['shard']]}: {self._index.text(i)[0]}"

    def left_out(self) -> str:
        """`skipped` for a log: "2 empty image, 1 blank caption", or "nothing"."""
        return _told(self.skipped)

    def check(self, budget: float) -> None:
        """Raise DataError without examples, or naming shards that lost more than `budget`."""
        over = []
        for path, shard in zip(self.paths, self._index.meta["shards"]):
            lost = sum(shard["lost"].values())
            if lost > budget * (lost + shard["kept"]):
                over.append(
                    f"{path}: {lost} of {lost + shard['kept']} examples cannot be used "
                    f"({_told(shard['lost'])})"
                )
        if not len(self):
            names = ", ".join(map(str, self.paths[:3]))
            raise DataError(
                f"{names}: no usable example ({_told(self.skipped)}); want KEY.jpg with "
                "KEY.json or KEY.txt, or a list of images and captions"
            )
        if over:
            more = f"; and {len(over) - 3} more shards" if len(over) > 3 else ""
            raise DataError(
                f"{'; '.join(over[:3])}{more}; want at most a share of {budget:g}: get "
                "these files again, or allow more (config.loader.budget)"
            )

    def _at(self, i: int) -> int:
        at = as_index(i)
        at += len(self) if at < 0 else 0
        if not 0 <= at < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        return at

    def _image(self, i: int, name: str) -> bytes:
        row = self._index.rows[i]
        size, shard = int(row["size"]), self.paths[row["shard"]]
        path = self._state[1] / name if name else shard
        try:
            # Named, for the file closes with its last reference: another thread may
            # drop it from the cache meanwhile.
            file = _open(path) if name else self._open(path)
            more = 1 if name else 0  # a file that grew is another
            image = os.pread(file.fileno(), size + more, int(row["offset"]))
        except OSError as error:
            raise DataError(
                f"{self.where(i)}: not readable any more ({error.strerror})"
            ) from error
        if len(image) != size:
            raise DataError(f"{self.where(i)}: changed since it was scanned")
        return image


class _Keys(Sequence[str]):
    def __init__(self, examples: Examples):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        return self._examples._index.text(self._examples._at(i))[0]


def _open(path: Path):
    return open(path, "rb", buffering=0)


def _told(reasons: Counter[str] | dict[str, int]) -> str:
    counts = Counter(reasons).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in counts) or "nothing"


def list_images(path: str | Path) -> list[ImageRecord]:
    """List a folder (recursively, sorted), one image file, or a LIST.jsonl.

    A line of a list is an object with `image` (a path, relative to the list) and
    optionally `prompt`; other fields and blank lines are ignored. Hidden files are left
    out of a folder. Images are not opened: an absent one is for the run to report.

    Raises:
        InputError: nothing there, or a line that is not such an object, by its number.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(
            file.relative_to(path).as_posix()
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        names = [name for name in found if not hidden(name)]
        if not names:
            known = " ".join(sorted(SUFFIXES))
            raise InputError(f"{path}: no image in this folder; looked for {known}")
        return [ImageRecord(name, path / name) for name in names]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".jsonl":
        return _read_list(path)
    return [ImageRecord(str(path), path)]


def _read_list(path: Path) -> list[ImageRecord]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    records = [
        _record(line, path, number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not records:
        raise InputError(f"{path}: the list is empty")
    return records


def _record(line: str, path: Path, number: int) -> ImageRecord:
    where = f"{path}, line {number}"
    want = 'want {"image": "photo.jpg", "prompt": "..."}, prompt optional'
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); {want}") from None
    image = fields.get("image") if isinstance(fields, dict) else None
    if not isinstance(image, str) or not image:
        raise InputError(f"{where}: no image; {want}")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | None):
        kind = type(prompt).__name__
        raise InputError(f"{where}: the prompt is {kind}; {want}")
    if re.search(r"[\ud800-\udfff]", prompt or ""):
        raise InputError(
            f"{where}: the prompt holds half of a surrogate pair, which is no text; {want}"
        )
    return ImageRecord(image, path.parent / image, prompt)
