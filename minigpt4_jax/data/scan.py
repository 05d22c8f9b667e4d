"""What a part of a data set holds: a tar, or image files with their captions -> Found.

Each image is read once, for its hash and for what its header says; none is decoded, so
damage inside an image shows only when it is used.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from minigpt4_jax.data import tars
from minigpt4_jax.data.images import FORMATS, MAX_PIXELS, MAX_SIDE, SUFFIXES
from minigpt4_jax.data.index import Found
from minigpt4_jax.errors import DataError

MAX_BYTES = 6 * MAX_PIXELS  # of an image file: 16 bits a channel, uncompressed
MAX_TEXT = 2**20  # bytes of one caption file
LABELS = frozenset((".json", ".txt"))


class Fault(Exception):
    """Why something is left out: a few words that are counted."""


class Facts(NamedTuple):
    """What the index keeps of an image."""

    offset: int
    size: int
    image_size: tuple[int, int]  # width, height
    sha256: bytes


@dataclass
class Label:
    """What was written about an image."""

    captions: list[str]  # none blank
    license: str = ""
    source: str = ""
    notes: Counter[str] = field(default_factory=Counter)  # captions left out


class Loose(NamedTuple):
    """An image in its own file, and its label or the files of it."""

    key: str
    image: str  # path
    label: Label | Fault | tuple[str, ...]  # as read; or paths of .json and .txt


def scan_tar(part: tuple[int, Path, int]) -> Found:
    """The examples of a tar, in order of their images.

    One example is KEY.jpg (or another image suffix) with KEY.json or KEY.txt. The rest of
    a damaged tar is lost: counted as the example at the damage and those whose headers
    are still there behind it. Captions of one shard are in memory while it is scanned.

    Args:
        part: number of the shard, its path, its size.
    """
    shard, path, size = part
    found = Found(shard, work=size)
    images: dict[str, Facts | Fault] = {}
    labels: dict[str, dict[str, Label | Fault]] = {}
    again: Counter[tuple[str, str]] = Counter()
    key, damage = "", None
    try:
        with open(path, "rb", buffering=2**20) as file:
            length = os.fstat(file.fileno()).st_size
            _refuse_compressed(path, file.read(8))
            try:
                for member in tars.members(file, length):
                    key, suffix = split(member.name)
                    if suffix in LABELS and member.plain:
                        label = labels.setdefault(key, {})
                        if suffix in label:
                            again[key, suffix] += 1
                        else:
                            label[suffix] = _label(file, member.size, suffix)
                    elif suffix in SUFFIXES:
                        if key in images:
                            again[key, "image"] += 1
                        else:
                            images[key] = _image(file, member)
            except tars.Damage as error:
                damage = error
                lost = tars.count_after(
                    file, error.at, lambda name: split(name)[1] in SUFFIXES
                )
    except OSError as error:
        damage, lost = tars.Damage(f"not readable ({error.strerror})", 0), 0
    if damage is not None:
        found.lose(f"tar {damage}", count=1 + lost)
        if (key in images) != (key in labels):  # its other half is behind the damage
            images.pop(key, None)
            labels.pop(key, None)
    most: dict[str, int] = {}  # a pair that comes again is one example, not two
    for (key, _), count in again.items():
        most[key] = max(count, most.get(key, 0))
    for key, count in most.items():
        found.lose("duplicate key", key, count)
    for key, facts in images.items():
        _keep(found, key, facts, labels.pop(key, {}), "")
    for key in labels:
        found.lose("caption without image", key)
    return found


def scan_loose(part: tuple[int, Path, list[Loose]]) -> Found:
    """The examples of some image files; paths are relative to a folder."""
    shard, base, records = part
    found = Found(shard, work=len(records))
    for record in records:
        labels: dict[str, Label | Fault] = {}
        if isinstance(record.label, Fault):
            found.lose(str(record.label), record.key)
            continue
        if isinstance(record.label, Label):
            labels[".json"] = record.label
        else:
            for name in record.label:
                suffix = split(name)[1]
                labels[suffix] = _label_file(base / name, suffix)
        _keep(found, record.key, _image_file(base / record.image), labels, record.image)
    return found


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, name in tars.COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path}: compressed with {name}; want an uncompressed .tar, which can be "
                "read at any place: unpack it first"
            )


def split(name: str) -> tuple[str, str]:
    """Key and lower-case suffix: "a/00.Seg.JPG" -> ("a/00.Seg", ".jpg").

    A hidden name, as macOS adds to tars, has none.
    """
    key, suffix = os.path.splitext(name)
    return key, "" if hidden(name) else suffix.lower()


def hidden(name: str) -> bool:
    """Whether a part of a relative path is hidden; "." itself is not."""
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def label_of(fields: object) -> Label:
    """The label that an object of JSON is: `captions`, `caption` or `text`.

    Raises Fault if it is none.
    """
    if not isinstance(fields, dict):
        raise Fault("json not readable")
    given = (fields.get(name) for name in ("captions", "caption", "text"))
    written: Any = next((value for value in given if value not in (None, [])), [])
    if isinstance(written, str):
        written = [written]
    if not isinstance(written, list):
        raise Fault("json not readable")
    label = Label([], _string(fields.get("license")), _string(fields.get("source")))
    for text in written:
        if not isinstance(text, str) or not text.strip():
            label.notes["blank caption"] += 1
        elif not _is_text(text):
            label.notes["caption with half a surrogate pair"] += 1
        else:
            label.captions.append(text.strip())
    return label


def _keep(found: Found, key: str, facts, labels: dict, image: str) -> None:
    """Add an example, or count why not. A JSON's captions win over a text file's."""
    label = labels.get(".json")
    if not (isinstance(label, Label) and label.captions) and ".txt" in labels:
        if isinstance(label, Fault):
            found.note(str(label), key)
        said, label = label, labels[".txt"]
        if isinstance(said, Label) and isinstance(label, Label):
            label.license, label.source = said.license, said.source
    if isinstance(facts, Fault):
        found.lose(str(facts), key)
    elif label is None:
        found.lose("image without caption", key)
    elif isinstance(label, Fault):
        found.lose(str(label), key)
    elif not label.captions:
        found.lose(next(iter(label.notes), "no caption"), key)
    else:
        for reason, count in label.notes.items():
            found.note(reason, key, count)
        text = [label.license, label.source, image, *label.captions]
        found.add(key, text, *facts)


def _image(file, member: tars.Member) -> Facts | Fault:
    """Facts of the image at which a tar stands."""
    if not member.plain:
        return Fault("link or special file")
    return _facts(file, member.offset, member.size)


def _image_file(path: Path) -> Facts | Fault:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a device or a pipe may never end
            return Fault("image is no file")
        with open(path, "rb", buffering=0) as file:
            return _facts(file, 0, status.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return Fault("image file absent")
    except (OSError, ValueError):  # ValueError: a null character in the path
        return Fault("image file not readable")


def _facts(file, offset: int, size: int) -> Facts | Fault:
    if not size:
        return Fault("empty image")
    if size > MAX_BYTES:
        return Fault(f"image file over {MAX_BYTES:,} bytes")
    data = file.read(size)
    if len(data) < size:
        return Fault("image not readable")
    try:
        return Facts(offset, size, header(data), hashlib.sha256(data).digest())
    except Fault as fault:
        return fault


def header(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image; raises Fault for what is known to fail."""
    try:
        with Image.open(BytesIO(data), formats=_formats()) as opened:
            width, height = opened.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Fault(f"image over {MAX_PIXELS:,} pixels") from None
    except Exception:  # damaged headers raise anything
        raise Fault("not an image") from None
    if width * height > MAX_PIXELS:
        raise Fault(f"image over {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_SIDE:
        raise Fault(f"image side over {MAX_SIDE:,} pixels")
    if not width * height:
        raise Fault("image of 0 pixels")
    if data.startswith(b"\xff\xd8") and not _has_end(data):
        raise Fault("truncated JPEG")
    return width, height


def _has_end(data: bytes) -> bool:
    """Whether a JPEG's end marker follows the start of its first scan.

    Compressed data never holds the marker by chance, and the thumbnail in a header, which
    has one of its own, comes before.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", at) >= 0
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 1:  # no length follows
            at += 1 if marker == 0xFF else 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.rfind(b"\xff\xd9", 2) >= 0  # an odd header: the decoder will tell


def _label_file(path: Path, suffix: str) -> Label | Fault:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Fault("caption is no file")
        with open(path, "rb") as file:
            return _label(file, os.fstat(file.fileno()).st_size, suffix)
    except OSError:
        return Fault("caption file not readable")


def _label(file, size: int, suffix: str) -> Label | Fault:
    """The label in the next bytes of a file."""
    if size > MAX_TEXT:
        return Fault(f"caption file over {MAX_TEXT:,} bytes")
    data = file.read(size)
    if suffix == ".txt":
        try:
            return label_of({"caption": data.decode("utf-8-sig")})
        except UnicodeDecodeError:
            return Fault("caption not UTF-8")
    try:
        return label_of(json.loads(data))
    except (ValueError, RecursionError):  # nested too deep
        return Fault("json not readable")
    except Fault as fault:
        return fault


def _string(value: object) -> str:
    text = str(value or "")
    return text if _is_text(text) else ""


def _is_text(text: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return True
    return False


@cache
def _formats() -> list[str]:
    """The decoders that this PIL has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
