"""Getting stage 1: published annotations -> what img2dataset reads, and its command.

The annotations are one JSON list of {"url": ..., "caption": ...}
(`ccs_synthetic_filtered_large.json`, `laion_synthetic_filtered_large.json`). They are
read as a stream, so that a file of 10 GB needs no memory.
"""

import csv
import itertools
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from minigpt4_jax.errors import DataError, InputError

logger = logging.getLogger(__name__)

# img2dataset reads one TSV at a time, into memory, and numbers shards of 10,000 through
# all of them: parts of whole shards give the shards of one large file.
PART = 1_000_000
CHUNK = 1 << 22  # characters read at once; no record is longer
SEPARATORS = re.compile(r"[\s,]*")
ADDRESS = re.compile(r"\s*https?://\S", re.IGNORECASE)
# What UTF-8 cannot hold, and control characters that `str.split` leaves in place.
NOT_TEXT = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x9f\ud800-\udfff]")

NOTES = """\
img2dataset (MIT licence) downloads them, from an environment of its own with Python 3.10 to
3.12 (`pip install img2dataset`); started again, it goes on.
The options are the reference's. "border" makes the longest side 224 and fills the square
with white. Training squashes every image to 224 x 224, which leaves these squares as they
are; of "keep_ratio" images the squash would change the shape, as of a photo in a chat.
The images belong to their owners. img2dataset obeys X-Robots-Tag (noai, noindex, ...) but
reads no robots.txt; leave that on, and keep to the terms of who published the list."""


def convert(annotations: Path, out: Path, part: int = PART) -> tuple[int, Counter[str]]:
    """Write `out/urls/00000.tsv` and so on, columns url and caption, `part` rows each.

    White space in a caption becomes single spaces, as training's own cleaning does: a
    tab or a line break would end the field. Returns the number of rows, and how many
    records were left out by reason. The folder is there when all is written.

    Raises:
        InputError: the folder exists.
        DataError: not such a list, cut short, or no usable record in it.
    """
    folder, partial = out / "urls", out / "urls.partial"
    if folder.exists():
        raise InputError(f"{folder} exists; remove it or give another --out")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    left_out: Counter[str] = Counter()
    rows = _rows(records(annotations), left_out)
    count = 0
    for number in itertools.count():
        found = _write(partial / f"{number:05d}.tsv", itertools.islice(rows, part))
        if not found:
            break
        count += found
        logger.info("%d rows", count)
    if not count:
        shutil.rmtree(partial)
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        raise DataError(f"{annotations}: no usable record ({reasons or 'empty list'})")
    partial.rename(folder)
    return count, left_out


def records(annotations: Path) -> Iterator[object]:
    """The elements of a JSON list, one by one; raises DataError where it breaks off."""
    decode = json.JSONDecoder().raw_decode
    number = 0
    try:
        with open(annotations, encoding="utf-8-sig") as file:
            text = file.read(CHUNK).lstrip()
            if not text.startswith("["):
                raise DataError(
                    f'{annotations}: want one JSON list of {{"url": ..., "caption": '
                    f"...}}, got {text[:20]!r}"
                )
            at = 1
            while True:
                at = SEPARATORS.match(text, at).end()
                if text.startswith("]", at):
                    return
                try:
                    record, at = decode(text, at)
                except (ValueError, RecursionError) as error:
                    more = file.read(CHUNK)
                    if not more or len(text) - at > CHUNK:
                        raise DataError(
                            f"{annotations}: record {number + 1} is cut short or not "
                            f"JSON ({error}); download the file again"
                        ) from None
                    text, at = text[at:] + more, 0
                    continue
                number += 1
                yield record
    except UnicodeDecodeError as error:
        raise DataError(
            f"{annotations}: not UTF-8 text after record {number} ({error.reason}); "
            "download the file again"
        ) from None


def command(out: Path) -> list[str]:
    """img2dataset's arguments for `out/urls`, as the reference's download scripts.

    Their `--enable_wandb True` is left out, and defaults that matter are spelled.
    """
    return [
        "img2dataset",
        f"--url_list={out / 'urls'}",
        "--input_format=tsv",
        "--url_col=url",
        "--caption_col=caption",
        "--output_format=webdataset",
        f"--output_folder={out / 'images'}",
        "--processes_count=16",
        "--thread_count=128",
        "--image_size=224",
        "--resize_mode=border",
        "--encode_quality=95",
        "--number_sample_per_shard=10000",
    ]


def _write(path: Path, rows: Iterator[tuple[str, str]]) -> int:
    """Write a part; returns its rows, and writes none if there is no row."""
    first = next(rows, None)
    if first is None:
        return 0
    count = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(("url", "caption"))
        for row in itertools.chain([first], rows):
            table.writerow(row)
            count += 1
    return count


def _rows(found: Iterable[object], left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """URL and caption of each usable record; counts the others."""
    for record in found:
        url, caption = None, None
        if isinstance(record, dict):
            url, caption = record.get("url"), record.get("caption")
        if not isinstance(url, str) or not ADDRESS.match(url):
            # Others, such as file:, would be opened as well by img2dataset's urllib.
            left_out["without an http address"] += 1
            continue
        text = NOT_TEXT.sub(" ", caption) if isinstance(caption, str) else ""
        words = text.split()
        if not words:
            left_out["without a caption"] += 1
            continue
        yield re.sub(r"\s", "%20", NOT_TEXT.sub("", url.strip())), " ".join(words)
