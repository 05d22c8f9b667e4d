"""The index of a data set on disk: made once, then mapped into memory.

A folder with

    rows        ROW of every example: where its image lies, how large it is, its hash
    texts       what belongs to it as text, one JSON list after another: key, licence,
                source, image path (where the image is its own file), captions
    meta.json   counts, the digest, and what was left out of each shard

An example costs 40 bytes in `rows`, and in `texts` its captions, key, licence and source
with some 16 bytes of quotes and commas; nothing of it has to be in memory.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.errors import DataError

FORMAT = 1
PLACES = 3  # examples named for each reason why some were left out

ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("size", "<u4"),  # of the image in bytes
        ("offset", "<i8"),  # of the image in its shard; 0 where it is its own file
        ("text", "<i8"),  # offset in `texts`
        ("length", "<u4"),  # of the text in bytes
        ("image_size", "<u2", 2),  # width, height; 65,535 for more
        ("hash", "<u8"),  # first 8 bytes of the image's sha256
    ]
)


@dataclass
class Found:
    """What a scan found in a part of a shard."""

    shard: int
    work: int  # as in Listing.total
    rows: list[tuple] = field(default_factory=list)
    texts: bytearray = field(default_factory=bytearray)
    digests: bytearray = field(default_factory=bytearray)  # 32 bytes an example
    captions: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # examples left out
    notes: Counter[str] = field(default_factory=Counter)  # left out of examples kept
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> first keys

    def add(self, key, text, offset, size, image_size, sha256: bytes) -> None:
        """Keep an example; `text` is its list of the module's docstring, less the key."""
        data = json.dumps([key, *text], ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        width, height = (min(side, 65_535) for side in image_size)
        row = (self.shard, size, offset, len(self.texts), len(data), (width, height))
        self.rows.append((*row, int.from_bytes(sha256[:8], "little")))
        self.texts += data
        told = json.dumps([key, *text[3:]]).encode()  # key and captions
        self.digests += hashlib.sha256(sha256 + told).digest()
        self.captions += len(text) - 3

    def lose(self, reason: str, key: str = "", count: int = 1) -> None:
        """Leave out an example, or several."""
        self.lost[reason] += count
        self._name(reason, key)

    def note(self, reason: str, key: str = "", count: int = 1) -> None:
        """Leave out something that costs no example."""
        if count:
            self.notes[reason] += count
            self._name(reason, key)

    def _name(self, reason: str, key: str) -> None:
        places = self.places.setdefault(reason, [])
        if key and len(places) < PLACES:
            places.append(key)


@dataclass(frozen=True)
class Index:
    """An index as it lies on disk."""

    folder: Path
    meta: dict[str, Any]
    rows: np.ndarray  # of ROW, mapped
    texts: np.ndarray  # bytes, mapped

    def text(self, i: int) -> list[str]:
        """Key, licence, source, image path, captions."""
        row = self.rows[i]
        start = int(row["text"])
        data = self.texts[start : start + int(row["length"])].tobytes()
        return json.loads(data.decode("utf-8", "surrogatepass"))


def read(folder: Path) -> Index:
    """Map an index. Raises DataError when it is gone, as after a change of the data."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        count, length = meta["examples"], meta["text_bytes"]
        if not count:  # an empty file cannot be mapped
            return Index(folder, meta, np.zeros(0, ROW), np.zeros(0, np.uint8))
        rows = np.memmap(folder / "rows", ROW, "r", shape=(count,))
        texts = np.memmap(folder / "texts", np.uint8, "r", shape=(length,))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: the index of the data set cannot be read ({error}); did the data "
            "change since this run began? Delete the folder and start again"
        ) from error
    # Plain arrays over the same pages: memmap's own indexing costs three times as much.
    return Index(folder, meta, rows.view(np.ndarray), texts.view(np.ndarray))


def is_whole(folder: Path) -> bool:
    """Whether a folder is a whole index of this version."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return (
            meta["format"] == FORMAT
            and (folder / "rows").stat().st_size == meta["examples"] * ROW.itemsize
            and (folder / "texts").stat().st_size == meta["text_bytes"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
