"""What is kept of a tar or of loose files, and under which reason the rest is counted."""

import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax.data import scan
from minigpt4_jax.data.images import MAX_PIXELS, MAX_SIDE
from minigpt4_jax.data.scan import Fault, Label, Loose, header, label_of, scan_loose
from minigpt4_jax.errors import DataError
from tests.shards import jpeg, photo, write_tar


def scan_tar(path: Path):
    return scan.scan_tar((3, path, path.stat().st_size))


def kept(found) -> list[list]:
    import json

    texts = bytes(found.texts)
    return [json.loads(texts[row[3] : row[3] + row[4]]) for row in found.rows]


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; nothing but the header is there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"")


# Tars


def test_the_members_that_img2dataset_writes_are_read(tmp_path):
    members = []
    for i in range(3):
        key = f"{i:09d}"
        fields = {
            "caption": f"Photo {i}.",
            "url": "http://photos.example/1.jpg",
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 14,
            "height": 6,
            "exif": "{}",
            "sha256": "0" * 64,  # of the image before it was resized
        }
        members += [(f"{key}.jpg", jpeg(i)), (f"{key}.json", fields)]
        members += [(f"{key}.txt", f"Photo {i}.".encode())]
    path = write_tar(tmp_path / "00000.tar", members, tarfile.PAX_FORMAT)
    found = scan_tar(path)
    assert kept(found) == [[f"{i:09d}", "", "", "", f"Photo {i}."] for i in range(3)]
    assert (found.shard, found.captions, found.lost, found.notes) == (3, 3, {}, {})
    for i, row in enumerate(found.rows):
        assert path.read_bytes()[row[2] : row[2] + row[1]] == jpeg(i)
        assert row[5] == (14, 6)


def test_members_pair_by_name_whatever_their_order_folder_or_suffix(tmp_path):
    members = [
        ("part/7.b.json", {"caption": "Only one.", "license": "CC BY", "source": "me"}),
        ("part/8.json", {"captions": ["Eight."]}),
        ("part/8.PNG", jpeg(8, form="png")),
        ("part/7.b.jpeg", jpeg(7)),
        ("part/9.webp", jpeg(9, form="webp")),
        ("part/9.txt", "\ufeffNine, d\u00e9j\u00e0.\n".encode()),
        ("part/9.cls", b"ignored"),
        ("part/._8.jpg", b"a file of macOS"),
        ("/etc/passwd.jpg", jpeg(1)),
        ("/etc/passwd.txt", b"An absolute name is only a name."),
    ]
    found = scan_tar(write_tar(tmp_path / "a.tar", members))
    assert kept(found) == [
        ["part/8", "", "", "", "Eight."],
        ["part/7.b", "CC BY", "me", "", "Only one."],
        ["part/9", "", "", "", "Nine, d\u00e9j\u00e0."],
        ["/etc/passwd", "", "", "", "An absolute name is only a name."],
    ]
    assert not found.lost and not found.notes


def test_a_json_wins_over_a_text_file_unless_it_says_nothing(tmp_path):
    members = [
        *photo("both", "From json."),
        ("both.txt", b"From txt."),
        *photo("empty", license="CC0"),
        ("empty.txt", b"Only in txt."),
        *photo("blank", " "),
        ("blank.txt", b"Not blank."),
        ("torn.jpg", jpeg(0)),
        ("torn.json", b'{"caption": "cut he'),
        ("torn.txt", b"Whole."),
    ]
    found = scan_tar(write_tar(tmp_path / "a.tar", members))
    assert [(text[0], text[1], text[4:]) for text in kept(found)] == [
        ("both", "", ["From json."]),
        ("empty", "CC0", ["Only in txt."]),
        ("blank", "", ["Not blank."]),
        ("torn", "", ["Whole."]),
    ]
    assert (found.lost, found.notes) == ({}, {"json not readable": 1})


def test_what_cannot_be_used_is_left_out_and_counted_by_reason(tmp_path):
    link = tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *photo("good", " A dog. ", "", "  ", 3),
        ("alone.jpg", jpeg(0)),
        ("mute.json", {"caption": "No image."}),
        ("mute.txt", b"No image."),
        ("void.jpg", b""),
        ("void.json", {"caption": "An empty image."}),
        ("word.jpg", b"not an image"),
        ("word.json", {"caption": "Words."}),
        ("half.jpg", jpeg(1, 60, 60)[:1500]),
        ("half.txt", b"Half."),
        ("bomb.png", png(20_000, 20_000)),
        ("bomb.txt", b"Large."),
        ("link.jpg", link),
        ("link.txt", b"Elsewhere."),
        ("torn.jpg", jpeg(0)),
        ("torn.json", b'{"caption": "cut he'),
        ("latin.jpg", jpeg(0)),
        ("latin.json", b'{"caption": "caf\xe9"}'),
        ("latin2.jpg", jpeg(0)),
        ("latin2.txt", b"caf\xe9"),
        ("deep.jpg", jpeg(0)),
        ("deep.json", b"[" * 100_000),
        ("list.jpg", jpeg(0)),
        ("list.json", b'["A dog."]'),
        ("dict.jpg", jpeg(0)),
        ("dict.json", {"captions": {"en": "A dog."}}),
        ("long.jpg", jpeg(0)),
        ("long.txt", b"x" * (2**20 + 1)),
        *photo("blank", " ", "\n"),
        ("blank2.jpg", jpeg(0)),
        ("blank2.txt", b"\n"),
        ("pair.jpg", jpeg(0)),
        ("pair.json", rb'{"caption": "half of \ud83d"}'),
        ("none.jpg", jpeg(0)),
        ("none.json", {"license": "CC BY"}),
        *photo("good", "Again."),
        *photo("good", "And again."),
    ]
    found = scan_tar(write_tar(tmp_path / "a.tar", members))
    assert kept(found) == [["good", "", "", "", "A dog."]]
    assert found.notes == {"blank caption": 3}
    assert found.lost == {
        "image without caption": 1,
        "caption without image": 1,
        "empty image": 1,
        "not an image": 1,
        "truncated JPEG": 1,
        f"image over {MAX_PIXELS:,} pixels": 1,
        "link or special file": 1,
        "json not readable": 5,
        "caption not UTF-8": 1,
        "caption file over 1,048,576 bytes": 1,
        "blank caption": 2,
        "caption with half a surrogate pair": 1,
        "no caption": 1,
        "duplicate key": 2,
    }
    assert found.places["json not readable"] == ["torn", "latin", "deep"]


def test_what_is_readable_before_a_damage_stays(tmp_path):
    members = [m for i in range(6) for m in photo(f"{i}", "A photo.")]
    path = write_tar(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    rows = scan_tar(path).rows
    starts = [row[2] - 512 for row in rows]
    # In the middle of an image, of the header before, of the json behind it.
    for cut in (starts[2] + 700, starts[2] + 100, rows[2][2] + 1024):
        path.write_bytes(whole[:cut])
        found = scan_tar(path)
        assert found.rows == rows[:2]
        assert found.lost == {"tar cut short": 1}
    for i in (2, 5):
        damaged = bytearray(whole)
        damaged[starts[i]] ^= 255
        path.write_bytes(damaged)
        found = scan_tar(path)
        assert found.rows == rows[:i]
        assert found.lost == {"tar damaged header": 6 - i}
    path.write_bytes(whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 1024])
    assert scan_tar(path).rows == rows


def test_what_is_no_tar_at_all_is_one_loss_and_a_compressed_one_an_error(tmp_path):
    path = tmp_path / "a.tar"
    path.write_text("not a tar " * 200)
    found = scan_tar(path)
    assert (found.rows, found.lost) == ([], {"tar damaged header": 1})
    path.write_bytes(b"")
    assert scan_tar(path).lost == {"tar cut short": 1}
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(DataError, match=r"a\.tar: compressed with gzip; want .*unpack"):
        scan_tar(path)
    path.unlink()
    path.mkdir()
    found = scan.scan_tar((0, path, 0))
    assert found.lost == {"tar not readable (Is a directory)": 1}


def test_no_damage_anywhere_raises(tmp_path):
    forms = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm")
    members = [m for i in range(3) for m in photo(f"{i}", "A photo.")]
    for form in forms:
        members += [(f"{form}.{form[:4]}", jpeg(0, form=form)), (f"{form}.txt", b"A.")]
    path = write_tar(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 40):
            data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        found = scan_tar(path)
        assert len(found.rows) + sum(found.lost.values()) >= 1
        kept(found)


# Loose files


def test_loose_images_are_read_where_they_are(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.jpg").write_bytes(jpeg(1, 20, 10))
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    (tmp_path / "b.txt").write_text("From a file.")
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    records = [
        Loose("a", "sub/a.jpg", Label(["One.", "Two."], "CC0", "here")),
        Loose("b", "b.jpg", ("b.txt",)),
        Loose("c", "absent.jpg", Label(["Not there."])),
        Loose("d", "b.jpg/x.jpg", Label(["Not there."])),
        Loose("e", "empty.jpg", Label(["Empty."])),
        Loose("f", "pipe.jpg", Label(["It would never end."])),
        Loose("g", "sub", Label(["A folder."])),
        Loose("h", "nul\0.jpg", Label(["Odd."])),
        Loose("i", "b.jpg", ()),
        Loose("j", "b.jpg", ("absent.txt",)),
        Loose("line 7", "", Fault("no JSON")),
    ]
    found = scan_loose((2, tmp_path, records))
    assert kept(found) == [
        ["a", "CC0", "here", "sub/a.jpg", "One.", "Two."],
        ["b", "", "", "b.jpg", "From a file."],
    ]
    assert [(row[0], row[2], row[5]) for row in found.rows] == [
        (2, 0, (20, 10)),
        (2, 0, (14, 6)),
    ]
    assert (found.captions, found.work) == (3, 11)
    assert found.lost == {
        "image file absent": 2,
        "empty image": 1,
        "image is no file": 2,
        "image file not readable": 1,
        "image without caption": 1,
        "caption file not readable": 1,
        "no JSON": 1,
    }


# Headers and labels


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_a_header_tells_width_and_height(form):
    assert header(jpeg(0, 17, 9, form)) == (17, 9)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_size_that_cannot_be_decoded_is_refused_from_the_header():
    for data, words in (
        (png(MAX_PIXELS + 1, 1), f"image over {MAX_PIXELS:,} pixels"),
        (png(2**31 - 1, 2**31 - 1), f"image over {MAX_PIXELS:,} pixels"),
        (png(MAX_SIDE + 1, 1), f"image side over {MAX_SIDE:,} pixels"),
        (png(0, 5), "image of 0 pixels|not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    ):
        with pytest.raises(Fault, match=words):
            header(data)


def test_a_jpeg_is_whole_whatever_follows_its_end_and_cut_whatever_precedes_it():
    import io

    from PIL import Image

    whole = jpeg(3, 90, 70)
    assert header(whole + b"a trailer of some camera" * 9_000) == (90, 70)
    exif = Image.Exif()
    exif[0x010E] = "a thumbnail would be here \xff\xd9"
    thumbnail = b"Exif\0\0" + jpeg(4)  # it has an end of its own
    file = io.BytesIO()
    Image.open(io.BytesIO(whole)).save(file, "jpeg", exif=thumbnail, progressive=True)
    data = file.getvalue()
    assert data.count(b"\xff\xd9") == 2
    assert header(data) == (90, 70)
    for cut in (2, 100, len(data) // 3):
        with pytest.raises(Fault, match="truncated JPEG"):
            header(data[:-cut])


def test_captions_may_be_called_three_things():
    assert label_of({"captions": ["A.", " B. "]}).captions == ["A.", "B."]
    assert label_of({"captions": [], "caption": "C."}).captions == ["C."]
    assert label_of({"captions": None, "text": "D."}).captions == ["D."]
    assert label_of({"captions": "E.", "caption": "F."}).captions == ["E."]
    assert label_of({"license": None, "source": 7}) == Label([], "", "7")
    assert label_of({"license": "\ud83d", "caption": "G."}).license == ""
    for fields in (None, [], "A.", 3, {"captions": 3}, {"caption": {"a": "b"}}):
        with pytest.raises(Fault, match="json not readable"):
            label_of(fields)
