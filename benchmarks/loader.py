"""Our loader beside torch's DataLoader with webdataset: the same pixels, from the same tars.

    python -m benchmarks.loader --data=DATA [--rounds=5]

Photos of DATA/train (tar shards), squashed to uint8 224 x 224, batches of 64, two worker
processes each, everything in the page cache. Ours reads in the order of a plan, at random;
theirs streams shard after shard. Rounds take turns; the pixels of both are compared first.
Below, where our time goes, in microseconds of CPU an image: transport is what the workers
spend beside reading, decoding and resizing.

webdataset is needed for the peer alone: pip install webdataset braceexpand
"""

import io
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from absl import flags
from PIL import Image

from minigpt4_jax import errors
from minigpt4_jax.data.images import read_image, squash
from minigpt4_jax.data.loader import Loader, ReadPixels
from minigpt4_jax.data.plan import Plan
from minigpt4_jax.data.sources import Examples, open_data
from minigpt4_jax.errors import InputError
from minigpt4_jax.models.vit import DINOV2_S

BATCH, WORKERS, SIDE = 64, 2, DINOV2_S.image_size
WARM, STEPS = 12, 80  # batches of a round, the first of which are not counted
SAMPLE = 500  # images that are compared, and whose time is taken apart


def main(argv: list[str]) -> None:
    args = flags.FLAGS
    if not args.data or len(argv) > 1:
        raise InputError("give --data=FOLDER, which has train/*.tar, and only flags")
    examples = open_data(Path(args.data) / "train")
    compare(examples)
    rates: dict[str, list[float]] = {"torch + webdataset": [], "ours": []}
    for _ in range(args.rounds):
        rates["torch + webdataset"].append(rate(theirs(examples)))
        rates["ours"].append(rate(ours(examples)))
    peer = statistics.median(rates["torch + webdataset"])
    print(f"{'':20}{'images/s':>10}{'ratio':>7}")
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:20}{median:10.0f}{median / peer:7.2f}")
    print(parts(examples, statistics.median(rates["ours"])))


def ours(examples: Examples) -> Iterator[np.ndarray]:
    """Batches of pixels."""
    read = ReadPixels([examples], DINOV2_S)
    plan = Plan([len(examples)], [1], 0, BATCH)
    loader = Loader(
        *([examples], plan, _nothing, read),
        image="pixels_BHWC",
        blank=read.blank,
        stop=WARM + STEPS + 1,
        workers=WORKERS,
    )
    try:
        for batch in loader:
            yield batch["pixels_BHWC"]
    finally:
        loader.close(kill=True)


def _nothing(step: int, picks: np.ndarray) -> dict[str, np.ndarray]:
    return {}


def theirs(examples: Examples) -> Iterator[np.ndarray]:
    loader = torch.utils.data.DataLoader(
        _webdataset(examples).map(_pixels).batched(BATCH, partial=False),
        batch_size=None,
        num_workers=WORKERS,
        prefetch_factor=2,
    )
    yield from loader


def _webdataset(examples: Examples):
    try:
        import webdataset
    except ImportError as error:
        raise InputError(
            "the peer needs webdataset: pip install webdataset braceexpand"
        ) from error
    shards = [str(path) for path in examples.paths]
    return webdataset.WebDataset(shards, shardshuffle=False)


def _pixels(sample: dict) -> np.ndarray:
    """As squash does it, so that the pixels can be the same: width first."""
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    narrow = image.resize((SIDE, image.height), Image.Resampling.BICUBIC)
    return np.asarray(narrow.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def compare(examples: Examples) -> None:
    """Raise unless both make the same pixels of the first images."""
    keys = {examples.keys[i]: i for i in range(len(examples))}
    read = ReadPixels([examples], DINOV2_S)
    count = 0
    for sample in itertools.islice(_webdataset(examples), SAMPLE):
        i = keys[sample["__key__"].rpartition("/")[2]]
        if not np.array_equal(_pixels(sample), read(0, i)):
            raise AssertionError(f"{examples.where(i)}: other pixels")
        count += 1
    print(f"{count} images compared: the same pixels")


def rate(batches: Iterator[np.ndarray]) -> float:
    """Images a second, after the first batches; how long the end takes is not in it."""
    for _ in range(WARM):
        next(batches)
    began = time.perf_counter()
    count = sum(len(batch) for batch in itertools.islice(batches, STEPS))
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]  # generators both
    return count / seconds


def parts(examples: Examples, images_per_s: float) -> str:
    """CPU time an image in one process, and what is left of the workers' time."""
    seconds = dict.fromkeys(("read", "decode", "resize"), 0.0)
    for i in np.random.default_rng(0).permutation(len(examples))[:SAMPLE].tolist():
        times = [time.process_time()]
        data = examples.image(i)
        times.append(time.process_time())
        image_HWC = read_image(data)
        times.append(time.process_time())
        squash(image_HWC, DINOV2_S)
        times.append(time.process_time())
        for name, start, end in zip(seconds, times, times[1:]):
            seconds[name] += (end - start) / SAMPLE
    left = WORKERS / images_per_s - sum(seconds.values())
    named = {**seconds, "transport and waiting": left}
    return "  ".join(f"{name} {1e6 * value:.0f}" for name, value in named.items())


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Folder with train/*.tar.")
    flags.DEFINE_integer("rounds", 5, "Turns of each.", lower_bound=1)
    errors.run(main)
