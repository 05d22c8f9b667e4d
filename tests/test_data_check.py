"""What `data check` says of sets whose content is known, and its contact sheet."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.data import builders, check, contact_sheet
from minigpt4_jax.data.sources import open_data
from minigpt4_jax.errors import DataError
from tests import tiny
from tests.shards import jpeg, photo, photos, write_tar

ROOT = Path(__file__).parent.parent


def report(path, tokenizer=None, decode=False, budget=1.0) -> list[str]:
    examples = open_data(path, budget=budget)
    return list(check.told(examples, check.look(examples, decode), tokenizer))


def cut_png(seed: int) -> bytes:
    """A sound header over pixels that end too early."""
    return jpeg(seed, width=40, height=30, form="png")[:-60]


def data_check(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minigpt4_jax.data", "check", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def tars(tmp_path):
    """Two shards with one of everything that a report names."""
    first = photo("00", "A dog.", "A very brown dog.", license="CC BY", source="Here")
    first += photo("01", "A dog.", seed=96) + photo("02", " ")
    second = photo("03", "A cat on a mat.", source="https://a.org/3.jpg")
    second += photo("04", "Two.", source="https://a.org/4.jpg")
    second += [("05.png", cut_png(5)), ("05.txt", b"A bus."), ("06.txt", b"No image.")]
    second += [("07.jpg", jpeg(7, width=31, height=45)), ("07.txt", b"A tall one.")]
    write_tar(tmp_path / "data/a.tar", first)
    write_tar(tmp_path / "data/b.tar", second)
    return tmp_path / "data"


def test_a_report_names_everything_that_is_there(tars):
    a, b = tars / "a.tar", tars / "b.tar"
    total = sum(len(example.image) for example in open_data(tars, budget=1))
    assert report(tars) == [
        "examples    6",
        "captions    7, 1.17 an image",
        "  words     1 to 5, median 2",
        f"images      {total / 1000:.3g} KB in 2 shards",
        "  width     14 to 40, median 14 pixels",
        "  height    6 to 45, median 6 pixels",
        "unreadable  1",
        f"  {b}: 05 (image: damaged or truncated image (image file is truncated))",
        "duplicates  1",
        f"  {a}: 01 is also {a}: 00",
        "left out    2",
        f"  1 blank caption ({a}: 02)",
        f"  1 caption without image ({b}: 06)",
        "licences    1 recorded",
        "  1 CC BY",
        "sources     3 recorded",
        "  2 a.org",
        "  1 Here",
    ]


def test_tokens_are_those_of_the_given_tokenizer(tars):
    tokenizer = tiny.tokenizer()
    counts = sorted(
        len(tokenizer.encode(text))
        for example in open_data(tars, budget=1)
        for text in example.captions
    )
    assert len(counts) == 7
    line = f"  tokens    {counts[0]} to {counts[-1]}, median {counts[3]}"
    assert line in report(tars, tokenizer)


def test_a_sample_is_the_same_each_time_and_decode_looks_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SAMPLE", 5)
    write_tar(
        tmp_path / "a.tar", photos(0, 12) + [("x.png", cut_png(1)), ("x.txt", b"X")]
    )
    examples = open_data(tmp_path)
    assert report(tmp_path) == report(tmp_path)
    assert "  words     1 to 2, median 2" in report(tmp_path, decode=True)
    assert "unreadable  1" in report(tmp_path, decode=True)
    assert check.look(examples).examples == 5
    assert sum("of 5 looked at" in line for line in report(tmp_path)) == 4
    assert not any("looked at" in line for line in report(tmp_path, decode=True))


def test_many_examples_are_decoded_in_several_processes(tmp_path, monkeypatch):
    write_tar(
        tmp_path / "a.tar", photos(0, 30) + [("x.png", cut_png(1)), ("x.txt", b"X")]
    )
    examples = open_data(tmp_path)
    alone = check.look(examples, decode=True)
    monkeypatch.setattr(check, "AT_ONCE", 4)
    monkeypatch.setattr(check.workers, "available", lambda: 2)
    assert check.look(examples, decode=True) == alone
    assert (alone.examples, alone.unreadable) == (31, 1)


def test_not_one_readable_image_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(cut_png(i))
        (tmp_path / f"{i}.txt").write_text("A photo.")
    with pytest.raises(DataError, match=r"none of 3 images can be decoded: .*: 0 \("):
        report(tmp_path)


def layouts(folder: Path) -> dict[str, Path]:
    """One photo of each way to write a data set."""
    lists = {
        "csv": "image,caption\nx.jpg,A dog runs.\n",
        "tsv": "image\tcaption\nx.jpg\tA dog runs.\n",
        "jsonl": json.dumps({"image": "x.jpg", "caption": "A dog runs."}),
    }
    for name in ("lists", "folder", "cc_sbu_align/image"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.jpg").write_bytes(jpeg(3))
    (folder / "folder/x.txt").write_text("A dog runs.")
    notes = [{"image_id": "x", "caption": "A dog runs."}]
    (folder / "cc_sbu_align/filter_cap.json").write_text(json.dumps(notes))
    for suffix, text in lists.items():
        (folder / f"lists/own.{suffix}").write_text(text)
    write_tar(folder / "x.tar", [("x.jpg", jpeg(3)), ("x.txt", b"A dog runs.")])
    builders.build(open_data(folder / "x.tar"), folder / "records")
    paths = ["x.tar", "folder", "cc_sbu_align", "records"]
    return {
        path: folder / path for path in [*paths, *(f"lists/own.{s}" for s in lists)]
    }


def test_every_layout_is_reported_alike(tmp_path):
    reports = {name: report(path) for name, path in layouts(tmp_path).items()}
    assert len(reports) == 7
    for name, lines in reports.items():
        assert [line for line in lines if not line.startswith("images")] == [
            "examples    1",
            "captions    1, 1 an image",
            "  words     3 to 3, median 3",
            "  width     14 to 14, median 14 pixels",
            "  height    6 to 6, median 6 pixels",
            "unreadable  none",
            "duplicates  none",
            "left out    nothing",
            "licences    not recorded",
            "sources     not recorded",
        ], name


def test_the_command_prints_the_report_and_draws_the_sheet(tmp_path):
    write_tar(tmp_path / "a.tar", photos(0, 9))
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text(tiny.tokenizer_json())
    ends = {"bos_id": tiny.CONFIG.bos_id, "eos_ids": tiny.CONFIG.eos_ids}
    (model / "preset.json").write_text(json.dumps({"format": 1, **ends}))
    sheet = tmp_path / "sheets/all.png"
    found = data_check(tmp_path / "a.tar", "--sheet", sheet, "--checkpoint", model)
    expected = report(tmp_path / "a.tar", tiny.tokenizer())
    assert found.stdout.splitlines() == [*expected, f"sheet       {sheet}"], (
        found.stderr
    )
    with Image.open(sheet) as opened:
        assert opened.size[0] > 6 * contact_sheet.SIDE


def test_what_training_would_refuse_is_refused_after_the_report(tars, tmp_path):
    found = data_check(tars)
    assert found.stdout.startswith("examples    6\n")
    assert found.returncode == 5
    assert "a.tar: 1 of 3 examples cannot be used (1 blank caption)" in found.stderr
    write_tar(tmp_path / "empty.tar", [("0.jpg", jpeg(1))])
    none = data_check(tmp_path / "empty.tar")
    assert (none.returncode, none.stdout) == (5, "")
    assert "no usable example (1 image without caption)" in none.stderr


@pytest.mark.parametrize(
    "args, match",
    [
        ([], "check takes one path, got 0"),
        (["a", "b"], "check takes one path, got 2"),
        (["a", "--out", "b"], "out"),
    ],
)
def test_a_wrong_command_line_is_an_input_error(args, match):
    found = data_check(*args)
    assert found.returncode == 2 and match in found.stderr


def test_a_wrong_name_of_a_picture_is_told_before_the_data_is_looked_at(tmp_path):
    found = data_check(str(tmp_path / "absent"), "--sheet", str(tmp_path / "sheet.txt"))
    assert found.returncode == 2
    assert "sheet.txt: want a name that ends in .jpg" in found.stderr
    assert not list(tmp_path.iterdir())


# The sheet

TEXTS = (
    "A dog.",
    "A man rides a skateboard down a very long flight of stairs while a crowd watches.",
    "http://a.org/" + "averylongnamewithoutanyspace" * 9,
    "W" * 90,
    "i" * 400,
    "été à Köln: „naïve“ Жук 犬 🐕 e\u0301 \ud83d \x07 \u200b",
    "",
    " ".join("abcdefgh"[: i % 8 + 1] for i in range(60)),
)


@pytest.mark.parametrize("text", TEXTS)
def test_no_line_of_a_caption_is_wider_or_lower_than_its_place(text):
    lines = contact_sheet.wrap(text)
    font = contact_sheet._font()
    assert 1 <= len(lines) <= contact_sheet.LINES
    for line in lines:
        box = font.getbbox(line)
        assert box[2] <= contact_sheet.SIDE + 1  # a letter may lean out a little
        assert box[3] <= contact_sheet.LEADING
    if "…" not in lines[-1]:
        shown = "".join(lines).replace(" ", "")
        assert shown == contact_sheet.drawable(text).replace(" ", "").strip("\x07")


def test_letters_that_the_font_lacks_lose_accents_or_are_question_marks(monkeypatch):
    monkeypatch.setattr(contact_sheet, "FONTS", ())  # Pillow's own has ASCII
    for cached in (contact_sheet._font, contact_sheet._letter):
        cached.cache_clear()
    try:
        assert contact_sheet.drawable("Ein süßer Žuk, été 犬") == "Ein su?er Zuk, ete ?"
    finally:
        for cached in (contact_sheet._font, contact_sheet._letter):
            cached.cache_clear()


def test_a_sheet_shows_each_photo_whole_in_its_own_frame():
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)] * 3
    shapes = [(10, 10), (7, 70), (90, 9)] * 3
    photos_of = [
        (np.full((*shape, 3), color, np.uint8), "Some words.")
        for shape, color in zip(shapes, colors)
    ]
    photos_of[4] = (None, "Not there.")
    sheet_HWC = np.asarray(contact_sheet.contact_sheet(photos_of))
    width = contact_sheet.SIDE + contact_sheet.GAP
    height = width + contact_sheet.LINES * contact_sheet.LEADING
    rows = -(-9 // contact_sheet.COLUMNS)
    assert sheet_HWC.shape == (
        rows * height + contact_sheet.GAP,
        contact_sheet.COLUMNS * width + contact_sheet.GAP,
        3,
    )
    for number, (image_HWC, _) in enumerate(photos_of):
        row, column = divmod(number, contact_sheet.COLUMNS)
        y = contact_sheet.GAP + row * height
        x = contact_sheet.GAP + column * width
        frame_HWC = sheet_HWC[y : y + contact_sheet.SIDE, x : x + contact_sheet.SIDE]
        if image_HWC is None:  # marked, not left empty
            assert (frame_HWC == contact_sheet.INK).all(-1).any()
            continue
        color = image_HWC[0, 0]
        ours_HW = (frame_HWC == color).all(-1)
        scale = contact_sheet.SIDE / max(image_HWC.shape)
        want = [round(side * scale) for side in image_HWC.shape[:2]]
        assert [ours_HW.any(1).sum(), ours_HW.any(0).sum()] == want
        assert (frame_HWC[~ours_HW] == contact_sheet.FRAME).all()


def test_an_unreadable_photo_has_its_place_on_the_sheet(tars, tmp_path):
    before = {file: file.read_bytes() for file in tars.rglob("*.tar")}
    check.draw(open_data(tars, budget=1), tmp_path / "sheet.jpg")
    with Image.open(tmp_path / "sheet.jpg") as opened:
        assert opened.format == "JPEG"
        places = 6 * (contact_sheet.SIDE + contact_sheet.GAP)
        assert opened.size[0] == places + contact_sheet.GAP
    assert before and all(file.read_bytes() == data for file, data in before.items())
