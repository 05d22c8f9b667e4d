"""Makes the index of a data set: files -> scan, once and by one process -> index folder.

The folder's name ends in a signature, a hash of the files' names, sizes and times: when
one changes, the data is scanned again.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minigpt4_jax import alive, locate
from minigpt4_jax.data import workers
from minigpt4_jax.data.index import FORMAT, PLACES, ROW, Found, is_whole
from minigpt4_jax.errors import DataError

logger = logging.getLogger(__name__)

FOLDER = ".minigpt4_jax"  # beside the data; hidden, so that no listing sees it


@dataclass(frozen=True)
class Listing:
    """The files of a data set, before any is read."""

    root: Path  # the folder, or the file
    shards: tuple[str, ...]  # names under `base`
    signature: str  # hex
    parts: Callable[[], Iterator[Any]]  # what `scan` takes, shard by shard
    scan: Callable[[Any], Found]  # picklable
    total: int  # work of all parts, for the progress
    unit: str = "B"  # of the work: bytes or images
    many: int = 2**28  # from this total on, the scan is worth several processes

    @property
    def base(self) -> Path:
        """The folder that names are relative to."""
        return self.root if self.root.is_dir() else self.root.parent


def made(listing: Listing, index_dir: Path | None = None) -> Path:
    """The folder of a listing's index, scanned unless it is there.

    Args:
        index_dir: where indexes are; default: beside the data, or where that is
            read-only in the cache folder.
    """
    places = [index_dir] if index_dir else [listing.base / FOLDER, _cache()]
    for place in places:
        folder = place / _name(place, listing)
        if is_whole(folder):
            return folder
    with _alone(places, listing) as folder:
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            _build(listing, folder)
            _drop_older(folder)
    return folder


def _stem(place: Path, listing: Listing) -> str:
    """What a data set is called: short beside the data, which may be moved with it."""
    root = listing.root.resolve()
    if place == listing.base / FOLDER:
        return "all" if root.is_dir() else root.name
    return f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"


def _name(place: Path, listing: Listing) -> str:
    return f"{_stem(place, listing)}-{listing.signature[:16]}"


def _cache() -> Path:
    return locate.cache_root() / "index"


@contextlib.contextmanager
def _alone(places: list[Path], listing: Listing) -> Iterator[Path]:
    """The folder to scan into, at the first place that takes it, nobody else scanning."""
    for place in places:
        try:
            handle = _lock(place, listing)
        except OSError as error:
            refused = error
            continue
        try:
            yield place / _name(place, listing)
            return
        finally:
            os.close(handle)
    raise DataError(
        f"{listing.root}: the index of the data cannot be kept at {places[-1]} "
        f"({refused}); set MINIGPT4_JAX_CACHE to a folder that can be written"
    )


def _lock(place: Path, listing: Listing) -> int:
    """A handle that holds the lock, which ends with the process at the latest."""
    beside = place == listing.base / FOLDER
    # Root may write everywhere, but a folder that nobody may write is not ours to fill.
    if beside and not place.exists() and not listing.base.stat().st_mode & 0o222:
        raise PermissionError(f"{listing.base} is read-only")
    place.mkdir(parents=not beside, exist_ok=True)
    path = place / f"{_stem(place, listing)}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run that scans %s", listing.root)
            alive.lock(handle)
    except OSError:  # a file system without locks
        os.close(handle)
        raise
    return handle


def _build(listing: Listing, folder: Path) -> None:
    """Scan, and rename what was written when it is whole.

    What an interrupted scan wrote is kept in FOLDER.part, with a line of its journal for
    each whole part, and the next scan goes on there.
    """
    part = folder.with_name(folder.name + ".part")
    part.mkdir(exist_ok=True)
    journal = _journal(part)
    totals = _totals(journal)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(part / name, "ab")) for name in totals}
        lines = stack.enter_context(open(part / "journal", "w"))
        for name, file in files.items():
            file.truncate(totals[name])
        for entry in journal:
            lines.write(json.dumps(entry) + "\n")
        bar = stack.enter_context(
            tqdm(
                desc=f"index of {listing.root.name}",
                total=listing.total,
                unit=listing.unit,
                unit_scale=True,
                disable=None,
            )
        )
        parts = islice(listing.parts(), len(journal), None)
        many = workers.available() if listing.total >= listing.many else 1
        for found in workers.ordered(listing.scan, parts, many):
            data = _bytes(found, totals["texts"])
            for name, file in files.items():
                file.write(data[name])
                totals[name] += len(data[name])
                file.flush()
                os.fsync(file.fileno())
            entry = {
                "shard": found.shard,
                "kept": len(found.rows),
                "captions": found.captions,
                "bytes": {name: len(data[name]) for name in files},
                "lost": found.lost,
                "notes": found.notes,
                "places": found.places,
            }
            journal.append(entry)
            lines.write(json.dumps(entry) + "\n")
            lines.flush()
            bar.update(found.work)
            alive.sign()
    _finish(listing, part, journal, totals)
    os.replace(part, folder)
    logger.info("scanned %s into %s", listing.root, folder)


def _finish(listing: Listing, part: Path, journal: list[dict], totals: dict) -> None:
    with open(part / "digests", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shards: list[dict[str, Any]] = [
        {"name": name, "kept": 0, "lost": {}, "notes": {}, "places": {}}
        for name in listing.shards
    ]
    for entry in journal:
        shard = shards[entry["shard"]]
        shard["kept"] += entry["kept"]
        for kind in ("lost", "notes"):
            shard[kind] = Counter(shard[kind]) + Counter(entry[kind])
        for reason, places in entry["places"].items():
            known = shard["places"].setdefault(reason, [])
            known += places[: PLACES - len(known)]
    meta = {
        "format": FORMAT,
        "examples": sum(entry["kept"] for entry in journal),
        "captions": sum(entry["captions"] for entry in journal),
        "text_bytes": totals["texts"],
        "digest": digest,
        "shards": shards,
    }
    with open(part / "meta.json", "w") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())
    (part / "digests").unlink()
    (part / "journal").unlink()


def _bytes(found: Found, text_offset: int) -> dict[str, bytes]:
    rows = np.array(found.rows, ROW)
    rows["text"] += text_offset
    return {
        "rows": rows.tobytes(),
        "texts": bytes(found.texts),
        "digests": bytes(found.digests),
    }


def _journal(part: Path) -> list[dict]:
    """The entries of an interrupted scan whose data is there; a torn line ends them."""
    entries: list[dict] = []
    with contextlib.suppress(OSError, ValueError):
        for line in (part / "journal").read_text().splitlines():
            entries.append(json.loads(line))
    try:
        whole = all(
            (part / name).stat().st_size >= total
            for name, total in _totals(entries).items()
        )
    except OSError:
        whole = False
    return entries if whole else []


def _totals(journal: list[dict]) -> dict[str, int]:
    return {
        name: sum(entry["bytes"][name] for entry in journal)
        for name in ("rows", "texts", "digests")
    }


def _drop_older(folder: Path) -> None:
    """Remove the indexes of what the data was before."""
    stem = folder.name[:-17]
    for other in folder.parent.iterdir():
        if re.fullmatch(re.escape(stem) + r"-[0-9a-f]{16}(\.part)?", other.name):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
