"""sha256 of a file of weights, and the checksums inside it, in one reading."""

import contextlib
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minigpt4_jax.errors import CheckpointError

CHUNK = 1 << 24


@contextlib.contextmanager
def beside(files: Iterable[Path]) -> Iterator[Callable[[], dict[Path, str]]]:
    """Hashes files while the caller works with them; yields a function that waits for
    the digests, or raises what is wrong with a file."""
    # One thread: reading is what takes the time, and two would read in turns.
    with ThreadPoolExecutor(1) as pool:
        sums = {file: pool.submit(sha256, file) for file in dict.fromkeys(files)}
        try:
            yield lambda: {file: future.result() for file, future in sums.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sha256(path: Path) -> str:
    """Hex digest; raises CheckpointError when a record of a zip file (as torch saves)
    has another checksum than its directory says: torch itself maps it unchecked."""
    digest = hashlib.sha256()
    records = _records(path) if zipfile.is_zipfile(path) else []
    sums = [0] * len(records)
    at = first = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            end = at + len(chunk)
            for i in range(first, len(records)):
                start, stop = records[i][:2]
                if start >= end:
                    break
                if stop <= at:
                    first = i + 1
                    continue
                part = memoryview(chunk)[max(start - at, 0) : stop - at]
                sums[i] = zlib.crc32(part, sums[i])
            at = end
    for (_, _, want, name), got in zip(records, sums):
        if got != want:
            raise CheckpointError(
                f"{path}: {name} has checksum {got:08x}, want {want:08x}; the file is "
                "damaged, fetch it again"
            )
    return digest.hexdigest()


def _records(path: Path) -> list[tuple[int, int, int, str]]:
    """(start, stop, checksum, name) of each uncompressed record, in file order."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            found = []
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    continue
                file.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                start = info.header_offset + 30 + name + extra
                found.append((start, start + info.file_size, info.CRC, info.filename))
    except (zipfile.BadZipFile, struct.error, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again") from error
    return sorted(found)
