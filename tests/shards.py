"""Small tars and photos for the tests of data sets."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, width: int = 14, height: int = 6, form: str = "jpeg") -> bytes:
    """An encoded photo of noise."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    noise_HWC = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise_HWC).save(file, form)
    return file.getvalue()


def write_tar(path: Path, members, form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write (name, content) in order; a dict becomes JSON, a TarInfo is written as is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            if isinstance(content, dict):
                content = json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def photo(key: str, *captions: str, seed: int | None = None, **fields) -> list:
    """Members of one example, its noise drawn from its name."""
    seed = sum(map(ord, key)) if seed is None else seed
    return [
        (f"{key}.jpg", jpeg(seed)),
        (f"{key}.json", {"captions": list(captions), **fields}),
    ]


def photos(start: int, stop: int, words: str = "A photo.") -> list:
    return [m for i in range(start, stop) for m in photo(f"{i:05d}", words, seed=i)]
