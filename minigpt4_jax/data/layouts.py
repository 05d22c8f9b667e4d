"""Which files a data set has: a path -> Listing, for each layout that we read.

    tars         a folder of .tar shards (webdataset, img2dataset), or one .tar
    cc_sbu_align filter_cap.json and image/ID.jpg
    list         a .csv, .tsv or .jsonl with columns image and caption; a folder with
                 captions.csv, captions.tsv, captions.jsonl or metadata.jsonl
    files        a folder, and those below, of images with KEY.txt or KEY.json beside them

Images in files of their own are looked up each time that the set is opened, some 15 to 30
seconds a million, and a list of them is held in memory; larger sets belong into tars.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from minigpt4_jax.data import scan
from minigpt4_jax.data.build import Listing
from minigpt4_jax.data.images import SUFFIXES
from minigpt4_jax.data.index import FORMAT
from minigpt4_jax.data.scan import LABELS, Fault, Label, Loose
from minigpt4_jax.errors import DataError

LISTS = ("captions.csv", "captions.tsv", "captions.jsonl", "metadata.jsonl")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
AT_ONCE = 1_000  # image files that one worker looks at
WANT = (
    "want a folder of .tar shards, one .tar, a folder with filter_cap.json, a .csv, .tsv "
    "or .jsonl, or a folder of images with captions beside them"
)


Records = dict[str | int, Loose]  # by image; by line where there is none


def listing(path: Path) -> Listing:
    """What `path` holds. Raises DataError when it is nothing that we read."""
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; {WANT}")
    if path.suffix.lower() == ".tar":
        return _tars(path, [path.name])
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
        return _list(path, _read_list(path))
    if path.name == "filter_cap.json":
        return _list(path, _read_alignment(path))
    raise _compressed(path) or DataError(f"{path}: not a data set; {WANT}")


def _folder(path: Path) -> Listing:
    if (path / "filter_cap.json").is_file():
        path = path / "filter_cap.json"
        return _list(path, _read_alignment(path))
    names = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.is_file() and not entry.name.startswith(".")
    )
    for name in names:
        if (error := _compressed(path / name)) and f"{_bare(name)}.tar" not in names:
            raise error
    if shards := [name for name in names if name.lower().endswith(".tar")]:
        return _tars(path, shards)
    for name in LISTS:
        if name in names:
            return _list(path / name, _read_list(path / name))
    return _files(path)


def _tars(root: Path, names: list[str]) -> Listing:
    base = root if root.is_dir() else root.parent
    sizes = [(base / name).stat().st_size for name in names]
    return Listing(
        root=root,
        shards=tuple(names),
        signature=_signature("tars", base, names),
        parts=lambda: iter(
            [(i, base / name, size) for i, (name, size) in enumerate(zip(names, sizes))]
        ),
        scan=scan.scan_tar,
        total=sum(sizes),
    )


def _list(path: Path, records: Records) -> Listing:
    names = (record.image for record in records.values() if record.image)
    return _loose(path, path.name, list(records.values()), names)


def _files(path: Path) -> Listing:
    """A folder of images. Caption files without image are no examples: a README, say."""
    records: Records = {}
    labels: dict[str, list[str]] = {}
    for name in _walk(path):
        key, suffix = scan.split(name)
        if suffix in LABELS:
            labels.setdefault(key, []).append(name)
        elif suffix in SUFFIXES:
            again = key in records
            records[name if again else key] = Loose(
                key, name, Fault("duplicate key") if again else ()
            )
    if not records:
        inside = [entry.name for entry in os.scandir(path) if entry.is_dir()]
        folders = ", ".join(sorted(name for name in inside if name[0] != ".")[:5])
        hint = f"; it has folders: {folders}" if folders else ""
        raise DataError(f"{path}: no .tar, no list and no image here{hint}; {WANT}")
    whole = [
        record
        if isinstance(record.label, Fault)
        else record._replace(label=tuple(labels.get(record.key, ())))
        for record in records.values()
    ]
    names = (name for r in whole for name in (r.image, *labels.get(r.key, ())))
    return _loose(path, ".", whole, names)


def _loose(root: Path, shard: str, records: list[Loose], names) -> Listing:
    base = root if root.is_dir() else root.parent
    own = [] if root.is_dir() else [root.name]
    return Listing(
        root=root,
        shards=(shard,),
        signature=_signature("files", base, [*own, *names]),
        parts=partial(_chunks, base, records),
        scan=scan.scan_loose,
        total=len(records),
        unit="image",
        many=20_000,
    )


def _chunks(base: Path, records: list[Loose]) -> Iterator[tuple]:
    for i in range(0, len(records), AT_ONCE):
        yield 0, base, records[i : i + AT_ONCE]


def _read_list(path: Path) -> Records:
    """Records by image; lines of one image are its captions."""
    records: Records = {}
    rows = _json_lines(path) if path.suffix.lower() == ".jsonl" else _table(path)
    for number, fields in rows:
        image = _image_of(fields)
        _add(records, number, fields, image, image)
    return records


def _image_of(fields: dict | Fault) -> str:
    if isinstance(fields, Fault):
        return ""
    image = fields.get("image") or fields.get("file_name")
    return image.strip() if isinstance(image, str) else ""


def _add(
    records: Records, number: int, fields: dict | Fault, image: str, key: str
) -> None:
    """Add line `number`, or its captions to the image that is already there."""
    try:
        if isinstance(fields, Fault):
            raise fields
        label = scan.label_of(fields)
        if not image:
            raise Fault("no image")
        if image not in records:
            records[image] = Loose(key, image, label)
            return
        known = records[image].label
        assert isinstance(known, Label)
        if label.captions and set(label.captions) <= set(known.captions):
            raise Fault("duplicate key")
        known.captions += label.captions
        known.notes += label.notes
    except Fault as fault:
        records[number] = Loose(key or f"line {number}", "", fault)


def _json_lines(path: Path) -> Iterator[tuple[int, dict | Fault]]:
    with _opened(path) as file:
        for number, line in enumerate(_read(path, file), 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = None
            yield number, fields if isinstance(fields, dict) else Fault("no JSON")


def _table(path: Path) -> Iterator[tuple[int, dict | Fault]]:
    # A TSV has no quoting: a lone " in a caption would else swallow the lines behind it.
    tabs = path.suffix.lower() == ".tsv"
    options = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else {"strict": True}
    with _opened(path) as file:
        rows = csv.reader(file, **options)
        names = [name.strip().lower() for name in next(_read(path, rows), [])]
        if not {"image", "file_name"} & set(names) or not {"caption", "text"} & set(
            names
        ):
            raise DataError(
                f"{path}: got the columns {names}; want a first line that names image and "
                "caption"
            )
        for row in _read(path, rows):
            if row and len(row) != len(names):
                yield rows.line_num, Fault("wrong number of columns")
            elif row:
                yield rows.line_num, dict(zip(names, row))


def _read_alignment(path: Path) -> Records:
    """Records of filter_cap.json: a list of image_id and caption, or in `annotations`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if isinstance(values, dict):
        values = values.get("annotations")
    if not isinstance(values, list):
        raise DataError(
            f'{path}: want {{"annotations": [{{"image_id": "2", "caption": "..."}}, ...]}}'
        )
    records: Records = {}
    for number, fields in enumerate(values, 1):
        name = fields.get("image_id") if isinstance(fields, dict) else None
        name = str(name).strip() if isinstance(name, str | int) else ""
        if not name or "/" in name:  # a path would leave the folder
            fields = Fault("no image_id")
        _add(records, number, fields, f"image/{name}.jpg", name)
    return records


def _walk(folder: Path) -> Iterator[str]:
    """Relative names of all files, sorted, no hidden ones; links to folders are left."""
    for inside, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        start = os.path.relpath(inside, folder)
        start = "" if start == "." else f"{Path(start).as_posix()}/"
        for name in sorted(files):
            if not name.startswith("."):
                yield start + name


def _signature(kind: str, base: Path, names: Iterable[str]) -> str:
    """Hash of names, sizes and times; an absent file has neither."""
    digest = hashlib.sha256(f"{FORMAT} {kind}".encode())
    folder = os.fspath(base)  # a Path each would cost more than the system's answer
    for name in names:
        try:
            status = os.stat(os.path.join(folder, name))
            facts = [name, status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            facts = [name]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _opened(path: Path):
    try:
        return open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read(path: Path, lines: Iterable) -> Iterator:
    """The lines, with errors that name the file."""
    try:
        yield from lines
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        number = f", line {lines.line_num}" if hasattr(lines, "line_num") else ""
        raise DataError(f"{path}{number}: cannot be read ({error})") from error


def _bare(name: str) -> str:
    """A compressed tar's name without its endings."""
    return next((name[: -len(end)] for end in COMPRESSED if name.endswith(end)), name)


def _compressed(path: Path) -> DataError | None:
    if path.name.lower().endswith(COMPRESSED):
        return DataError(
            f"{path}: compressed; want an uncompressed .tar, which can be read at any "
            "place: unpack it first"
        )
    return None
