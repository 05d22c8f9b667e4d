"""Photos of a conversation: an uploaded file -> what the model and the page see.

Also the example photos, with questions and credits.
"""

import dataclasses
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4_jax.data.images import PixelRules, read_image, squash
from minigpt4_jax.errors import InputError

FOLDER = Path(__file__).parent.parent / "assets/photos"
QUESTIONS = {
    "dog.jpg": "What animal is in the photo?",
    "horses.jpg": "Describe this image in one sentence.",
    "skateboard.jpg": "What is the man doing?",
    "seagull.jpg": "Describe this image in detail.",
    "bus.jpg": "What is in this photo?",
    "cat.jpg": "What colour is the animal?",
}

MAX_PIXELS = 50_000_000  # 150 MB decoded; more than a phone's camera gives
DECODED_AT_ONCE = 2
LONG_SIDE = 768  # of the copy that the page shows


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo as the model sees it and as the page shows it.

    squashed_HWC: of the model's size, so that a conversation keeps no large images; the
        model sees exactly what it would of the original.
    shown: path of a small JPEG without the original's metadata.
    key: equal for equal files.
    """

    squashed_HWC: np.ndarray
    shown: str
    key: str


class Album:
    """Reads photos for one model.

    Args:
        folder: where the copies that the page shows are written.
    """

    def __init__(self, rules: PixelRules, folder: Path):
        self._rules = rules
        self._folder = folder
        # Each decoded photo may take 150 MB.
        self._decoding = threading.Semaphore(DECODED_AT_ONCE)

    def read(self, path: str | Path) -> Photo:
        """A photo out of a file of any kind; raises InputError in words for its owner."""
        try:
            data = Path(path).read_bytes()
        except OSError:  # its text has the path, which is of this machine
            raise InputError(
                "The photo is not there any more; show it again."
            ) from None
        key = hashlib.sha256(data).hexdigest()
        with self._decoding:
            # From bytes, so that an error does not name a path of this machine.
            image_HWC = read_image(data, MAX_PIXELS)
            shown = self._folder / f"{key[:32]}.jpg"
            try:
                os.utime(shown)  # young again for whoever deletes old files
            except FileNotFoundError:
                copy = Image.fromarray(image_HWC)
                copy.thumbnail((LONG_SIDE, LONG_SIDE))
                # Renamed when whole: another session may look for the same photo.
                part = shown.with_suffix(f".{uuid.uuid4().hex}.part")
                copy.save(part, "JPEG", quality=88)
                part.replace(shown)
            return Photo(squash(image_HWC, self._rules), str(shown), key)


@dataclasses.dataclass(frozen=True)
class Example:
    """A sample photo: its path, something to ask, and whose it is under which licence."""

    path: str
    question: str
    credit: str

    @property
    def name(self) -> str:
        return Path(self.path).stem


def examples() -> Sequence[Example]:
    """The photos in `assets/photos`."""
    credits = json.loads((FOLDER / "credits.json").read_text())
    return [
        Example(str(FOLDER / c["file"]), QUESTIONS[c["file"]], _credit(c))
        for c in credits
    ]


def _credit(entry: dict) -> str:
    author = entry.get("author") or f"the owner of Flickr photo {entry['flickr_photo']}"
    return f"{author}, {entry['license']} ({entry['source']})"
