"""tensorflow-datasets builders of both stages, writing ArrayRecord without TensorFlow.

`build` writes any data set of `open_data`. With tensorflow-datasets' own means:

    builder = builders.CcSbuAlign(data_dir=...)
    config = tfds.download.DownloadConfig(manual_dir="cc_sbu_align")
    builder.download_and_prepare(file_format="array_record", download_config=config)
    builder.as_data_source("train")
"""

import contextlib
import io
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.data.records import open_records, tfds
from minigpt4_jax.data.sources import Examples, open_data
from minigpt4_jax.errors import DataError, InputError

logger = logging.getLogger(__name__)

# Of images in one file: while it is written, its examples are all in memory.
SHARD_BYTES = 2**28


class CaptionedImages(tfds.core.ShardBasedBuilder):
    """Images with captions, in the order of their source; no shuffling, nothing encoded.

    Shard by shard, since the other builders of tensorflow-datasets sort all examples by a
    hash, for which they need TensorFlow from 1 GB on.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir is any data set of minigpt4_jax.data.sources.open_data; stage 1's "
        "tars come from `minigpt4-jax data urls` and img2dataset."
    )
    DESCRIPTION = "Captioned images, as MiniGPT-4's first stage learns from."
    # Where checksums of downloads lie: there are none. tensorflow-datasets looks for it
    # with importlib_resources, which it does not install.
    code_path = None

    examples: Examples | None = None  # instead of manual_dir

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict(
            {
                "key": text,
                "image": tfds.features.Image(),
                "captions": tfds.features.Sequence(text),
                "license": text,  # "" if not recorded
                "source": text,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, description=self.DESCRIPTION, features=features
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list]:
        examples = self.examples
        if examples is None:
            examples = open_data(str(dl_manager.manual_dir))
        return {"train": [partial(_read, examples, *part) for part in parts(examples)]}


class CcSbuAlign(CaptionedImages):
    """The second stage's 3,439 images, each with its long description."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir is cc_sbu_align, with filter_cap.json and image/ in it."
    )
    DESCRIPTION = "Images with detailed descriptions, for MiniGPT-4's second stage."


def build(examples: Examples, out: Path, kind: type = CaptionedImages) -> Examples:
    """Write a data set as ArrayRecord files into the folder `out`; returns it, opened.

    Raises:
        InputError: the folder exists.
        DataError: an example that cannot be read any more, or not as it was written.
    """
    check_out(out)
    work = out.with_name(out.name + ".building")
    shutil.rmtree(work, ignore_errors=True)
    builder = kind(data_dir=str(work))
    builder.examples = examples
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # it talks of downloads
        builder.download_and_prepare(file_format="array_record", download_config=config)
    written = open_records(Path(builder.data_dir))
    if written.digest != examples.digest:
        raise DataError(
            f"{work}: what was written is not what was read; is the disk sound?"
        )
    Path(builder.data_dir).rename(out)
    shutil.rmtree(work)
    return open_records(out)


def check_out(out: Path) -> None:
    """Raise InputError where something is already."""
    if out.exists():
        raise InputError(f"{out} exists; remove it or give another --out")


def parts(examples: Examples) -> list[tuple[int, int]]:
    """First example and the one after the last of each shard of SHARD_BYTES or so."""
    shard = np.cumsum(examples.image_bytes, dtype=np.int64) // SHARD_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(examples)]
    return list(zip(cuts, cuts[1:]))


def _read(examples: Examples, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    logger.info("%s of %s examples written", f"{start:,}", f"{len(examples):,}")
    for i in range(start, stop):
        example = examples[i]
        yield (
            i,
            {
                "key": example.key,
                "image": io.BytesIO(example.image),
                "captions": list(example.captions),
                "license": example.license,
                "source": example.source,
            },
        )
