"""Rows and texts as a scan hands them over and an index gives them back."""

import hashlib

import numpy as np

from minigpt4_jax.data import index
from minigpt4_jax.data.index import PLACES, ROW, Found


def add(found: Found, key="k", captions=("A.",), sha256=b"s" * 32, **changes) -> Found:
    fields = dict(license="CC0", source="here", image="", size=(3, 7)) | changes
    text = [fields["license"], fields["source"], fields["image"], *captions]
    found.add(key, text, 512, 99, fields["size"], sha256)
    return found


def test_a_row_costs_40_bytes_and_holds_what_the_largest_files_need():
    assert ROW.itemsize == 40
    found = add(Found(2**32 - 1, 0), size=(70_000, 65_535))
    found.add("k", ["", "", ""], 2**60, 2**32 - 1, (1, 2), b"\xff" * 32)
    rows = np.array(found.rows, ROW)
    assert rows["image_size"].tolist() == [[65_535, 65_535], [1, 2]]
    assert (rows["offset"][1], rows["size"][1]) == (2**60, 2**32 - 1)
    assert rows["hash"].tolist() == [int.from_bytes(b"s" * 8, "little"), 2**64 - 1]
    assert rows["shard"].tolist() == [2**32 - 1] * 2


def test_texts_of_any_characters_come_back(tmp_path):
    keys = ["plain", "d\u00e9j\u00e0", "caf\udce9", "a\0b", 'q"uote', "\U0001f600"]
    found = Found(0, 0)
    for key in keys:
        add(found, key, (key * 2, "\u2028"))
    np.array(found.rows, ROW).tofile(tmp_path / "rows")
    (tmp_path / "texts").write_bytes(found.texts)
    (tmp_path / "meta.json").write_text(
        f'{{"format": 1, "examples": 6, "text_bytes": {len(found.texts)}}}'
    )
    assert index.is_whole(tmp_path)
    known = index.read(tmp_path)
    for i, key in enumerate(keys):
        assert known.text(i) == [key, "CC0", "here", "", key * 2, "\u2028"]


def test_identity_is_images_keys_and_captions_not_where_they_lie():
    def identity(**changes) -> str:
        return hashlib.sha256(add(Found(0, 0), **changes).digests).hexdigest()

    same = [
        dict(license="MIT"),
        dict(source=""),
        dict(image="x.jpg"),
        dict(size=(1, 1)),
    ]
    assert {identity(**changes) for changes in same} == {identity()}
    other = [
        dict(key="l"),
        dict(captions=("A.", "B.")),
        dict(captions=("B.",)),
        dict(captions=("A", ".")),
        dict(key="kA.", captions=()),
        dict(sha256=b"t" * 32),
    ]
    assert len({identity()} | {identity(**changes) for changes in other}) == 7


def test_the_first_places_of_each_reason_are_kept():
    found = Found(0, 0)
    for i in range(PLACES + 2):
        found.lose("torn", f"key {i}")
        found.note("blank", f"key {i}", i)
    found.lose("cut", count=7)
    assert (found.lost, found.notes) == ({"torn": 5, "cut": 7}, {"blank": 10})
    assert found.places == {
        "torn": ["key 0", "key 1", "key 2"],
        "blank": ["key 1", "key 2", "key 3"],
        "cut": [],
    }
