"""How many tokens each caption of a data set has: counted once per tokenizer and kept.

A plan needs the lengths of all examples, and a tokenizer takes some 20 us for each.
"""

import contextlib
import hashlib
import inspect
import os
import sys
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt4_jax import alive, locate
from minigpt4_jax.data import index, workers
from minigpt4_jax.data.tokens import Tokenizer

Clean = Callable[[str], str]

AT_ONCE = 10_000  # examples that one worker counts
MANY = 200_000  # examples, from which on several processes pay


def token_counts(
    known: index.Index, tokenizer: Tokenizer, clean: Clean | None
) -> tuple[np.ndarray, np.ndarray]:
    """`starts` int64 [N + 1] and `counts` int32: example i has counts[starts[i]:starts[i+1]].

    Args:
        clean: what is done to a caption first; a function of a module.
    """
    name = f"tokens-{_key(tokenizer, clean)}"
    places = [known.folder, locate.cache_root() / "index" / known.meta["digest"][:16]]
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            return _read(place / name, known)
    found = _count(known, tokenizer, clean)
    for place in places:
        with contextlib.suppress(OSError):  # read-only, full: counted again next time
            _write(place, name, found)
            break
    return found


def _count(
    known: index.Index, tokenizer: Tokenizer, clean: Clean | None
) -> tuple[np.ndarray, np.ndarray]:
    size = len(known.rows)
    parts = [(i, min(i + AT_ONCE, size)) for i in range(0, size, AT_ONCE)]
    count = partial(_count_part, known.folder, tokenizer, clean)
    several = workers.available() if size >= MANY else 1
    lengths: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    with tqdm(desc="tokens", total=size, unit_scale=True, disable=None) as bar:
        for some_lengths, some_counts in workers.ordered(count, parts, several):
            lengths.append(some_lengths)
            counts.append(some_counts)
            bar.update(len(some_lengths))
            alive.sign()
    starts = np.zeros(size + 1, np.int64)
    np.cumsum(np.concatenate(lengths), out=starts[1:])
    return starts, np.concatenate(counts)


def _count_part(
    folder: Path, tokenizer: Tokenizer, clean: Clean | None, part: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    known = index.read(folder)
    lengths, counts = array("i"), array("i")
    for i in range(*part):
        captions = known.text(i)[4:]
        lengths.append(len(captions))
        for text in captions:
            counts.append(len(tokenizer.encode(clean(text) if clean else text)))
    return np.array(lengths, np.int32), np.array(counts, np.int32)


def _key(tokenizer: Tokenizer, clean: Clean | None) -> str:
    """What the counts depend on; a changed module of `clean` counts as another."""
    digest = hashlib.sha256(tokenizer.digest.encode())
    if clean is not None:
        digest.update(f"{clean.__module__}.{clean.__qualname__}".encode())
        with contextlib.suppress(OSError, TypeError):  # typed into a prompt
            digest.update(inspect.getsource(sys.modules[clean.__module__]).encode())
    return digest.hexdigest()[:16]


def _read(path: Path, known: index.Index) -> tuple[np.ndarray, np.ndarray]:
    """Raises OSError or ValueError if there is nothing whole."""
    starts = np.load(path.with_suffix(".starts.npy"), mmap_mode="r")
    counts = np.load(path.with_suffix(".counts.npy"), mmap_mode="r")
    if len(starts) != len(known.rows) + 1 or len(counts) != known.meta["captions"]:
        raise ValueError(path)
    return starts, counts


def _write(place: Path, name: str, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for suffix, values in zip((".starts.npy", ".counts.npy"), arrays):
        new = place / f"{name}{suffix}.{os.getpid()}"
        try:
            with open(new, "wb") as file:
                np.save(file, values)
            os.replace(new, place / (name + suffix))
        finally:
            new.unlink(missing_ok=True)
