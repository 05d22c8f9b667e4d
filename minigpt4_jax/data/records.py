"""A folder that our tensorflow-datasets builders wrote: ArrayRecord files -> Examples.

The same index as of any data set (data/index.py), where an image's offset is the number
of its record. Needs array_record and tensorflow-datasets, not TensorFlow.
"""

import hashlib
import json
from collections.abc import Iterable
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
    if NEEDED - set(_features(path)):
        raise DataError(
            f"{path}: got the features {sorted(_features(path))}; want one with "
            f"{sorted(NEEDED)}, as `minigpt4-jax data build` writes"
        )
    files = _files(path)
    sizes = [(path / name).stat().st_size for name in files]
    listing = build.Listing(
        root=path,
        shards=tuple(files),
        signature=_signature(path, files),
        parts=lambda: (
            (i, path / name, size, count)
            for i, (size, (name, count)) in enumerate(zip(sizes, files.items()))
        ),
        scan=scan_records,
        total=sum(sizes),
    )
    folder = build.made(listing, Path(index_dir) if index_dir else None)
    examples = RecordExamples(folder, path)
    examples.check(budget)
    return examples


def scan_records(part: tuple[int, Path, int, int]) -> index.Found:
    """The examples of one file; `part`: its number, path, size and count of records."""
    shard, path, size, count = part
    found = index.Found(shard, work=size)
    features = _features(path.parent)
    try:
        reader = _reader(path)
        whole = reader.num_records() == count  # of a cut file it finds fewer, or none
    except Exception:  # see RecordExamples._image
        whole = False
    if not whole:
        found.lose("record of a file cut short or damaged", path.name, count)
        return found
    for number in range(count):
        try:
            fields = _fields(features, reader.read([number])[0])
            _add(found, number, fields)
        except Fault as fault:
            found.lose(str(fault), fields["key"].decode())
        except Exception:
            found.lose("damaged record", f"record {number}")
    return found


def _add(found: index.Found, number: int, fields: dict) -> None:
    """Add an example; raises Fault if it cannot be used."""
    texts = {n: fields[n].decode() for n in ("license", "source") if n in fields}
    captions = [text.decode() for text in fields["captions"]]
    label = label_of({"captions": captions, **texts})
    if not label.captions:
        raise Fault("no caption")
    key, image = fields["key"].decode(), fields["image"]
    image_size, sha256 = header(image), hashlib.sha256(image).digest()
    for reason, count in label.notes.items():
        found.note(reason, key, count)
    text = [label.license, label.source, "", *label.captions]
    found.add(key, text, number, len(image), image_size, sha256)


def _features(folder: Path) -> tfds.features.FeaturesDict:
    try:
        return tfds.features.FeaturesDict.from_config(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder}: .array_record files without a readable features.json ({error}); "
            "want a folder as `minigpt4-jax data build` writes it"
        ) from error


def _fields(features: tfds.features.FeaturesDict, record: bytes) -> dict:
    decoders = {"image": tfds.decode.SkipDecoding()}
    return features.deserialize_example_np(record, decoders=decoders)


def _reader(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), options=OPTIONS, file_reader_buffer_size=2**15)


def _files(folder: Path) -> dict[str, int]:
    """Names of the files and how many records each has, as dataset_info.json says."""
    files = {}
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        for split in info["splits"]:
            counts = [int(count) for count in split["shardLengths"]]
            stem = f"{info['name']}-{split['name']}.array_record"
            for i, count in enumerate(counts):
                files[f"{stem}-{i:05d}-of-{len(counts):05d}"] = count
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: no readable dataset_info.json ({error!r}); copy the folder again"
        ) from error
    for name in files:
        if not (folder / name).is_file():
            raise DataError(f"{folder}: {name} is not there; copy the folder again")
    return files


def _signature(folder: Path, names: Iterable[str]) -> str:
    """Hash of names, sizes and times."""
    found = [(name, (folder / name).stat()) for name in names]
    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in found]
    return hashlib.sha256(json.dumps([index.FORMAT, facts]).encode()).hexdigest()
