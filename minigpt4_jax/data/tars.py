"""The members of a tar, one after another, whatever the file holds: names and spans.

Not the standard `tarfile`: that allocates what a header claims, takes a damaged header
for the end of the file, and keeps every member in memory. Nothing is extracted, so links
and absolute names are only names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_HEADER = 2**20  # bytes of a long name or of pax records: real ones have hundreds

COMPRESSED = {  # first bytes -> what made them
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}

_FILES = b"0\x007"
_EMPTY = b"123456"  # links, devices, folders, pipes: their size says nothing
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"LKxgS"


class Damage(Exception):
    """A tar cannot be read on; its text is the reason, `at` the offset."""

    def __init__(self, reason: str, at: int):
        super().__init__(reason)
        self.at = at


@dataclass(frozen=True)
class Member:
    name: str
    offset: int  # of its content
    size: int
    plain: bool  # an ordinary file: no link, no device, no holes


def members(file: BinaryIO, length: int) -> Iterator[Member]:
    """The members of an uncompressed tar of `length` bytes, in order.

    While a member is out, the file stands at its content and may be read and moved.

    Raises:
        Damage: a broken header, a member beyond the end, or no end marker.
    """
    at, given = 0, {}
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if block == ZEROS:
            return
        if len(block) < BLOCK:
            raise Damage("cut short", at)
        if not _sound(block):
            raise Damage("damaged header", at)
        kind, size = block[156], _number(block[124:136], at)
        data = at + BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if size > MAX_HEADER:
                raise Damage("damaged header", at)
            text = file.read(size)
            if len(text) < size:
                raise Damage("cut short", at)
            if kind == _LONG_NAME:
                given["path"] = _text(text)
            elif kind == _PAX:
                given |= _records(text, at)
            at = data + _padded(size)
            continue
        if "size" in given:
            size = _number(given["size"].encode(), at, base=10)
        data += _more_holes(file, block) if kind == _SPARSE else 0
        held = 0 if kind in _EMPTY else size
        if data + held > length:
            raise Damage("cut short", at)
        holes = kind == _SPARSE or any(key.startswith("GNU.sparse") for key in given)
        name = given.get("GNU.sparse.name") or given.get("path") or _name(block)
        file.seek(data)
        yield Member(name, data, held, kind in _FILES and not holes)
        at, given = data + _padded(held), {}


def count_after(file: BinaryIO, at: int, wanted: Callable[[str], bool]) -> int:
    """How many whole headers after a damage have a wanted name: what was lost there."""
    file.seek(at + BLOCK)
    found = 0
    while len(block := file.read(BLOCK)) == BLOCK:
        if block[257:262] == b"ustar" and _sound(block):
            found += block[156] in _FILES and wanted(_name(block))
    return found


def _sound(block: bytes) -> bool:
    """Whether a header's checksum is right, summed as bytes or, as some did, signed."""
    try:
        want = int(block[148:156].split(b"\0")[0].strip(), 8)
    except ValueError:
        return False
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * ord(" ")
    return want == total or want == total - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes, at: int, base: int = 8) -> int:
    """A size: octal digits, or GNU's binary for 8 GB and more."""
    try:
        if field[0] in (0x80, 0xFF):
            value = int.from_bytes(field[1:], "big")
            value -= 256 ** (len(field) - 1) if field[0] == 0xFF else 0
        else:
            value = int(field.split(b"\0")[0].strip() or b"0", base)
    except (ValueError, IndexError):
        raise Damage("damaged header", at) from None
    if value < 0:
        raise Damage("damaged header", at)
    return value


def _name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(text: bytes, at: int) -> dict[str, str]:
    """pax records: each "LENGTH KEY=VALUE\n", the length counting itself."""
    found = {}
    while text.strip(b"\0"):
        digits, _, _ = text[:20].partition(b" ")
        size = int(digits) if digits.isdigit() else 0
        key, equals, value = text[len(digits) + 1 : max(size - 1, 0)].partition(b"=")
        if not equals or size > len(text):
            raise Damage("damaged header", at)
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        text = text[size:]
    return found


def _more_holes(file: BinaryIO, block: bytes) -> int:
    """Bytes of the blocks in which a sparse member's map goes on."""
    total, goes_on = 0, block[482]
    while goes_on:
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            break  # the content is beyond the end as well
        total, goes_on = total + BLOCK, block[504]
    return total


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
