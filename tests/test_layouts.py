"""Which layout a path is taken for, and what each lists."""

import json
import tarfile

import pytest

from minigpt4_jax.data import layouts
from minigpt4_jax.data.layouts import listing
from minigpt4_jax.data.scan import Fault, Label
from minigpt4_jax.errors import DataError
from tests.shards import jpeg, photo, write_tar


def records(path) -> list:
    """(key, image, captions or reason or files) of a set of loose images."""
    found = []
    for shard, base, some in listing(path).parts():
        assert shard == 0 and base == (path if path.is_dir() else path.parent)
        for key, image, label in some:
            said = label.captions if isinstance(label, Label) else label
            found.append((key, image, str(said) if isinstance(said, Fault) else said))
    return found


def test_a_folder_of_tars_ignores_what_lies_beside_them(tmp_path):
    for name in ("b.tar", "a.tar", ".hidden.tar"):
        write_tar(tmp_path / name, photo("0", "A."))
    for name in ("00000.parquet", "00000_stats.json", "README.txt", "x.jpg"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.tar").mkdir()
    found = listing(tmp_path)
    assert found.shards == ("a.tar", "b.tar")
    size = (tmp_path / "a.tar").stat().st_size
    assert list(found.parts()) == [
        (0, tmp_path / "a.tar", size),
        (1, tmp_path / "b.tar", size),
    ]
    assert (found.total, found.base) == (2 * size, tmp_path)
    one = listing(tmp_path / "b.tar")
    assert (one.shards, one.base) == (("b.tar",), tmp_path)


def test_compressed_tars_are_an_error_unless_they_are_unpacked_beside(tmp_path):
    write_tar(tmp_path / "a.tar", photo("0", "A."))
    for name in ("a.tar.gz", "b.tgz"):
        with tarfile.open(tmp_path / name, "w:gz"):
            pass
        with pytest.raises(DataError, match=rf"{name}: compressed; .* unpack it"):
            listing(tmp_path / name)
    with pytest.raises(DataError, match=r"b\.tgz: compressed"):
        listing(tmp_path)
    (tmp_path / "b.tgz").unlink()
    assert listing(tmp_path).shards == ("a.tar",)


@pytest.mark.parametrize("wrapped", [True, False])
def test_filter_cap_json_names_images_by_number(tmp_path, wrapped):
    entries = [
        {"image_id": "2", "caption": "Two."},
        {"image_id": 30, "caption": " Thirty. "},
        {"image_id": "../../secret", "caption": "Elsewhere."},
        {"image_id": None, "caption": "No id."},
        {"image_id": "4", "caption": ""},
        {"image_id": "2", "caption": "Two."},
        {"image_id": "2", "caption": "Two again."},
        "no object",
    ]
    path = tmp_path / "filter_cap.json"
    path.write_text(json.dumps({"annotations": entries} if wrapped else entries))
    assert records(path) == [
        ("2", "image/2.jpg", ["Two.", "Two again."]),
        ("30", "image/30.jpg", ["Thirty."]),
        ("../../secret", "", "no image_id"),
        ("line 4", "", "no image_id"),
        ("4", "image/4.jpg", []),
        ("2", "", "duplicate key"),
        ("line 8", "", "no image_id"),
    ]
    (tmp_path / "x.tar").touch()  # it says less than the list does
    assert listing(tmp_path).shards == ("filter_cap.json",)
    assert listing(tmp_path).signature == listing(path).signature
    for text in ("{", '{"annotation": []}', "3"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"filter_cap\.json: (not readable|want)"):
            listing(tmp_path)


def test_lines_of_one_image_in_a_csv_are_its_captions(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(
        "\ufeffCaption,image,license\r\n"
        '"A dog, running.",photos/a.jpg,CC0\r\n'
        '"He said ""hi"",\nthen left.",b.jpg,\r\n'
        "A dog again.,photos/a.jpg,CC0\r\n"
        "A dog again.,photos/a.jpg,CC0\r\n"
        "\r\n"
        "One, two,c.jpg,\r\n"
        " ,d.jpg,\r\n"
        "No image.,,\r\n",
        encoding="utf-8",
    )
    assert records(path) == [
        ("photos/a.jpg", "photos/a.jpg", ["A dog, running.", "A dog again."]),
        ("b.jpg", "b.jpg", ['He said "hi",\nthen left.']),
        ("photos/a.jpg", "", "duplicate key"),
        ("line 8", "", "wrong number of columns"),
        ("d.jpg", "d.jpg", []),
        ("line 10", "", "no image"),
    ]


def test_a_lone_quote_in_a_tsv_swallows_no_line(tmp_path):
    path = tmp_path / "own.tsv"
    path.write_text('image\tcaption\na.jpg\t"A dog.\nb.jpg\tA "cat".\n')
    assert records(path) == [
        ("a.jpg", "a.jpg", ['"A dog.']),
        ("b.jpg", "b.jpg", ['A "cat".']),
    ]


def test_a_jsonl_may_have_a_caption_or_several(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"image": "a.jpg", "caption": "One.", "license": "CC0", "id": 7}\n'
        "\n"
        '{"image": "b.jpg", "captions": ["Two.", "Zwei\u2028."]}\r\n'
        "not json\n"
        '["a.jpg", "A."]\n'
        '{"image": "c.jpg", "captions": 3}\n'
        '{"file_name": "d.jpg", "text": "As others call them."}\n'
        '{"image": 5, "caption": "Five."}\n'
        '{"image": "line 4", "caption": "An odd name."}',
        encoding="utf-8",
    )
    assert records(path) == [
        ("a.jpg", "a.jpg", ["One."]),
        ("b.jpg", "b.jpg", ["Two.", "Zwei\u2028."]),
        ("line 4", "", "no JSON"),
        ("line 5", "", "no JSON"),
        ("c.jpg", "", "json not readable"),
        ("d.jpg", "d.jpg", ["As others call them."]),
        ("line 8", "", "no image"),
        ("line 4", "line 4", ["An odd name."]),
    ]


@pytest.mark.parametrize("name", layouts.LISTS)
def test_a_folder_with_a_list_is_that_list(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    row = '{"file_name": "a.jpg", "text": "A."}'
    tab = "\t" if name.endswith(".tsv") else ","
    text = row if name.endswith(".jsonl") else f"image{tab}caption\na.jpg{tab}A.\n"
    (tmp_path / name).write_text(text)
    assert records(tmp_path) == [("a.jpg", "a.jpg", ["A."])]
    assert listing(tmp_path).signature == listing(tmp_path / name).signature


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "own.csv"
    for data, words in (
        (b"", r"got the columns \[\]; want a first line"),
        (b"photo,words\na.jpg,A.\n", "want a first line that names image and caption"),
        (b"image,caption\na.jpg,caf\xe9\n", "cannot be read"),
        (b'image,caption\na.jpg,"A.\n' + b"x" * 10_000, r"line \d+: cannot be read"),
        (b'image,caption\na.jpg,"A" dog\n', "line 2: cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"own\.csv.*{words}"):
            listing(path)


def test_a_folder_of_images_has_captions_beside_them(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/a.jpg", ".cache/x.jpg", "sub/.y.jpg"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"not looked at")
    for name in ("b.txt", "b.json", "sub/a.json", "README.txt", "a.jpeg"):
        (tmp_path / name).write_text("{}")
    assert records(tmp_path) == [
        ("a", "a.PNG", ()),
        ("a", "a.jpeg", "duplicate key"),
        ("b", "b.jpg", ("b.json", "b.txt")),
        ("sub/a", "sub/a.jpg", ("sub/a.json",)),
    ]
    found = listing(tmp_path)
    assert (found.shards, found.total, found.unit) == ((".",), 4, "image")


def test_many_images_are_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "AT_ONCE", 2)
    lines = [f'{{"image": "{i}.jpg", "caption": "A."}}\n' for i in range(5)]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    parts = list(listing(tmp_path / "own.jsonl").parts())
    assert [len(some) for _, _, some in parts] == [2, 2, 1]


def test_what_is_no_data_set_is_refused_with_what_would_be(tmp_path):
    with pytest.raises(
        DataError, match="absent: no such file or folder; want a folder"
    ):
        listing(tmp_path / "absent")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    words = "no .tar, no list and no image here; it has folders: train, val; want"
    with pytest.raises(DataError, match=words):
        listing(tmp_path)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"a\.parquet: not a data set; want"):
        listing(tmp_path / "a.parquet")


def test_a_signature_changes_with_every_file_and_no_folder(tmp_path):
    """Name, size, time; a set that is moved stays the same."""
    import os

    for layout in ("tars", "list", "files"):
        folder = tmp_path / layout
        if layout == "tars":
            write_tar(folder / "a.tar", photo("0", "A."))
            last = write_tar(folder / "b.tar", photo("0", "A."))
        else:
            folder.mkdir()
            (folder / "a.txt").write_text("A.")
            last = folder / "a.jpg"
            last.write_bytes(jpeg(0))
        if layout == "list":
            lines = '{"image": "a.jpg", "caption": "A."}\n' * 2
            lines += '{"image": "absent.jpg", "caption": "B."}\n'
            (folder / "captions.jsonl").write_text(lines)
        seen = [listing(folder).signature]
        folder = folder.rename(tmp_path / f"{layout}-moved")
        last = folder / last.name
        assert listing(folder).signature == seen[0]
        stamp = last.stat().st_mtime_ns
        last.write_bytes(last.read_bytes() + bytes(10))
        os.utime(last, ns=(stamp, stamp))
        seen.append(listing(folder).signature)
        os.utime(last, ns=(stamp, stamp + 5))
        seen.append(listing(folder).signature)
        if layout == "list":
            (folder / "absent.jpg").write_bytes(b"there now")
        else:
            last.rename(folder / f"c{last.suffix}")
        seen.append(listing(folder).signature)
        assert len(set(seen)) == 4
