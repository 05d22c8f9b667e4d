"""A folder that our tensorflow-datasets builders wrote: ArrayRecord files -> Examples.

The same index as of any data set (data/index.py), where an image's offset is the number
of its record. Needs array_record and tensorflow-datasets, not TensorFlow.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from minigpt4_jax.data import build, index
from minigpt4_jax.data.scan import Fault, header, label_of
from minigpt4_jax.data.sources import BUDGET, OPEN_FILES, Examples
from minigpt4_jax.errors import DataError

try:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader
except ImportError as error:
    raise DataError(
        f"ArrayRecord files need {error.name}: pip install 'minigpt4-jax[data]'"
    ) from error

AT_ONCE = 100  # records read in one go
NEEDED = {"key", "image", "captions"}
# No read-ahead: records are read one by one, at any place.
OPTIONS = "readahead_buffer_size:0"


class RecordExamples(Examples):
    """Examples whose images lie in records."""

    def __init__(self, folder: Path, base: Path):
        super().__init__(folder, base)
        self._features = _features(base)
        self._reader = lru_cache(OPEN_FILES)(_reader)

    def _image(self, i: int, name: str) -> bytes:
        row = self._index.rows[i]
        try:
            reader = self._reader(self.paths[row["shard"]])
            record = reader.read([int(row["offset"])])[0]
            image = _fields(self._features, record)["image"]
        except Exception as error:  # both libraries raise whatever they like
            raise DataError(
                f"{self.where(i)}: not readable any more ({error})"
            ) from error
        if len(image) != row["size"]:
            raise DataError(f"{self.where(i)}: changed since it was scanned")
        return image


def open_records(
    path: str | Path, *, budget: float = BUDGET, index_dir: str | Path | None = None
) -> RecordExamples:
    """The examples of a folder with dataset_info.json and .array_record files.

    As `open_data`, which calls this; all splits, in order of the files' names.
    """
    path = Path(path)
    files = sorted(path.glob("*.array_record*"))
    if absent := _absent(files):
        raise DataError(f"{path}: {absent} is not there; copy the folder again")
    if NEEDED - set(_features(path)):
        raise DataError(
            f"{path}: got the features {sorted(_features(path))}; want one with "
            f"{sorted(NEEDED)}, as `python -m minigpt4_jax.data build` writes"
        )
    sizes = [file.stat().st_size for file in files]
    listing = build.Listing(
        root=path,
        shards=tuple(file.name for file in files),
        signature=_signature(files),
        parts=lambda: iter(
            [(i, file, size) for i, (file, size) in enumerate(zip(files, sizes))]
        ),
        scan=scan_records,
        total=sum(sizes),
    )
    folder = build.made(listing, Path(index_dir) if index_dir else None)
    examples = RecordExamples(folder, path)
    examples.check(budget)
    return examples


def scan_records(part: tuple[int, Path, int]) -> index.Found:
    """The examples of one file; `part`: its number, path and size."""
    shard, path, size = part
    found = index.Found(shard, work=size)
    features = _features(path.parent)
    try:
        reader = _reader(path)
        count = reader.num_records()
    except Exception:
        found.lose("array_record cut short or damaged", str(path.name))
        return found
    for start in range(0, count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, count))
        try:
            records = reader.read(list(numbers))
        except Exception:
            found.lose("record damaged", f"record {start}", len(numbers))
            continue
        for number, record in zip(numbers, records):
            _add(found, number, _fields(features, record))
    return found


def _add(found: index.Found, number: int, fields: dict) -> None:
    key, image = fields["key"].decode(), fields["image"]
    texts = {
        name: fields[name].decode() for name in ("license", "source") if name in fields
    }
    captions = [text.decode() for text in fields["captions"]]
    try:
        label = label_of({"captions": captions, **texts})
        if not label.captions:
            raise Fault("no caption")
        image_size = header(image)
    except Fault as fault:
        found.lose(str(fault), key)
        return
    for reason, count in label.notes.items():
        found.note(reason, key, count)
    sha256 = hashlib.sha256(image).digest()
    text = [label.license, label.source, "", *label.captions]
    found.add(key, text, number, len(image), image_size, sha256)


def _features(folder: Path) -> tfds.features.FeaturesDict:
    try:
        return tfds.features.FeaturesDict.from_config(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder}: .array_record files without a readable features.json ({error}); "
            "want a folder as `python -m minigpt4_jax.data build` writes it"
        ) from error


def _fields(features: tfds.features.FeaturesDict, record: bytes) -> dict:
    decoders = {"image": tfds.decode.SkipDecoding()}
    return features.deserialize_example_np(record, decoders=decoders)


def _reader(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), options=OPTIONS, file_reader_buffer_size=2**15)


def _absent(files: list[Path]) -> str:
    """A name of "NAME-00001-of-00003" that is missing between the others."""
    names = {file.name for file in files}
    for name in sorted(names):
        if match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", name):
            for i in range(int(match[2])):
                if (other := f"{match[1]}-{i:05d}-of-{match[2]}") not in names:
                    return other
    return ""


def _signature(files: list[Path]) -> str:
    """Hash of names, sizes and times."""
    facts = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return hashlib.sha256(json.dumps([index.FORMAT, facts]).encode()).hexdigest()
