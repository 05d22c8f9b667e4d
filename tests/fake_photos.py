"""Data sets for the loader's tests; without JAX, which loader processes refuse to import."""

import io
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4_jax.errors import InputError


def jpeg(seed: int) -> bytes:
    image_HWC = np.random.default_rng(seed).integers(0, 256, (9, 15, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "jpeg")
    return file.getvalue()


class Photos:
    """So many photos; those in `bad` are cut short."""

    def __init__(self, count: int, bad=()):
        self.count, self.bad = count, set(bad)

    def image(self, i: int) -> bytes:
        return jpeg(i)[:60] if i in self.bad else jpeg(i)

    def where(self, i: int) -> str:
        return f"{i // 4}.tar: {i:05d}"


class Numbers:
    """What stands in for text: the picks themselves, in arrays of each kind."""

    def __call__(self, step, picks):
        return {
            "picks_B3": picks,
            "row_RT": np.repeat(picks[:, :1], 7, axis=1),
            "words_V": np.arange(3),
        }


class Failing(Numbers):
    """An error at one step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, step, picks):
        if step == self.step:
            raise InputError(f"no arrays for step {step}")
        return super().__call__(step, picks)


class Watched(Numbers):
    """Writes who made a step, and sends itself `signal` at one step: once, or always."""

    def __init__(self, folder: Path, step: int, number: signal.Signals, always=False):
        self.folder, self.step, self.number = folder, step, number
        self.always = always

    def __call__(self, step, picks):
        modules = sorted({name.partition(".")[0] for name in sys.modules})
        (self.folder / f"{os.getpid()}.txt").write_text(" ".join(modules))
        mark = self.folder / "done"
        if step == self.step and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), self.number)
            time.sleep(0.2)  # until it comes
        return super().__call__(step, picks)


class Recorded:
    """Reads blank images, and remembers which."""

    def __init__(self):
        self.asked: list[tuple[int, int]] = []

    def __call__(self, source: int, example: int) -> np.ndarray:
        self.asked.append((source, example))
        return np.zeros((12, 12, 3), np.uint8)
