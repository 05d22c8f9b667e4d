"""Memory that one process fills and another reads, used again and again.

Fresh shared memory costs a page fault for every 4 kB on either side: 110 us for an image
of 224 x 224 that takes 290 us to read and decode (two virtual cores). A block's first byte
tells whether it may be filled again; the reader clears it when nothing refers to what it
read any more.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from minigpt4_jax.errors import DataError

HEAD = 64  # bytes before the content, which stays aligned
FREE, TAKEN = 0, 1
SHARED = Path("/dev/shm")
PREFIX = "minigpt4-loader-"


@dataclass(frozen=True)
class Name:
    """What is sent of a block."""

    path: str


def make_folder(root: Path | None = None) -> tuple[Path, IO]:
    """Where blocks lie, and a lock that says that they are in use while it is open.

    In memory where the system has such a place. What a killed program left there would
    fill it up, so that the next one takes it away.
    """
    if root is None:
        root = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
    for folder in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_unused(folder)
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
    lock = open(hidden / "lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return hidden.rename(root / hidden.name[1:]), lock


def _remove_unused(folder: Path) -> None:
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


class Pool:
    """The blocks of a process that fills them; as many as are under way at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.blocks: dict[str, mmap.mmap] = {}

    def take(self, size: int) -> tuple[Name, np.ndarray]:
        """A free block of at least so many bytes."""
        free = (
            (path, memory)
            for path, memory in self.blocks.items()
            if memory[0] == FREE and len(memory) >= HEAD + size
        )
        path, memory = next(free, ("", None))
        if memory is None:
            path = str(self.folder / f"{os.getpid()}-{len(self.blocks)}")
            memory = self.blocks[path] = self._make(path, HEAD + size)
        memory[0] = TAKEN
        return Name(path), np.frombuffer(memory, np.uint8, offset=HEAD)

    def _make(self, path: str, size: int) -> mmap.mmap:
        with open(path, "x+b") as file:
            try:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a write without room kills
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise DataError(
                    f"{self.folder.parent} has no room for a batch of {size / 1e6:.0f} "
                    "MB; make it larger (docker: --shm-size), or lower "
                    "config.loader.workers or prefetch"
                ) from error
            return mmap.mmap(file.fileno(), size)


class Reader:
    """The other side."""

    def __init__(self) -> None:
        self.blocks: dict[str, mmap.mmap] = {}

    def open(self, name: Name) -> np.ndarray:
        """The bytes of a block, which is free again once this array and all its views
        are gone."""
        memory = self.blocks.get(name.path)
        if memory is None:
            with open(name.path, "r+b") as file:
                memory = self.blocks[name.path] = mmap.mmap(file.fileno(), 0)
            os.unlink(name.path)  # stays as long as it is mapped, whoever is killed
        block = np.frombuffer(memory, np.uint8, offset=HEAD)
        weakref.finalize(block, _free, memory).atexit = False
        return block


def _free(memory: mmap.mmap) -> None:
    memory[0] = FREE
