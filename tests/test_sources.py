"""Shards and lists written here; the set used for training is not needed."""

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from minigpt4_jax.data.sources import ImageRecord, TarShards, list_images
from minigpt4_jax.errors import DataError, InputError


def write_shard(path, members):
    """Write (name, content) in order; a dict becomes JSON."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            if isinstance(content, dict):
                content = json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def photo(key, *captions, **fields):
    """Members of one example; the image is just bytes that say which one it is."""
    return [
        (f"{key}.jpg", f"pixels of {key}".encode() * 50),
        (f"{key}.json", {"captions": list(captions), **fields}),
    ]


@pytest.fixture
def two_shards(tmp_path):
    first = photo("00", "A dog.", "A brown dog.", license="CC BY", source="here")
    first += photo("01", "A cat.")
    write_shard(tmp_path / "a.tar", first)
    write_shard(tmp_path / "b.tar", photo("02", "A bus.") + photo("03", "A cup."))
    return tmp_path


# TarShards


def test_examples_come_in_order_of_shards_and_members(two_shards):
    shards = TarShards([two_shards / "b.tar", two_shards / "a.tar"])
    assert len(shards) == 4
    assert shards.keys == ["02", "03", "00", "01"]
    assert [example.key for example in shards] == shards.keys
    example = shards[2]
    assert example.image == b"pixels of 00" * 50
    assert example.captions == ("A dog.", "A brown dog.")
    assert (example.license, example.source) == ("CC BY", "here")
    assert (shards[3].license, shards[3].source) == ("", "")
    assert [shards.captions(i) for i in range(-4, 4)] == 2 * [
        x.captions for x in shards
    ]
    assert (shards.skipped, shards.left_out()) == ({}, "nothing")


def test_a_folder_means_its_tars_in_order_of_name(two_shards):
    (two_shards / "notes.txt").write_text("not a shard")
    assert TarShards(two_shards).keys == ["00", "01", "02", "03"]
    assert TarShards(str(two_shards / "b.tar")).keys == ["02", "03"]


def test_an_index_counts_from_either_end_and_stops_at_the_last(two_shards):
    shards = TarShards(two_shards)
    assert shards[-1] == shards[3] and shards[-4] == shards[0]
    for index in (4, -5):
        with pytest.raises(IndexError):
            shards[index]


def test_a_pickled_copy_and_many_threads_read_the_same(two_shards):
    shards = TarShards(two_shards)
    copy = pickle.loads(pickle.dumps(shards))
    order = [3, 0, 2, 1] * 25
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(copy.__getitem__, order))
    assert got == [shards[index] for index in order]


def test_members_pair_by_name_whatever_their_order_folder_or_suffix(tmp_path):
    members = [
        ("part/7.b.json", {"caption": "Only one."}),
        ("part/8.json", {"captions": ["Eight."]}),
        ("part/8.PNG", b"eight"),
        ("part/7.b.jpeg", b"seven"),
        ("part/7.b.txt", b"ignored"),
        ("part/._8.jpg", b"a file of macOS"),
    ]
    shards = TarShards(write_shard(tmp_path / "a.tar", members))
    assert {x.key: (x.image, x.captions) for x in shards} == {
        "part/8": (b"eight", ("Eight.",)),
        "part/7.b": (b"seven", ("Only one.",)),
    }
    assert not shards.skipped


def test_what_cannot_be_used_is_left_out_and_counted_by_reason(tmp_path):
    members = [
        *photo("good", " A dog. ", "", "  ", 3),
        ("alone.jpg", b"x"),
        ("mute.json", {"caption": "No image."}),
        ("void.jpg", b""),
        ("void.json", {"caption": "An empty image."}),
        ("torn.jpg", b"x"),
        ("torn.json", b'{"caption": "cut he'),
        ("latin.jpg", b"x"),
        ("latin.json", b'{"caption": "caf\xe9"}'),
        ("deep.jpg", b"x"),
        ("deep.json", b"[" * 100_000),
        ("list.jpg", b"x"),
        ("list.json", b'["A dog."]'),
        *photo("blank", " ", "\n"),
        ("none.jpg", b"x"),
        ("none.json", {"license": "CC BY"}),
        *photo("good", "Again."),
    ]
    shards = TarShards(write_shard(tmp_path / "a.tar", members))
    assert shards.keys == ["good"]
    assert shards[0].captions == ("A dog.",)
    assert shards.skipped == {
        "image without json": 1,
        "json without image": 1,
        "empty image": 1,
        "json not readable": 4,
        "blank caption": 5,
        "no caption": 2,
        "key repeated in its shard": 2,
    }
    assert shards.left_out().startswith("5 blank caption, 4 json not readable, 2 ")


def test_the_same_key_in_two_shards_is_two_examples(tmp_path):
    write_shard(tmp_path / "a.tar", photo("00", "First."))
    write_shard(tmp_path / "b.tar", photo("00", "Second."))
    captions = [example.captions for example in TarShards(tmp_path)]
    assert captions == [("First.",), ("Second.",)]


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("0.jpg", b"x"), ("1.jpg", b"x")])
    with pytest.raises(DataError, match=r"a\.tar: no usable.*2 image without json"):
        TarShards(path)
    write_shard(path, [("readme.txt", b"x")])
    with pytest.raises(DataError, match=r"no KEY\.jpg with KEY\.json"):
        TarShards(path)


def test_an_absent_shard_is_named(two_shards, tmp_path_factory):
    with pytest.raises(DataError, match=r"c\.tar: want existing"):
        TarShards([two_shards / "a.tar", two_shards / "c.tar"])
    with pytest.raises(DataError, match="no shards given"):
        TarShards([])
    with pytest.raises(DataError, match=r"no \.tar in this folder"):
        TarShards(tmp_path_factory.mktemp("empty"))


def test_a_shard_cut_short_anywhere_is_refused(two_shards):
    path = two_shards / "a.tar"
    whole = path.read_bytes()
    last = 8 * 512 + 2 * 512  # 4 headers, images of 2 blocks, JSON of 1, then the end
    assert not any(whole[last:]) and any(whole[last - 512 : last])
    for kept in (0, 100, 512, 700, 2 * 512, 3 * 512, 5 * 512, last - 512, last):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"a\.tar: not a readable tar"):
            TarShards(path)


def test_a_damaged_header_in_the_middle_is_refused(two_shards):
    path = two_shards / "a.tar"
    damaged = bytearray(path.read_bytes())
    damaged[3 * 512 + 3] ^= 255  # inside the name of the second member
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.tar: not a readable tar"):
        TarShards(path)


def test_text_and_compressed_tars_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    path.write_text("not a tar " * 200)
    with pytest.raises(DataError, match="want an uncompressed"):
        TarShards(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(DataError, match="want an uncompressed"):
        TarShards(path)


def test_a_shard_that_changes_after_the_scan_is_noticed(two_shards):
    shards = TarShards(two_shards / "a.tar")
    (two_shards / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar: 01: not readable any more"):
        shards[1]
    (two_shards / "a.tar").unlink()
    with pytest.raises(DataError, match=r"a\.tar: 01: not readable any more"):
        shards[1]


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
