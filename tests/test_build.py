"""Making an index: once, by one process, where there is room, whatever interrupts it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt4_jax.data import build, index, layouts, workers
from minigpt4_jax.data.scan import scan_tar
from minigpt4_jax.errors import DataError
from tests.shards import photo, photos, write_tar

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def data(tmp_path):
    """Five shards of 1 to 5 examples."""
    for i in range(5):
        write_tar(tmp_path / "data" / f"{i}.tar", photos(10 * i, 11 * i + 1))
    return tmp_path / "data"


class Scans:
    """A scan that counts, and may do something at a shard."""

    def __init__(self, at: int = -1, do=None):
        self.shards: list[int] = []
        self.at, self.do = at, do

    def __call__(self, part):
        self.shards.append(part[0])
        if part[0] == self.at:
            self.do()
        return scan_tar(part)


def fail():
    raise OSError(errno.ENOSPC, "No space left on device")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_data_is_scanned_once_and_beside_it(data):
    scans = Scans()
    listing = replace(layouts.listing(data), scan=scans)
    folder = build.made(listing)
    assert scans.shards == [0, 1, 2, 3, 4]
    assert build.made(listing) == folder
    assert scans.shards == [0, 1, 2, 3, 4]
    assert folder.parent == data / ".minigpt4_jax"
    assert sorted(content(folder)) == ["meta.json", "rows", "texts"]
    assert layouts.listing(data).signature == listing.signature  # it is not data
    found = index.read(folder)
    assert [found.text(i)[0] for i in range(15)] == [
        f"{i:05d}" for k in range(5) for i in range(10 * k, 11 * k + 1)
    ]
    assert found.rows["shard"].tolist() == [k for k in range(5) for _ in range(k + 1)]


def test_a_changed_file_means_a_new_scan_and_the_old_index_goes(data):
    old = build.made(layouts.listing(data))
    other = build.made(layouts.listing(data / "1.tar"))
    write_tar(data / "5.tar", photos(90, 93))
    scans = Scans()
    new = build.made(replace(layouts.listing(data), scan=scans))
    assert len(scans.shards) == 6
    assert (old.exists(), other.exists(), new.exists()) == (False, True, True)
    with pytest.raises(DataError, match="did the data change since this run began"):
        index.read(old)


def test_an_index_moves_with_its_data(data):
    build.made(layouts.listing(data))
    moved = data.rename(data.with_name("moved"))
    scans = Scans()
    assert build.made(replace(layouts.listing(moved), scan=scans)).exists()
    assert scans.shards == []


def test_a_read_only_folder_is_left_alone(data, cache):
    data.chmod(0o555)  # root could write nevertheless
    scans = Scans()
    folder = build.made(replace(layouts.listing(data), scan=scans))
    assert folder.parent == cache
    assert not (data / ".minigpt4_jax").exists()
    assert build.made(replace(layouts.listing(data), scan=scans)) == folder
    assert len(scans.shards) == 5
    data.chmod(0o755)


def test_two_sets_of_one_name_share_a_folder_of_indexes(tmp_path):
    places = []
    for name in ("a", "b"):
        path = write_tar(tmp_path / name / "0.tar", photo(name, "A."))
        os.utime(path, ns=(5, 5))
        places.append(build.made(layouts.listing(path.parent), tmp_path / "kept/here"))
    for name, folder in zip("ab", places):
        assert folder.parent == tmp_path / "kept/here"
        assert index.read(folder).text(0)[0] == name


def test_no_place_at_all_is_said(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"cannot be kept at .*file.* set MINIGPT4_JAX_CACHE"
    ):
        build.made(layouts.listing(data), tmp_path / "file")


@pytest.mark.parametrize(
    "way", ["no space", "journal torn", "data short", "no journal"]
)
def test_an_interrupted_scan_leaves_nothing_half_and_goes_on(data, tmp_path, way):
    whole = content(build.made(layouts.listing(data), tmp_path / "whole"))
    scans = Scans(at=3, do=fail)
    with pytest.raises(OSError, match="No space left"):
        build.made(replace(layouts.listing(data), scan=scans))
    (part,) = (data / ".minigpt4_jax").glob("*-*")
    assert part.suffix == ".part" and not index.is_whole(part)
    again = [3, 4]
    if way == "journal torn":
        lines = (part / "journal").read_text()
        (part / "journal").write_text(lines[: lines.rindex('"kept"')])
        again = [2, 3, 4]
    elif way == "data short":
        (part / "texts").write_bytes(b"[")
        again = [0, 1, 2, 3, 4]
    elif way == "no journal":
        (part / "journal").unlink()
        again = [0, 1, 2, 3, 4]
    scans = Scans()
    folder = build.made(replace(layouts.listing(data), scan=scans))
    assert scans.shards == again
    assert content(folder) == whole
    assert not part.exists()


def test_a_killed_scan_goes_on(data, tmp_path):
    whole = content(build.made(layouts.listing(data), tmp_path / "whole"))
    code = """if True:
        import os, signal, sys
        from dataclasses import replace
        from pathlib import Path
        from minigpt4_jax.data import build, layouts
        from minigpt4_jax.data.scan import scan_tar
        def scan(part):
            if part[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return scan_tar(part)
        build.made(replace(layouts.listing(Path(sys.argv[1])), scan=scan))
    """
    result = subprocess.run([sys.executable, "-c", code, data], cwd=ROOT)
    assert result.returncode == -signal.SIGKILL
    scans = Scans()
    folder = build.made(replace(layouts.listing(data), scan=scans))
    assert scans.shards == [2, 3, 4]
    assert content(folder) == whole


@pytest.mark.parametrize("damage", ["rows", "texts", "meta.json", "format"])
def test_a_damaged_index_or_one_of_another_version_is_made_anew(data, damage):
    folder = build.made(layouts.listing(data))
    whole = content(folder)
    if damage == "format":
        meta = json.loads(whole["meta.json"])
        (folder / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    else:
        (folder / damage).write_bytes(whole[damage][:-3])
    assert content(build.made(layouts.listing(data))) == whole


def test_two_at_once_scan_once(data):
    scans = Scans(at=1, do=lambda: time.sleep(0.2))
    listing = replace(layouts.listing(data), scan=scans)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build.made, [listing] * 2)
    assert first == second
    assert sorted(scans.shards) == [0, 1, 2, 3, 4]


def test_several_processes_make_the_same_index(data, tmp_path, monkeypatch):
    one = content(build.made(layouts.listing(data), tmp_path / "one"))
    monkeypatch.setattr(workers, "available", lambda: 2)
    listing = replace(layouts.listing(data), many=0)
    assert content(build.made(listing, tmp_path / "two")) == one


def test_parts_of_one_shard_are_counted_together(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "AT_ONCE", 2)
    lines = [f'{{"image": "{i}.jpg", "caption": "A."}}\n' for i in range(5)]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    folder = build.made(layouts.listing(tmp_path / "own.jsonl"))
    assert index.read(folder).meta["shards"] == [
        {
            "name": "own.jsonl",
            "kept": 0,
            "lost": {"image file absent": 5},
            "notes": {},
            "places": {"image file absent": ["0.jpg", "1.jpg", "2.jpg"]},
        }
    ]
