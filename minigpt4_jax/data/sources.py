"""Where images come from: captioned photos in tar shards, or a user's files.

`TarShards` gives training examples by index; `list_images` lists what a batch run answers
about. Neither decodes an image.
"""

import json
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path

from minigpt4_jax.data.images import SUFFIXES
from minigpt4_jax.errors import DataError, InputError


@dataclass(frozen=True)
class Example:
    """A photo and what people wrote about it."""

    key: str  # name inside its shard, without suffix
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


class TarShards:
    """Random access to the examples of uncompressed webdataset shards.

    One example is KEY.jpg (or another image suffix) with KEY.json beside it in the same
    shard, an object with `captions` (list of strings) or `caption`; other members are
    ignored. Order: shards as given, examples as in the shard. The shards are scanned
    once; afterwards only an index of offsets is held, so that the object is picklable and
    may be read from any number of threads and processes.

    Attributes:
        paths: the shards.
        keys: key of each example.
        skipped: how many examples or captions were left out, by reason.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path]):
        """Scan shards, or the `*.tar` of a folder.

        Raises:
            DataError: a shard is absent, damaged, cut short or compressed, or there is no
                usable example at all.
        """
        self.paths = _shards(paths)
        self.keys: list[str] = []
        self.skipped: Counter[str] = Counter()
        # Shard, image offset, its size, json offset, its size; repeated.
        self._spans = array("q")
        for shard, path in enumerate(self.paths):
            self._scan(shard, path)
        if not self.keys:
            reasons = self.skipped and self.left_out()
            raise DataError(
                f"{_names(self.paths)}: no usable example "
                f"({reasons or 'no KEY.jpg with KEY.json'})"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def left_out(self) -> str:
        """`skipped` for a log: "2 empty image, 1 no caption", or "nothing"."""
        reasons = self.skipped.most_common()
        return ", ".join(f"{count} {reason}" for reason, count in reasons) or "nothing"

    def __getitem__(self, index: int) -> Example:
        """Raises DataError if the shard changed since it was scanned."""
        image, fields = self._read(index, with_image=True)
        return Example(
            key=self.keys[index],
            image=image,
            captions=tuple(_captions(fields)),
            license=str(fields.get("license") or ""),
            source=str(fields.get("source") or ""),
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """An example's captions alone, without reading its image; raises as indexing."""
        return tuple(_captions(self._read(index, with_image=False)[1]))

    def _read(self, index: int, with_image: bool) -> tuple[bytes, dict]:
        i = as_index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard, at, size, json_at, json_size = self._spans[5 * i : 5 * i + 5]
        path, size = self.paths[shard], size if with_image else 0
        try:
            with open(path, "rb", buffering=0) as file:
                image = os.pread(file.fileno(), size, at)
                fields = json.loads(os.pread(file.fileno(), json_size, json_at))
            captions = _captions(fields)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: {self.keys[i]}: not readable any more ({error})"
            ) from error
        if len(image) < size or not captions:
            raise DataError(f"{path}: {self.keys[i]}: changed since it was scanned")
        return image, fields

    def _scan(self, shard: int, path: Path) -> None:
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, tarfile.TarInfo] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                end = 0
                for member in tar:
                    end = member.offset_data + (member.size if member.isreg() else 0)
                    key, suffix = _split(member.name)
                    table = labels if suffix == ".json" else images
                    if not member.isreg() or suffix not in SUFFIXES | {".json"}:
                        continue
                    if key in table:
                        self.skipped["key repeated in its shard"] += 1
                    table.setdefault(key, member)
                _check_end(path, end)
        except (OSError, tarfile.TarError) as error:
            raise DataError(
                f"{path}: not a readable tar ({error}); want an uncompressed .tar, "
                "copied completely"
            ) from error
        self.skipped["json without image"] += len(labels.keys() - images.keys())
        with open(path, "rb", buffering=0) as file:
            for key, image in images.items():
                if self._usable(image, labels.get(key), file.fileno()):
                    label = labels[key]
                    span = (
                        image.offset_data,
                        image.size,
                        label.offset_data,
                        label.size,
                    )
                    self.keys.append(key)
                    self._spans.extend((shard, *span))
        self.skipped += Counter()  # drops the zeros

    def _usable(self, image, label, fd: int) -> bool:
        """Whether an example has all it needs; counts what is missing."""
        if label is None:
            reason = "image without json"
        elif not image.size:
            reason = "empty image"
        else:
            try:
                fields = json.loads(os.pread(fd, label.size, label.offset_data))
                captions = _captions(fields)
            except (ValueError, RecursionError):  # nested too deep
                reason = "json not readable"
            else:
                self.skipped["blank caption"] += len(_written(fields)) - len(captions)
                if captions:
                    return True
                reason = "no caption"
        self.skipped[reason] += 1
        return False


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
        names = [name for name in found if not _hidden(name)]
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


def _shards(paths: str | Path | Iterable[str | Path]) -> tuple[Path, ...]:
    if isinstance(paths, str | Path):
        folder = Path(paths)
        paths = sorted(folder.glob("*.tar")) if folder.is_dir() else [folder]
        if not paths:
            raise DataError(f"{folder}: no .tar in this folder")
    shards = tuple(Path(path) for path in paths)
    absent = [path for path in shards if not path.is_file()]
    if absent or not shards:
        raise DataError(
            f"{_names(absent) or 'no shards given'}: want existing .tar files"
        )
    return shards


def _check_end(path: Path, end: int) -> None:
    """Raise unless tar's end marker follows the last member.

    tarfile takes a damaged header, or a copy cut between members, for the end.
    """
    with open(path, "rb") as file:
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end marker after byte {end}")


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case suffix: "a/00.Seg.JPG" -> ("a/00.Seg", ".jpg")."""
    key, suffix = os.path.splitext(name)
    return key, "" if _hidden(name) else suffix.lower()


def _hidden(name: str) -> bool:
    """Whether a part of a relative path is hidden; "." itself is not."""
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def _written(fields: object) -> list:
    """All captions as written; raises ValueError if this is not an example's JSON."""
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    captions = fields.get("captions", fields.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(captions, list):
        raise ValueError("captions is not a list")
    return captions


def _captions(fields: object) -> list[str]:
    """The captions that say something, stripped."""
    written = _written(fields)
    return [text.strip() for text in written if isinstance(text, str) and text.strip()]


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(str(path) for path in paths)
