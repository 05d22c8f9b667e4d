"""The page about a run: complete, alone in one file, harmless, at any time of the run."""

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minigpt4_jax import report
from minigpt4_jax.data.sources import Example
from minigpt4_jax.errors import CheckpointError, InputError
from minigpt4_jax.progress import keep_photos
from tests import training

ROOT = Path(__file__).parent.parent
HOSTILE = "</li></style><script>alert('x')</script><img src=x onerror=\"y\">"
RUN = {
    "checkpoint": "demo",
    "config": {"loss": "captions", "trainable": ["projector/.*"], "init": ""}
    | {"optim": {"total_steps": 1200, "peak_lr": 1e-4}},
    "versions": {"jax": "0.10.2"},
    "frozen": {"model.safetensors": "ab12"},
    "data": {"flickr": "cd34"},
    "differs_from_reference": ["batch_size: 4, the reference has 256"],
}


class Page(HTMLParser):
    """Tags in order, their attributes, and the text, of a page whose tags must match."""

    VOID = ("meta", "path", "rect")  # an SVG's are closed by "/>"

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.opened = [], [], [], []
        self.feed(text)
        assert self.opened == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        if not self.opened or self.opened[-1] != "style":
            self.text.append(data)

    def __contains__(self, text: str) -> bool:
        return text in " ".join(" ".join(self.text).split())


def write(workdir: Path, records=(), samples=(), run=RUN) -> Path:
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"format": 1, **run}))
    for name, lines in (("metrics.jsonl", records), ("samples.jsonl", samples)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if text:
            (workdir / name).write_text(text)
    return workdir


def records(last: int = 1200) -> list[dict]:
    found = []
    for step in range(10, last + 1, 10):
        record = {
            **{"step": step, "loss": 2 + 10 / step, "lr": 1e-4, "grad_norm": 1.5},
            **{"examples_per_s": 5.5, "tokens_per_s": 300.0, "step_s": 2.0},
            **{"waiting": 0.04, "mfu": 0.31, "memory_gb": 2.2},
            **{"skipped": 0 if step < 500 else 3},
        }
        if step % 400 == 0:
            record |= {"val_loss": 2.6, "val_loss_exchanged": 2.9}
        found.append(record)
    return found


@pytest.fixture
def finished(tmp_path):
    """A run with everything, two evaluations, and a caption that means no good."""
    workdir = tmp_path / "stage1"
    workdir.mkdir()
    photos = [Example(f"0{i}", training.jpeg(i), ("A dog.",), "", "") for i in range(2)]
    files = keep_photos(workdir, photos)
    samples = [
        {
            "step": step,
            "photo": p.key,
            "file": files[p.key],
            "says": f"{p.key} at {step}",
        }
        | {"captions": ["A dog runs.", HOSTILE]}
        for step in (400, 800)
        for p in photos
    ]
    return write(workdir, records(), samples)


def test_a_page_has_curves_answers_and_settings(finished):
    page = Page(report.page(finished))
    for text in (
        *("Step 1,200 of 1,200, finished", "loss", "smoothed", "validation 2.6"),
        *("images exchanged 2.9", "gradient norm", "learning rate", "MFU last 31 %"),
        *("waiting for data last 4 %", "examples a second last 5.5", "memory, GB"),
        *("A dog runs.", "00 at 800", "01 at 400", "Step 800", "Step 400"),
        *("batch_size: 4, the reference has 256", "optim.total_steps 1200"),
        *("trainable projector/.*", "init (none)", "jax 0.10.2", "flickr cd34"),
    ):
        assert text in page, text
    assert page.tags.count("svg") == page.tags.count("figure") == 8


def test_newer_answers_come_first_and_older_ones_are_folded(finished):
    html = report.page(finished)
    newest, older = html.index("00 at 800"), html.index("00 at 400")
    assert newest < html.index("<details>") < older


def test_each_photo_is_in_the_page_once_and_shown_with_every_answer(finished):
    html = report.page(finished)
    for path in (finished / "samples").iterdir():
        assert html.count(base64.b64encode(path.read_bytes()).decode()) == 1
        assert html.count(report._class(path.name)) == 3  # the style, two evaluations


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(finished):
    html = report.page(finished)
    page = Page(html)
    assert {"script", "img", "link", "iframe", "object", "a"}.isdisjoint(page.tags)
    names = {name for name, _ in page.attributes}
    assert names.isdisjoint({"src", "href", "srcset", "onerror", "onload", "action"})
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert html.count("url(") == html.count("url(data:image/jpeg;base64,") == 2
    assert html.index(report.POLICY) < html.index(
        "<style>"
    )  # it holds for what follows


def test_any_text_is_shown_letter_for_letter(tmp_path):
    run = RUN | {"differs_from_reference": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    sample = {"step": 1, "photo": HOSTILE, "says": HOSTILE, "captions": [HOSTILE, 3]}
    page = Page(report.page(write(tmp_path / "<b>run", records(20), [sample], run)))
    assert "script" not in page.tags and "b>run" not in page.tags
    assert "".join(page.text).count(HOSTILE) == 6


@pytest.mark.parametrize(
    "file", ["../config.json", "/etc/hostname", "absent.jpg", 7, ""]
)
def test_only_photos_of_the_run_are_shown(tmp_path, file):
    sample = {"step": 1, "photo": "0", "says": "A dog.", "file": file}
    workdir = write(tmp_path / "run", records(20), [sample])
    (workdir / "samples").mkdir()
    (workdir / "samples" / "note.txt").write_text("no photo")
    html = report.page(workdir)
    assert "url(" not in html and "no photo is kept" in Page(html)


def test_a_run_in_progress_says_how_far_it_is(tmp_path):
    workdir = write(tmp_path / "run", records(300))
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 310, "loss": 2.')  # being written
    written = (workdir / "metrics.jsonl").stat().st_mtime
    page = Page(report.page(workdir, now=written + 720))
    assert "Step 300 of 1,200; last number 12 min ago" in page
    assert "left at this speed 30 min 900 steps" in page
    assert "What the model says" not in page


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path):
    page = Page(report.page(write(tmp_path / "run")))
    assert "Nothing is logged yet." in page and "figure" not in page.tags


def test_a_run_of_an_older_version_has_a_page(tmp_path):
    lines = [{"step": 10 * i, "loss": 3.0, "photos_per_s": 5.0} for i in range(1, 4)]
    samples = [{"step": 20, "photo": "00500", "says": "A man."}]
    run = {"format": 1, "config": {"loss": "captions"}, "versions": {}}
    page = Page(report.page(write(tmp_path / "run", lines, samples, run)))
    assert "examples a second last 5" in page
    assert "A man." in page and "no photo is kept" in page


def test_steps_that_were_skipped_are_marked_where_they_were(finished):
    page = Page(report.page(finished))
    assert "skipped steps 3 last by step 500" in page
    assert page.attributes.count(("class", "mark")) == 2  # loss and gradient norm
    assert "3 skipped by step 500: loss or gradient was not finite" in page


def test_numbers_that_are_not_finite_leave_a_page(tmp_path):
    lines = records(100) + [{"step": 110, "loss": float("nan"), "grad_norm": 1e999}]
    page = Page(report.page(write(tmp_path / "run", lines)))
    assert "Step 110 of 1,200" in page and "nan" not in page


def test_a_run_that_does_not_look_at_its_images_is_told_so(tmp_path):
    lines = records(400)
    lines[-1] |= {"val_loss_exchanged": 2.6001}
    page = Page(report.page(write(tmp_path / "run", lines)))
    assert "step 400: the answers do not depend on the image" in page


def test_half_a_character_does_not_keep_the_page_from_being_written(tmp_path):
    sample = {"step": 1, "photo": "0", "says": "A \ud800 dog.", "captions": []}
    workdir = write(tmp_path / "run", records(20), [sample])
    out = tmp_path / "page.html"
    command = [
        sys.executable,
        "-m",
        "minigpt4_jax.report",
        str(workdir),
        f"--out={out}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stderr
    assert "A ? dog." in out.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


def test_what_is_no_run_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(InputError, match="has no config.json; want the --workdir of a"):
        report.page(tmp_path)
    for text in ("{", "[]", '{"format": 1, "config": 3}', '{"config": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            CheckpointError,
            match="config.json(: has no config| is damaged .*new --workdir)",
        ):
            report.page(tmp_path)
    with pytest.raises(InputError, match="one work directory, got 0"):
        report.main(["report"])


def test_the_command_needs_no_jax():
    code = "import sys, minigpt4_jax.report; print('jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
