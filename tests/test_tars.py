"""The walk through a tar, beside the standard library's, and over damaged ones."""

import io
import os
import tarfile

import numpy as np
import pytest

from minigpt4_jax.data import tars
from minigpt4_jax.data.tars import BLOCK, Damage, count_after, members
from tests.shards import write_tar

CONTENTS = [
    ("a.jpg", b"x" * 700),
    ("b/c.json", b"{}"),
    ("empty.txt", b""),
    ("d\u00e9j\u00e0.jpg", b"z" * 512),
]


def walk(data: bytes) -> list:
    return list(members(io.BytesIO(data), len(data)))


def fault(data: bytes) -> str:
    with pytest.raises(Damage) as caught:
        walk(data)
    return str(caught.value)


def header(name=b"a.jpg", size=b"00000000003\0", kind=b"0", sums=None) -> bytes:
    """A ustar header made by hand, with the checksum that it should have."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size
    block += b"00000000000\0" + b" " * 8 + kind + bytes(100) + b"ustar\x0000"
    block = block.ljust(BLOCK, b"\0")
    total = sum(block) if sums is None else sums(block)
    return block[:148] + b"%06o\0 " % total + block[156:]


@pytest.mark.parametrize("form", range(3), ids=["ustar", "gnu", "pax"])
def test_members_are_those_of_the_standard_library(tmp_path, form):
    contents = list(CONTENTS)
    if form != tarfile.USTAR_FORMAT:
        contents += [("n" * 150 + ".jpg", b"long"), ("m/" * 200 + "e.jpg", b"longer")]
        contents.append((os.fsdecode(b"caf\xe9.jpg"), b"latin"))
    else:
        contents.append(("f" * 90 + "/" + "g" * 90 + ".jpg", b"with a prefix"))
    path = write_tar(tmp_path / "a.tar", contents, form)
    with tarfile.open(path, "r:") as tar:
        want = [(m.name, m.offset_data, m.size) for m in tar]
    data = path.read_bytes()
    found = walk(data)
    assert [(m.name, m.offset, m.size) for m in found] == want
    assert all(m.plain for m in found)
    assert [data[m.offset : m.offset + m.size] for m in found] == [
        content for _, content in contents
    ]


def test_members_may_be_read_or_not_while_they_are_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", CONTENTS)
    with open(path, "rb") as file:
        read = [file.read(m.size) for m in members(file, path.stat().st_size)]
    assert read == [content for _, content in CONTENTS]


def test_what_is_no_ordinary_file_says_so():
    end = bytes(2 * BLOCK)
    for kind in b"123456":
        data = header(kind=bytes([kind])) + end  # its size means nothing
        assert [(m.size, m.plain) for m in walk(data)] == [(0, False)]
    for kind in b"0\x007":
        data = header(kind=bytes([kind])) + b"abc".ljust(BLOCK, b"\0") + end
        assert [(m.size, m.plain) for m in walk(data)] == [(3, True)]


def test_a_member_with_holes_is_passed_over_whole():
    """An old GNU one, whose map goes on in two more blocks; and a pax one."""
    first = bytearray(header(b"holes.jpg", kind=b"S"))
    first[482] = 1
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    more = bytes(504) + b"\1" + bytes(7)
    content = b"abc".ljust(BLOCK, b"\0")
    after = header(b"b.jpg") + content
    data = bytes(first) + more + bytes(BLOCK) + content + after + bytes(2 * BLOCK)
    assert [(m.name, m.plain) for m in walk(data)] == [
        ("holes.jpg", False),
        ("b.jpg", True),
    ]
    record = b"28 GNU.sparse.name=real.jpg\n"
    assert len(record) == 28
    data = header(kind=b"x", size=b"%011o\0" % 28) + record.ljust(BLOCK, b"\0")
    data += header(b"GNUSparseFile.7/real.jpg") + content + after + bytes(2 * BLOCK)
    assert [(m.name, m.plain) for m in walk(data)] == [
        ("real.jpg", False),
        ("b.jpg", True),
    ]


def test_a_size_of_8_gb_is_read_and_a_signed_checksum_too():
    size = b"\x80" + (9 * 2**30).to_bytes(11, "big")
    assert fault(header(size=size) + bytes(BLOCK)) == "cut short"
    member = next(members(io.BytesIO(header(size=size)), 10**12))
    assert member.size == 9 * 2**30

    def signed(block: bytes) -> int:
        return sum(byte - 256 if byte > 127 else byte for byte in block)

    data = header("\u00e9\u00e9.jpg".encode(), b"00000000000\0", sums=signed)
    assert [m.name for m in walk(data + bytes(BLOCK))] == ["\u00e9\u00e9.jpg"]


def test_a_tar_cut_anywhere_is_cut_short_unless_only_its_end_is_shorter(tmp_path):
    data = write_tar(tmp_path / "a.tar", CONTENTS).read_bytes()
    end = walk(data)[-1].offset + BLOCK
    assert not any(data[end:])
    for kept in [*range(0, end + BLOCK, 100), end, end + BLOCK - 1]:
        assert fault(data[:kept]) == "cut short"
    assert len(walk(data[: end + BLOCK])) == len(CONTENTS)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(b"-0000000003\0", id="minus"),
        pytest.param(b"\xff" * 12, id="binary minus"),
        pytest.param(b"junkjunkjunk", id="words"),
        pytest.param(b"99999999999\0", id="no octal digits"),
    ],
)
def test_an_impossible_size_is_a_damaged_header(size):
    assert fault(header(size=size) + bytes(4 * BLOCK)) == "damaged header"


def test_a_size_beyond_the_file_allocates_nothing():
    for size in (b"77777777777\0", b"\x80" + b"\x7f" * 11):
        assert fault(header(size=size) + bytes(4 * BLOCK)) == "cut short"
        for kind in b"xgLK":
            data = header(size=size, kind=bytes([kind])) + bytes(4 * BLOCK)
            assert fault(data) == "damaged header"


@pytest.mark.parametrize(
    "record",
    [b"4 a=b\n", b"9999 path=a\n", b"0 path=a\n", b"path=a\n", b"-7 a=b\n", b"7 pa\n"],
)
def test_wrong_pax_records_are_a_damaged_header(record):
    data = header(kind=b"x", size=b"%011o\0" % len(record))
    data += record.ljust(BLOCK, b"\0") + header() + bytes(4 * BLOCK)
    assert fault(data) == "damaged header"


def test_a_broken_size_of_pax_is_a_damaged_header():
    for value in (b"-5", b"x", b"9" * 5000):
        text = b" size=" + value + b"\n"
        length = next(n for n in range(9, 6000) if n == len(str(n)) + len(text))
        record = b"%d%s" % (length, text)
        data = header(kind=b"x", size=b"%011o\0" % length)
        data += record.ljust(-(-length // BLOCK) * BLOCK, b"\0") + header()
        assert fault(data + bytes(4 * BLOCK)) == "damaged header"


def test_ten_thousand_long_names_in_a_row_are_no_recursion():
    one = header(kind=b"L") + b"abc".ljust(BLOCK, b"\0")
    assert walk(one * 10_000 + bytes(BLOCK)) == []


def test_no_damage_raises_anything_else(tmp_path):
    contents = [*CONTENTS, ("n" * 150 + ".jpg", b"long"), ("\u00e9" * 80, b"pax")]
    rng = np.random.default_rng(0)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = write_tar(tmp_path / "a.tar", contents, form).read_bytes()
        for _ in range(300):
            data = bytearray(whole)
            at = rng.integers(0, len(data), 3)
            for place in at:
                data[place] ^= int(rng.integers(1, 256))
            for place in at:  # and with a checksum that agrees
                start = place // BLOCK * BLOCK
                block = data[start : start + BLOCK]
                block[148:156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
            try:
                found = walk(bytes(data))
            except Damage as damage:
                assert str(damage) in ("cut short", "damaged header")
                assert 0 <= damage.at <= len(data)
            else:
                assert all(m.offset + m.size <= len(data) for m in found)


def test_what_lies_behind_a_damage_is_counted(tmp_path):
    contents = [(f"{i}{end}", b"x" * 600) for i in range(5) for end in (".jpg", ".txt")]
    data = bytearray(write_tar(tmp_path / "a.tar", contents).read_bytes())
    start = walk(bytes(data))[4].offset - BLOCK
    data[start] ^= 255
    with pytest.raises(Damage) as caught:
        walk(bytes(data))
    assert caught.value.at == start
    file = io.BytesIO(bytes(data))
    assert count_after(file, start, lambda name: name.endswith(".jpg")) == 2
    assert count_after(file, start, lambda name: name.endswith(".txt")) == 3


def test_compressed_starts_are_known():
    import bz2
    import gzip
    import lzma

    for pack, name in ((gzip, "gzip"), (bz2, "bzip2"), (lzma, "xz")):
        packed = pack.compress(b"x")
        assert [n for m, n in tars.COMPRESSED.items() if packed.startswith(m)] == [name]
