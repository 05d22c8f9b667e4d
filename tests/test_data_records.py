"""What a data set is after it was written as ArrayRecord and read again."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minigpt4_jax.data import builders
from minigpt4_jax.data.records import tfds
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import DataError, InputError
from tests.shards import jpeg, photo, photos, write_tar

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tars(tmp_path):
    """Two shards with one key in both, odd texts, and an image that is no JPEG."""
    first = photo("00", "A dog.", "Ein größerer Hund 犬.", license="CC BY", source="x")
    first += photo("01", 'Two "words"\tand\na line.')
    second = [("01.png", jpeg(5, form="png")), ("01.txt", b"A cat.")]
    write_tar(tmp_path / "tars/a.tar", first)
    write_tar(tmp_path / "tars/b.tar", second + photos(2, 7))
    return open_data(tmp_path / "tars")


@pytest.fixture
def written(tars, tmp_path):
    return builders.build(tars, tmp_path / "records")


def test_a_round_trip_gives_the_same_examples_in_the_same_order(
    tars, written, tmp_path
):
    again = open_data(tmp_path / "records")
    assert list(again) == list(written) == list(tars)
    assert again.digest == tars.digest
    assert [again.captions(i) for i in range(8)] == [x.captions for x in tars]
    assert (again.image_sizes == tars.image_sizes).all()
    assert (again.hashes == tars.hashes).all()
    assert again.left_out() == "nothing"
    assert sorted(p.name for p in (tmp_path / "records").iterdir()) == [
        ".minigpt4_jax",
        "captioned_images-train.array_record-00000-of-00001",
        "dataset_info.json",
        "features.json",
    ]
    assert not (tmp_path / "records.building").exists()


def test_images_come_in_any_order_in_a_copy_and_in_many_threads(tars, written):
    copy = pickle.loads(pickle.dumps(written))
    order = [7, 0, -1, 3, 3, -8, 5] * 20
    assert [copy.image(i) for i in order] == [tars.image(i) for i in order]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(copy.image, order))
    assert found == [tars.image(i) for i in order]
    with pytest.raises(IndexError):
        copy.image(8)
    assert copy.where(2) == f"{copy.paths[0]}: 01"


def test_shards_hold_so_many_bytes_of_images(tars, tmp_path, monkeypatch):
    sizes = tars.image_bytes.tolist()
    monkeypatch.setattr(builders, "SHARD_BYTES", sum(sizes) // 3)
    cuts = builders.parts(tars)
    assert [cuts[0][0], cuts[-1][1]] == [0, 8] and 3 <= len(cuts) <= 4
    assert all(stop == start for (_, stop), (start, _) in zip(cuts, cuts[1:]))
    assert all(0 < sum(sizes[a:b]) <= 1.4 * builders.SHARD_BYTES for a, b in cuts)
    written = builders.build(tars, tmp_path / "records")
    assert len(written.paths) == len(cuts)
    assert list(written) == list(tars)


def test_the_second_stage_has_a_builder_that_tensorflow_datasets_runs(tmp_path):
    folder = tmp_path / "cc_sbu_align"
    (folder / "image").mkdir(parents=True)
    notes = [{"image_id": str(i), "caption": f"Photo {i}."} for i in (2, 5, 11)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": notes}))
    for i in (2, 5, 11):
        (folder / f"image/{i}.jpg").write_bytes(jpeg(i))
    builder = builders.CcSbuAlign(data_dir=str(tmp_path / "tfds"))
    config = tfds.download.DownloadConfig(manual_dir=str(folder))
    builder.download_and_prepare(file_format="array_record", download_config=config)
    assert builder.data_dir == str(tmp_path / "tfds/cc_sbu_align/1.0.0")
    assert list(open_data(builder.data_dir)) == list(open_data(folder))
    for theirs in (builder, tfds.builder_from_directory(str(builder.data_dir))):
        source = theirs.as_data_source("train")
        assert [x["captions"] for x in source] == [
            [note["caption"].encode()] for note in notes
        ]
        assert source[1]["image"].shape == (6, 14, 3)


def test_neither_building_nor_reading_imports_tensorflow_or_jax(tmp_path):
    write_tar(tmp_path / "a.tar", photos(0, 3))
    code = f"""
import json, sys
from pathlib import Path
from minigpt4_jax.data import builders
from minigpt4_jax.data.sources import open_data
folder = Path({str(tmp_path)!r})
builders.build(open_data(folder / "a.tar"), folder / "records")
assert len(open_data(folder / "records")[2].image) > 100
print(json.dumps([name for name in ("tensorflow", "jax", "torch") if name in sys.modules]))
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stdout + found.stderr


def test_an_existing_folder_is_not_written_into(tars, tmp_path):
    (tmp_path / "records").mkdir()
    with pytest.raises(InputError, match="records exists"):
        builders.build(tars, tmp_path / "records")
    assert not any((tmp_path / "records").iterdir())


def test_an_interrupted_build_leaves_no_folder_and_is_begun_again(tars, tmp_path):
    shard = tmp_path / "tars/b.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.tar: 0000"):
        builders.build(tars, tmp_path / "records")
    assert not (tmp_path / "records").exists()
    shard.write_bytes(whole)
    assert list(builders.build(tars, tmp_path / "records")) == list(tars)


def test_what_cannot_be_read_as_written_is_not_kept(tars, tmp_path, monkeypatch):
    read = builders._read

    def flipped(examples, start, stop):
        for number, fields in read(examples, start, stop):
            if number == 3:
                fields["captions"] = ["Another."]
            yield number, fields

    monkeypatch.setattr(builders, "_read", flipped)
    with pytest.raises(DataError, match="is not what was read"):
        builders.build(tars, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_damaged_record_is_left_out_and_an_absent_file_named(
    tars, tmp_path, monkeypatch
):
    monkeypatch.setattr(builders, "SHARD_BYTES", int(tars.image_bytes.sum()) // 2)
    written = builders.build(tars, tmp_path / "records")
    count = len(written)
    first, *_, last = written.paths
    data = bytearray(first.read_bytes())
    at = data.find(tars.image(1)[:40])
    data[at + 20 : at + 30] = bytes(10)
    first.write_bytes(data)
    with pytest.raises(DataError, match=r"00000-of-0000\d: 1 of \d examples cannot"):
        open_data(tmp_path / "records")
    rest = open_data(tmp_path / "records", budget=0.5)
    assert len(rest) == count - 1
    assert rest.left_out() == "1 damaged record"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(
        DataError, match=r"1 of 1 examples .*1 record of a file cut short or damaged"
    ):
        open_data(tmp_path / "records", budget=0.5)
    last.unlink()
    with pytest.raises(DataError, match=f"{last.name} is not there"):
        open_data(tmp_path / "records")


def test_a_folder_of_other_records_says_what_is_wanted(tmp_path):
    (tmp_path / "x.array_record-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError, match=r"without a readable features\.json"):
        open_data(tmp_path)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    features.save_config(str(tmp_path))
    with pytest.raises(DataError, match=r"got the features \['text'\]"):
        open_data(tmp_path)


def test_files_without_their_info_are_an_error(written, tmp_path):
    (tmp_path / "records/dataset_info.json").write_text('{"splits": [{}]}')
    with pytest.raises(DataError, match=r"no readable dataset_info\.json"):
        open_data(tmp_path / "records")


def test_a_record_that_changed_since_the_scan_is_an_error(written):
    path = written.paths[0]
    assert written.image(0)
    again = pickle.loads(pickle.dumps(written))
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not readable any more"):
        again.image(0)
