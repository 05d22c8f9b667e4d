"""From published annotations to examples, over a server on loopback with odd images."""

import csv
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tracemalloc
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minigpt4_jax.data import urls
from minigpt4_jax.data.images import read_image
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import DataError, InputError
from tests.shards import jpeg, write_tar

ROOT = Path(__file__).parent.parent
IMG2DATASET = shutil.which(
    "img2dataset",
    path=os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    ),
)

ODD = {  # caption as published -> as it must arrive
    "tab\there": "tab here",
    "line\nbreak\r\nand\rmore": "line break and more",
    'a "quoted" word': 'a "quoted" word',
    '"all quoted"': '"all quoted"',
    '"a quote that stays open': '"a quote that stays open',
    "back\\slash, comma; it's": "back\\slash, comma; it's",
    "  many   spaces ": "many spaces",
    "été 犬 🐕": "été 犬 🐕",
    "half a pair \ud83d here": "half a pair here",
    "nul \0 and bell \a": "nul and bell",
    "separators \u2028 \x85": "separators",
    "null": "null",
    "123": "123",
    "#1": "#1",
}


def write(path: Path, records) -> Path:
    path.write_text(json.dumps(records))
    return path


def read(folder: Path) -> list[list[str]]:
    """All rows of all parts, headers checked and left out."""
    rows = []
    for path in sorted(folder.glob("*")):
        with open(path, encoding="utf-8", newline="") as file:
            header, *more = csv.reader(file, delimiter="\t")
        assert header == ["url", "caption"]
        rows += more
    return rows


# The list


def test_any_caption_arrives_as_one_field(tmp_path):
    found = [{"caption": text, "url": f"http://a/{i}"} for i, text in enumerate(ODD)]
    count, left_out = urls.convert(write(tmp_path / "a.json", found), tmp_path)
    assert (count, left_out.total()) == (len(ODD), 0)
    assert read(tmp_path / "urls") == [
        [f"http://a/{i}", text] for i, text in enumerate(ODD.values())
    ]


def test_what_img2dataset_reads_with_sees_the_same_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow.csv")
    found = [{"url": f"http://a/{i}", "caption": text} for i, text in enumerate(ODD)]
    urls.convert(write(tmp_path / "a.json", found), tmp_path)
    options = arrow.ParseOptions(delimiter="\t")
    table = arrow.read_csv(tmp_path / "urls/00000.tsv", parse_options=options)
    assert table.to_pydict()["caption"] == list(ODD.values())
    assert table.to_pydict()["url"] == [record["url"] for record in found]


def test_parts_hold_whole_shards_of_img2dataset(tmp_path):
    found = [{"url": f"http://a/{i}", "caption": str(i)} for i in range(7)]
    urls.convert(write(tmp_path / "a.json", found), tmp_path / "out", part=3)
    lengths = {
        path.name: len(path.read_text().splitlines()) - 1
        for path in (tmp_path / "out/urls").iterdir()
    }
    assert lengths == {"00000.tsv": 3, "00001.tsv": 3, "00002.tsv": 1}
    assert [row[1] for row in read(tmp_path / "out/urls")] == list("0123456")
    shard = next(a for a in urls.command(tmp_path) if a.startswith("--number_sample"))
    assert urls.PART % int(shard.partition("=")[2]) == 0


@pytest.mark.parametrize("chunk", [200, 201, 333, 1 << 22])
def test_the_list_is_the_same_however_it_is_cut_into_pieces(
    tmp_path, monkeypatch, chunk
):
    rng = random.Random(chunk)
    found = [{"url": f"http://a/{i}", "caption": "é\\" * i} for i in range(40)]
    text = json.dumps(found, ensure_ascii=False, indent=rng.choice([None, 1]))
    (tmp_path / "a.json").write_text("\ufeff \n" + text + "\n", encoding="utf-8")
    monkeypatch.setattr(urls, "CHUNK", chunk)
    assert list(urls.records(tmp_path / "a.json")) == found


def test_a_large_list_needs_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(urls, "CHUNK", 1 << 12)
    found = [{"url": f"http://a/{i}", "caption": "words " * 9} for i in range(20_000)]
    path = write(tmp_path / "a.json", found)
    tracemalloc.start()
    count, _ = urls.convert(path, tmp_path, part=5_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000 and peak < path.stat().st_size / 5


def test_records_that_cannot_be_downloaded_are_counted_by_reason(tmp_path):
    found = [
        {"url": "https://a/0", "caption": "kept"},
        {"url": " HTTP://a/b c ", "caption": "kept"},
        {"url": "file:///etc/passwd", "caption": "no"},
        {"url": "ftp://a/b", "caption": "no"},
        {"url": None, "caption": "no"},
        {"caption": "no"},
        "no",
        None,
        {"url": "http://a/1", "caption": " \n"},
        {"url": "http://a/2", "caption": ["no"]},
        {"url": "http://a/3"},
    ]
    count, left_out = urls.convert(write(tmp_path / "a.json", found), tmp_path)
    assert count == 2
    assert left_out == {"without an http address": 6, "without a caption": 3}
    assert [row[0] for row in read(tmp_path / "urls")] == [
        "https://a/0",
        "HTTP://a/b%20c",
    ]


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"url": "http://a"}', "want one JSON list"),
        ("", "want one JSON list"),
        ("[]", r"no usable record \(empty list\)"),
        ('[{"url": "x", "caption": "y"}]', r"\(1 without an http address\)"),
        ('[{"url": "http://a", "caption": "y"}, {"url": "htt', "record 2 is cut short"),
        ('[{"url": "http://a", "caption": "y"},', "record 2 is cut short"),
        ('[{"url": "http://a", "caption": "y"}; 5]', "record 2 is cut short or not"),
        ("[" * 100_000, "record 1 is cut short or not"),
        (b'[{"url": "http://a", "caption": "\xff"}]', "not UTF-8 text after record 0"),
    ],
)
def test_a_list_that_breaks_off_is_an_error_and_leaves_no_folder(tmp_path, text, match):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=match):
        urls.convert(tmp_path / "a.json", tmp_path)
    assert not (tmp_path / "urls").exists()


def test_damage_in_the_middle_of_a_large_list_is_not_read_to_its_end(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(urls, "CHUNK", 500)
    good = '{"url": "http://a", "caption": "y"}, '
    (tmp_path / "a.json").write_text("[" + 30 * good + "{]" + 9_000 * good)
    with pytest.raises(DataError, match="record 31 is cut short or not JSON"):
        list(urls.records(tmp_path / "a.json"))


def test_what_is_there_is_kept_and_what_was_left_half_done_is_not(tmp_path):
    path = write(tmp_path / "a.json", [{"url": "http://a", "caption": "b"}])
    (tmp_path / "urls.partial").mkdir()
    (tmp_path / "urls.partial/00007.tsv").write_text("old")
    urls.convert(path, tmp_path)
    assert read(tmp_path / "urls") == [["http://a", "b"]]
    assert not (tmp_path / "urls.partial").exists()
    with pytest.raises(InputError, match="urls exists; remove it"):
        urls.convert(path, tmp_path)


# The command


def test_the_command_has_the_options_of_the_references_scripts():
    options = {
        name.removeprefix("--"): value
        for name, _, value in (a.partition("=") for a in urls.command(Path("x"))[1:])
    }
    reference = {  # dataset/download_cc_sbu.sh
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "processes_count": "16",
        "thread_count": "128",
        "image_size": "224",
    }
    assert reference.items() <= options.items()
    assert options["resize_mode"] == "border"  # img2dataset's default, so theirs
    assert (options["url_list"], options["output_folder"]) == ("x/urls", "x/images")


def test_data_urls_prints_a_line_for_the_shell(tmp_path):
    path = write(tmp_path / "a.json", [{"url": "http://a", "caption": "b"}, 5])
    out = tmp_path / "two words"
    command = [sys.executable, "-m", "minigpt4_jax.data", "urls", path, "--out", out]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *notes, line = found.stdout.splitlines()
    assert shlex.split(line) == urls.command(out), found.stderr
    assert notes[0] == (f"# 1 rows in {out}/urls; left out: 1 without an http address")
    assert all(note.startswith("# ") for note in notes)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")


# From end to end


@pytest.fixture
def server():
    """Address of a server: /good, /corrupt, /text, /noai, /slow, and nothing else."""
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            _, kind, name = self.path.split("/")
            content = jpeg(sum(map(ord, name)), width=42, height=28)
            if kind == "slow":
                done.wait(20)
                return
            if kind not in ("good", "corrupt", "text", "noai"):
                self.send_error(404)
                return
            self.send_response(200)
            if kind == "noai":
                self.send_header("X-Robots-Tag", "noai")
            self.end_headers()
            content = content[:200] if kind == "corrupt" else content
            self.wfile.write(b"<html>" * 50 if kind == "text" else content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=[0.02])
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        done.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def refused():
    """An address at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def annotations(server: str, refused: str) -> list[dict]:
    """Every odd caption with a good image, and images that cannot be had."""
    good = [{"caption": c, "url": f"{server}/good/{i}.jpg"} for i, c in enumerate(ODD)]
    bad = [f"{server}/{kind}/x.jpg" for kind in ("dead", "slow", "corrupt", "text")]
    bad += [f"{refused}/x.jpg", f"{server}/noai/x.jpg"]
    lost = [{"caption": "lost", "url": url} for url in bad]
    mixed = [*good, *lost[:3]]
    random.Random(0).shuffle(mixed)
    return [*mixed, *lost[3:]]  # of parts of 6 rows, the last has no image at all


def download(out: Path, form: str) -> None:
    """What img2dataset does with our list and writes, without resizing."""
    for shard, path in enumerate(sorted((out / "urls").iterdir())):
        kept: dict[str, tuple[bytes, str]] = {}
        for number, (url, caption) in enumerate(read_part(path)):
            key, status, image = f"{shard:05d}{number:04d}", "success", b""
            try:
                with urllib.request.urlopen(url, timeout=0.5) as answer:
                    if "noai" in answer.headers.get("X-Robots-Tag", ""):
                        raise OSError("disallowed")
                    image = answer.read()
                read_image(image)
            except OSError:
                status = "failed_to_download"
            except InputError:
                status = "failed_to_resize"
            fields = {"caption": caption, "url": url, "key": key, "status": status}
            if status == "success" or form == "files":
                kept[key] = (image if status == "success" else b"", json.dumps(fields))
        images = out / "images"
        members = [
            (f"{key}{suffix}", content)
            for key, (image, fields) in kept.items()
            for suffix, content in (
                (".jpg", image),
                (".txt", json.loads(fields)["caption"].encode()),
                (".json", fields.encode()),
            )
            if content
        ]
        if form == "webdataset":
            write_tar(images / f"{shard:05d}.tar", members)
        for name, content in members if form == "files" else ():
            (images / f"{shard:05d}").mkdir(parents=True, exist_ok=True)
            (images / f"{shard:05d}" / name).write_bytes(content)
        (images / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (images / f"{shard:05d}_stats.json").write_text('{"count": 6}')


def read_part(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))[1:]


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_what_was_downloaded_is_a_data_set_and_what_was_not_is_no_part_of_it(
    tmp_path, server, refused, form
):
    path = write(tmp_path / "a.json", annotations(server, refused))
    assert urls.convert(path, tmp_path, part=6)[0] == len(ODD) + 6
    download(tmp_path, form)
    examples = open_data(tmp_path / "images")
    said = [example.captions for example in examples]
    assert sorted(said) == sorted((text,) for text in ODD.values())
    assert all(read_image(example.image).shape == (28, 42, 3) for example in examples)
    assert examples.left_out() == "nothing"


@pytest.mark.skipif(
    IMG2DATASET is None,
    reason="no img2dataset on the PATH; an environment of its own will do",
)
def test_img2dataset_itself_downloads_from_our_list(tmp_path, server, refused):
    path = write(tmp_path / "a.json", annotations(server, refused))
    urls.convert(path, tmp_path, part=10)
    small = {
        "--processes_count": 1,
        "--thread_count": 6,
        "--number_sample_per_shard": 10,
    }
    program, *options = urls.command(tmp_path)
    assert program == "img2dataset"
    kept = [option for option in options if option.partition("=")[0] not in small]
    kept += [f"{name}={value}" for name, value in small.items()]
    subprocess.run(
        [IMG2DATASET, *kept, "--timeout=1"],
        # One of its imports would ask a registry for updates.
        env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"},
        check=True,
        timeout=120,
    )
    examples = open_data(tmp_path / "images")
    said = [example.captions for example in examples]
    assert sorted(said) == sorted((text,) for text in ODD.values())
    assert [len(path.name) for path in examples.paths] == [9, 9]
    for example in examples:
        image_HWC = read_image(example.image)
        assert image_HWC.shape == (224, 224, 3)
        assert image_HWC[:30].min() > 250  # the white border of a 42 x 28 image
    stats = [json.loads(p.read_text()) for p in (tmp_path / "images").glob("*_stats*")]
    assert sum(each["successes"] for each in stats) == len(ODD)
    assert sum(each["failed_to_download"] for each in stats) == 4
    assert sum(each["failed_to_resize"] for each in stats) == 2
