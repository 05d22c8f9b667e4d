"""Data sets and lists written here; the set used for training is not needed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax.data import build
from minigpt4_jax.data.sources import ImageRecord, list_images, open_data
from minigpt4_jax.errors import DataError, InputError
from tests.shards import jpeg, photo, photos, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def two_shards(tmp_path):
    first = photo("00", "A dog.", "A brown dog.", license="CC BY", source="here")
    first += photo("01", "A cat.")
    write_tar(tmp_path / "data/a.tar", first)
    write_tar(tmp_path / "data/b.tar", photo("02", "A bus.") + photo("03", "A cup."))
    return tmp_path / "data"


# open_data


def test_examples_come_in_order_of_shards_and_members(two_shards):
    examples = open_data(two_shards)
    assert len(examples) == 4
    assert list(examples.keys) == ["00", "01", "02", "03"]
    assert [example.key for example in examples] == list(examples.keys)
    example = examples[0]
    assert example.image == dict(photo("00"))["00.jpg"]
    assert example.captions == ("A dog.", "A brown dog.")
    assert (example.license, example.source) == ("CC BY", "here")
    assert (examples[3].license, examples[3].source) == ("", "")
    assert [examples.captions(i) for i in range(-4, 4)] == 2 * [
        x.captions for x in examples
    ]
    assert [examples.image(i) for i in range(4)] == [x.image for x in examples]
    assert (examples.skipped, examples.left_out()) == ({}, "nothing")
    assert examples.paths == (two_shards / "a.tar", two_shards / "b.tar")
    assert examples.where(-1) == f"{two_shards / 'b.tar'}: 03"
    assert examples.caption_count == 5
    assert examples.image_sizes.tolist() == [[14, 6]] * 4
    assert list(open_data(str(two_shards / "b.tar")).keys) == ["02", "03"]


def test_an_index_counts_from_either_end_and_stops_at_the_last(two_shards):
    examples = open_data(two_shards)
    assert examples[-1] == examples[3] and examples[np.int64(-4)] == examples[0]
    for read in (
        examples.__getitem__,
        examples.captions,
        examples.image,
        examples.where,
        examples.keys.__getitem__,
    ):
        for index in (4, -5):
            with pytest.raises(IndexError):
                read(index)


def test_a_pickled_copy_and_many_threads_read_the_same(two_shards, monkeypatch):
    monkeypatch.setattr("minigpt4_jax.data.sources.OPEN_FILES", 1)
    examples = open_data(two_shards)
    data = pickle.dumps(examples)
    assert len(data) < 1_000
    copy = pickle.loads(data)
    order = [3, 0, 2, 1] * 100
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(copy.__getitem__, order))
    assert got == [examples[index] for index in order]


def test_another_process_reads_the_same(two_shards):
    examples = open_data(two_shards)
    code = (
        "import pickle, sys; e = pickle.load(sys.stdin.buffer)\n"
        "pickle.dump((list(e), 'jax' in sys.modules), sys.stdout.buffer)"
    )
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    out = subprocess.run(
        command, input=pickle.dumps(examples), capture_output=True, cwd=root
    )
    assert pickle.loads(out.stdout) == (list(examples), False), out.stderr


def test_identity_is_the_content_in_order_however_it_is_cut_in_shards(tmp_path):
    write_tar(tmp_path / "one/a.tar", photos(0, 6))
    write_tar(tmp_path / "two/a.tar", photos(0, 2), tarfile.PAX_FORMAT)
    write_tar(tmp_path / "two/b.tar", photos(2, 6))
    write_tar(tmp_path / "other/a.tar", photos(0, 5) + photos(5, 6, "Another."))
    write_tar(tmp_path / "turned/a.tar", photos(1, 6) + photos(0, 1))
    one, two, other, turned = (
        open_data(tmp_path / name) for name in ("one", "two", "other", "turned")
    )
    assert one.digest == two.digest
    assert len({one.digest, other.digest, turned.digest}) == 3
    assert len(one.digest) == 64
    assert one.hashes.tolist() == two.hashes.tolist() == other.hashes.tolist()
    assert len(set(one.hashes.tolist())) == 6 and one.hashes.dtype == np.uint64


def test_the_same_key_in_two_shards_is_two_examples(tmp_path):
    write_tar(tmp_path / "a.tar", photo("00", "First."))
    write_tar(tmp_path / "b.tar", photo("00", "Second."))
    captions = [example.captions for example in open_data(tmp_path)]
    assert captions == [("First.",), ("Second.",)]


@pytest.mark.parametrize("layout", ["alignment", "csv", "jsonl", "files"])
def test_images_in_files_of_their_own_are_read(tmp_path, layout):
    (tmp_path / "image").mkdir()
    for i in (2, 7):
        (tmp_path / f"image/{i}.jpg").write_bytes(jpeg(i))
    captions = {2: "Two, d\u00e9j\u00e0 vu.", 7: "Seven."}
    names = {i: f"image/{i}.jpg" for i in captions}
    keys, path, shard = list(names.values()), tmp_path, f"captions.{layout}"
    if layout == "alignment":
        entries = [{"image_id": str(i), "caption": t} for i, t in captions.items()]
        text = json.dumps({"annotations": entries})
        keys, shard = ["2", "7"], "filter_cap.json"
    elif layout == "csv":
        text = "image,caption\n" + "".join(
            f'{names[i]},"{captions[i]}"\n' for i in captions
        )
    elif layout == "jsonl":
        rows = [{"image": names[i], "caption": captions[i]} for i in captions]
        text = "\n".join(map(json.dumps, rows))
    else:
        for i in captions:
            (tmp_path / f"image/{i}.txt").write_text(captions[i], "utf-8")
        keys, shard, text = ["image/2", "image/7"], "README.txt", "No caption."
    (tmp_path / shard).write_text(text, "utf-8")
    examples = pickle.loads(pickle.dumps(open_data(path)))
    assert list(examples.keys) == keys
    assert [example.image for example in examples] == [jpeg(2), jpeg(7)]
    assert [example.captions for example in examples] == [
        (text,) for text in captions.values()
    ]
    place = tmp_path if layout == "files" else tmp_path / shard
    assert examples.where(1) == f"{place}: {keys[1]}"
    assert examples.paths == (place,)
    (tmp_path / "image/7.jpg").write_bytes(jpeg(7) + b"longer")
    with pytest.raises(DataError, match=r"7(.jpg)?: changed since it was scanned"):
        examples[1]
    (tmp_path / "image/7.jpg").unlink()
    with pytest.raises(DataError, match=r"7(.jpg)?: not readable any more"):
        examples[1]
    assert examples.captions(1) == ("Seven.",)
    with pytest.raises(DataError, match="1 of 2 examples|1 image file absent"):
        if layout == "files":
            (tmp_path / "image/9.jpg").write_bytes(jpeg(9)[:-40])
        open_data(path)


def test_more_bad_examples_than_the_budget_name_the_shard(tmp_path):
    write_tar(tmp_path / "a.tar", photos(0, 40))
    bad = [("x.jpg", jpeg(0)[:-30]), ("x.txt", b"Cut."), ("y.jpg", jpeg(0))]
    write_tar(tmp_path / "b.tar", photos(0, 18) + bad)
    words = (
        r"b\.tar: 2 of 20 examples cannot be used \(1 truncated JPEG, 1 image without "
        r"caption\); want at most a share of 0\.01"
    )
    with pytest.raises(DataError, match=words) as caught:
        open_data(tmp_path)
    assert "a.tar" not in str(caught.value)
    with pytest.raises(DataError, match=r"b\.tar"):
        open_data(tmp_path, budget=0.099)
    examples = open_data(tmp_path, budget=0.1)
    assert len(examples) == 58
    assert examples.left_out() == "1 truncated JPEG, 1 image without caption"
    assert examples.places["truncated JPEG"] == [f"{tmp_path / 'b.tar'}: x"]
    for i in range(5):
        write_tar(tmp_path / f"c{i}.tar", photos(0, 1) + bad)
    with pytest.raises(DataError, match="and 3 more shards"):
        open_data(tmp_path)


def test_a_blank_caption_beside_others_costs_nothing(tmp_path):
    examples = open_data(write_tar(tmp_path / "a.tar", photo("0", "", "A dog.")))
    assert examples[0].captions == ("A dog.",)
    assert examples.skipped == {"blank caption": 1}


def test_the_rest_of_a_cut_shard_is_within_the_budget_or_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", photos(0, 9))
    path.write_bytes(path.read_bytes()[: -10 * 1024 - 3000])
    with pytest.raises(DataError, match=r"a\.tar: 1 of \d examples .*1 tar cut short"):
        open_data(path)
    examples = open_data(path, budget=0.5)
    assert [examples[i].key for i in range(len(examples))] == [
        f"{i:05d}" for i in range(len(examples))
    ]
    assert examples.skipped == {"tar cut short": 1}


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1))])
    with pytest.raises(DataError, match=r"a\.tar: no usable.*2 image without caption"):
        open_data(path, budget=1)
    write_tar(path, [("readme.md", b"x")])
    with pytest.raises(DataError, match=r"no usable .*nothing.*want KEY\.jpg with KEY"):
        open_data(path, budget=1)


def test_a_shard_that_changes_after_the_scan_is_noticed(two_shards):
    examples = open_data(two_shards)
    (two_shards / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar: 01: changed since it was scanned"):
        examples[1]
    (two_shards / "b.tar").unlink()
    with pytest.raises(DataError, match=r"b\.tar: 02: not readable any more"):
        examples[2]


def test_data_written_anew_under_the_same_name_is_read_anew(tmp_path):
    path = write_tar(tmp_path / "a.tar", photos(0, 3, "Old."))
    old = open_data(path)
    assert old[2].captions == ("Old.",)
    path.unlink()
    new = open_data(write_tar(path, photos(5, 9, "Newer.")))
    assert [x.image for x in new] == [jpeg(i) for i in range(5, 9)]
    assert {x.captions for x in new} == {("Newer.",)}


def test_nothing_of_a_set_that_is_there_is_written_when_it_is_opened_again(two_shards):
    kept = open_data(two_shards, index_dir=two_shards.parent / "indexes")
    assert not (two_shards / build.FOLDER).exists()
    before = sorted((two_shards.parent / "indexes").rglob("*"))
    again = open_data(two_shards, index_dir=two_shards.parent / "indexes")
    assert again.digest == kept.digest
    assert sorted((two_shards.parent / "indexes").rglob("*")) == before


def test_a_key_that_is_not_utf_8_is_kept(tmp_path):
    key = os.fsdecode(b"caf\xe9")
    write_tar(tmp_path / "a.tar", [(f"{key}.jpg", jpeg(0)), (f"{key}.txt", b"A cup.")])
    examples = open_data(tmp_path)
    assert examples[0].key == key and key in examples.where(0)


def test_memory_does_not_grow_with_the_set(tmp_path):
    """What is held of an open set is mapped files; keys and texts are read as asked."""
    few = open_data(write_tar(tmp_path / "few/a.tar", photos(0, 2)))
    many = open_data(write_tar(tmp_path / "many/a.tar", photos(0, 300)))
    assert len(pickle.dumps(many)) - len(pickle.dumps(few)) < 10
    assert not many.hashes.flags.owndata and not many.image_sizes.flags.owndata


def test_photos_of_a_folder_that_was_copied_are_found_there(two_shards, tmp_path):
    open_data(two_shards)
    copy = shutil.copytree(two_shards, tmp_path / "copy")
    shutil.rmtree(two_shards)
    assert [x.key for x in open_data(copy)] == ["00", "01", "02", "03"]


# list_images


def test_a_folder_is_listed_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b.JPG", "a.png", "deep/er/c.webp", "notes.txt", ".d.jpg", ".e/f.jpg"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "folder.jpg").mkdir()
    assert list_images(tmp_path) == [
        ImageRecord("a.png", tmp_path / "a.png"),
        ImageRecord("b.JPG", tmp_path / "b.JPG"),
        ImageRecord("deep/er/c.webp", tmp_path / "deep/er/c.webp"),
    ]


def test_a_folder_inside_a_hidden_one_is_listed(tmp_path):
    folder = tmp_path / ".cache" / "photos"
    folder.mkdir(parents=True)
    (folder / "a.png").touch()
    assert [record.name for record in list_images(folder)] == ["a.png"]


def test_a_single_file_of_any_kind_is_one_record(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("the decoder will say what is wrong")
    assert list_images(str(path)) == [ImageRecord(str(path), path)]


def test_a_list_is_relative_to_itself_and_may_carry_prompts(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text(
        '\ufeff{"image": "sub/a.jpg", "prompt": "Wo ist der B\u00e4r?"}\n'
        "\n"
        '{"image": "/photos/b.jpg", "id": 7}\r\n'
        '{"image": "line\u2028break.jpg", "prompt": null}',
        encoding="utf-8",
    )
    records = list_images(path)
    assert [record.name for record in records] == [
        "sub/a.jpg",
        "/photos/b.jpg",
        "line\u2028break.jpg",
    ]
    assert str(records[1].path) == "/photos/b.jpg"
    assert records[0].path == tmp_path / "sub" / "a.jpg"  # absent: the run will say so
    assert [record.prompt for record in records] == ["Wo ist der B\u00e4r?", None, None]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{'image': 'a.jpg'}", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="nested too deep"),
        ('"a.jpg"', "no image"),
        ('{"img": "a.jpg"}', "no image"),
        ('{"image": ["a.jpg"]}', "no image"),
        ('{"image": ""}', "no image"),
        ('{"image": "a.jpg", "prompt": 3}', "the prompt is int"),
        (r'{"image": "a.jpg", "prompt": "\ud83d"}', "the prompt holds half"),
    ],
)
def test_a_wrong_line_of_a_list_is_named_by_its_number(tmp_path, line, words):
    path = tmp_path / "list.jsonl"
    path.write_text('{"image": "a.jpg"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=rf"list\.jsonl, line 3: {words}.*want"):
        list_images(path)


def test_a_name_that_is_not_utf_8_may_be_listed_and_a_whole_pair_asked(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text(r'{"image": "caf\udce9.jpg", "prompt": "\ud83d\ude00?"}')
    (record,) = list_images(path)
    assert os.fsencode(record.path.name) == b"caf\xe9.jpg"
    assert record.prompt == "\U0001f600?"


def test_nothing_to_list_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"absent: no such file or folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(
        InputError, match=r"no image in this folder; looked for .*\.jpg"
    ):
        list_images(tmp_path)
    path = tmp_path / "list.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="the list is empty"):
        list_images(path)
    path.write_bytes(b'{"image": "caf\xe9.jpg"}')
    with pytest.raises(InputError, match="not UTF-8"):
        list_images(path)


def test_a_blank_caption_of_an_image_that_has_others_costs_nothing(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "list.csv").write_text(
        "image,caption\na.jpg,One.\na.jpg, \na.jpg,Two.\n"
    )
    found = open_data(tmp_path / "list.csv", budget=0)
    assert [example.captions for example in found] == [("One.", "Two.")]
    assert found.left_out() == "1 blank caption"
