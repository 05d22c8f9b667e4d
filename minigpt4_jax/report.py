"""One page about a training run: minigpt4-jax report WORKDIR [--out FILE].

Curves, sample answers beside their photos, and settings, in one HTML file that loads
nothing from elsewhere. Works on runs in progress.
"""

import base64
import datetime
import hashlib
import html
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from minigpt4_jax import errors, locate
from minigpt4_jax.curves import Series, chart, number, smooth
from minigpt4_jax.diagnosis import AFTER, diagnose
from minigpt4_jax.pages import REPORT
from minigpt4_jax.run_config import flat

logger = logging.getLogger(__name__)

STYLE = Path(__file__).parent / "assets/report.css"
# Nothing is fetched and nothing runs, whatever a caption holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LARGEST = 1_000_000  # bytes of a photo; kept ones have a hundredth

CHARTS: tuple[
    tuple[str, str, dict[str, Any]], ...
] = (  # title, metric, how it is drawn
    ("learning rate", "lr", dict(from_zero=True)),
    ("gradient norm", "grad_norm", dict(log=True)),
    ("examples a second", "examples_per_s", dict(from_zero=True)),
    ("waiting for data", "waiting", dict(from_zero=True, percent=True)),
    ("MFU", "mfu", dict(from_zero=True, percent=True)),
    ("tokens a second", "tokens_per_s", dict(from_zero=True)),
    ("memory, GB", "memory_gb", dict(from_zero=True)),
)
OLD_NAMES = {"photos_per_s": "examples_per_s"}  # of runs before version 0.2


def main(argv: list[str]) -> None:
    """Read the arguments and write the page."""
    if len(argv) != 2:
        raise errors.InputError(
            f"report takes one work directory, got {len(argv) - 1} arguments"
        )
    workdir = Path(argv[1]).expanduser()
    out = Path(flags.FLAGS.out or workdir / "report.html").expanduser()
    text = page(workdir)
    part = out.with_name(f".{out.name}.part")
    # JSON can hold half of a surrogate pair, which no encoding takes.
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, out)
    logger.info("%s (%.1f MB)", out, out.stat().st_size / 1e6)


def page(workdir: Path, now: float | None = None) -> str:
    """The page as text.

    Args:
        now: seconds since 1970; default the present.

    Raises:
        InputError: nothing of a run is there.
    """
    if not (workdir / "config.json").is_file():
        raise errors.InputError(
            f"{workdir}: has no config.json; want the --workdir of a training run"
        )
    now = time.time() if now is None else now
    run = read_run(workdir / "config.json")
    records = [
        {OLD_NAMES.get(name, name): value for name, value in line.items()}
        for line in read_lines(workdir / "metrics.jsonl")
    ]
    samples = read_lines(workdir / "samples.jsonl")
    photos = read_photos(workdir / "samples", samples)
    name = workdir.resolve().name
    styles = [STYLE.read_text(encoding="utf-8"), *photos.values()]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(name)}</title>
<style>{"".join(styles)}</style>
</head>
<body>
<header>
<h1>{text(name)}</h1>
{status(run, records, workdir / "metrics.jsonl", now)}
{tiles(run, records)}
{notes(records)}
</header>
<main>
{curves(records)}
{answers(samples, photos)}
{settings(run)}
</main>
<footer>Written {date(now)} by <code>minigpt4-jax report {text(workdir)}</code>;
the same command again takes in what is new.</footer>
</body>
</html>
"""


def read_run(path: Path) -> dict:
    """config.json; CheckpointError when it is damaged."""
    run = locate.read_json(path, locate.RUN_ADVICE)
    if not isinstance(run.get("config"), dict):
        raise errors.CheckpointError(f"{path}: has no config; was it written by train?")
    return run


def read_lines(path: Path) -> list[dict]:
    """The lines with a step; one that is being written, or was cut, is passed over."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def read_photos(folder: Path, samples: Iterable[Mapping]) -> dict[str, str]:
    """A style for each photo file, that shows it; each is in the page only once."""
    names = {line["file"] for line in samples if isinstance(line.get("file"), str)}
    styles = {}
    for name in sorted(names):
        path = folder / name
        if (
            Path(name).name != name or not path.is_file()
        ):  # "../config.json" is not ours
            continue
        image = path.read_bytes()
        if image.startswith(b"\xff\xd8") and len(image) <= LARGEST:
            data = base64.b64encode(image).decode()
            url = f"data:image/jpeg;base64,{data}"
            styles[name] = f".photo.{_class(name)}{{background-image:url({url})}}\n"
    return styles


def status(run: Mapping, records: Sequence[Mapping], path: Path, now: float) -> str:
    """Where the run stands, in a line."""
    if not records:
        return '<p class="faint">Nothing is logged yet.</p>'
    step, total = records[-1]["step"], _total(run)
    at = f"Step {step:,}" + (f" of {total:,}" if total else "")
    end = ", finished" if total and step >= total else ""
    written = path.stat().st_mtime
    last = f"last number {duration(max(now - written, 0))} ago, {date(written)}"
    return f'<p class="faint">{at}{end}; {last}</p>'


def tiles(run: Mapping, records: Sequence[Mapping]) -> str:
    """The few numbers that one looks for first."""
    found = []
    losses = smooth(points(records, "loss"))
    if losses:
        found.append(
            ("loss, smoothed", number(losses[-1][1]), f"step {losses[-1][0]:,}")
        )
    val = points(records, "val_loss")
    if val:
        step, best = min(val, key=lambda p: p[1])
        found.append(("best validation loss", number(best), f"step {step:,}"))
    speeds = points(records, "examples_per_s")
    if speeds:
        found.append(("examples a second", number(speeds[-1][1]), "last"))
    seconds = points(records, "step_s")
    left = (_total(run) or 0) - records[-1]["step"] if records else 0
    if seconds and left > 0:
        time_ = duration(left * seconds[-1][1])
        found.append(("left at this speed", time_, f"{left:,} steps"))
    skipped = skips(records)
    if skipped:
        count = sum(n for _, n in skipped)
        found.append(("skipped steps", str(count), f"last by step {skipped[-1][0]:,}"))
    rows = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{more}</small></dd></div>"
        for label, value, more in found
    )
    return f'<dl class="tiles">{rows}</dl>' if rows else ""


def notes(records: Sequence[Mapping]) -> str:
    """What the last evaluation says is wrong (diagnosis.py)."""
    names = ("val_loss", "val_loss_exchanged")
    values = [points(records, name) for name in names]
    found = {}
    if all(values) and (step := values[0][-1][0]) >= AFTER:
        found = diagnose(
            step, val_loss=values[0][-1][1], val_loss_exchanged=values[1][-1][1]
        )
    return "".join(f'<p class="notes">{text(says)}.</p>' for says in found.values())


def curves(records: Sequence[Mapping]) -> str:
    """The charts; those of numbers that the run does not log are left out."""
    if not records:
        return ""
    loss = points(records, "loss")
    marks = [
        (step, f"{count} skipped by step {step:,}: loss or gradient was not finite")
        for step, count in skips(records)
    ]
    drawn = [
        chart(
            "loss",
            [
                Series("each", loss, "thin"),
                Series("smoothed", smooth(loss)),
                Series("validation", points(records, "val_loss"), "dots"),
                Series(
                    *("images exchanged", points(records, "val_loss_exchanged"), "dots")
                ),
            ],
            marks=marks,
            marked="skipped steps",
        )
    ]
    for title, name, how in CHARTS:
        series = [Series("last", points(records, name))]
        if name == "grad_norm":
            how = how | dict(marks=marks, marked="skipped steps")
        drawn.append(chart(title, series, **how))
    return (
        f'<section><h2>Curves</h2><div class="charts">{"".join(drawn)}</div></section>'
    )


def answers(samples: Sequence[Mapping], photos: Mapping[str, str]) -> str:
    """Photos with what the model says, newest evaluation first, older ones folded."""
    by_step: dict[int, list[str]] = {}
    for line in samples:
        by_step.setdefault(line["step"], []).append(card(line, photos))
    if not by_step:
        return ""
    newest, *older = sorted(by_step, reverse=True)
    parts = [f"<h3>Step {newest:,}</h3>{_cards(by_step[newest])}"]
    parts += [
        f"<details><summary>Step {step:,}</summary>{_cards(by_step[step])}</details>"
        for step in older
    ]
    return f"<section><h2>What the model says</h2>{''.join(parts)}</section>"


def card(line: Mapping, photos: Mapping[str, str]) -> str:
    """One photo, the answer, and what people wrote."""
    key, file = text(line.get("photo", "")), str(line.get("file"))
    if file in photos:
        photo = (
            f'<div class="photo {_class(file)}" role="img" aria-label="photo {key}">'
        )
    else:
        photo = '<div class="photo none">no photo is kept'
    says = text(line.get("says") or "") or '<span class="faint">(nothing)</span>'
    captions = line.get("captions")
    people = "".join(
        f'<li dir="auto">{text(caption)}</li>'
        for caption in (captions if isinstance(captions, list) else [])
    )
    of = f"People say, of photo {key}:" if people else f"Photo {key}"
    return (
        f'<article class="card">{photo}</div><div class="said">'
        f'<p class="says" dir="auto">{says}</p><span class="faint">{of}</span>'
        f'<ul class="people">{people}</ul></div></article>'
    )


def settings(run: Mapping) -> str:
    """The config, and what went into the run."""
    parts = []
    differences = run.get("differs_from_reference")
    if isinstance(differences, list):
        items = "".join(f"<li>{text(d)}</li>" for d in differences)
        parts.append(
            "<h3>Different from the reference</h3>"
            + (f'<ul class="plain">{items}</ul>' if items else "<p>Nothing.</p>")
        )
    for title, name in (
        *(("Config", "config"), ("Versions", "versions")),
        *(("Data, by content", "data"), ("Frozen weights, by content", "frozen")),
    ):
        values = run.get(name)
        if isinstance(values, dict) and values:
            rows = "".join(
                f"<tr><td>{text(knob)}</td><td>{text(_shown(value))}</td></tr>"
                for knob, value in flat(values).items()
            )
            parts.append(
                f"<details><summary>{title}</summary><table>{rows}</table></details>"
            )
    return f"<section><h2>Settings</h2>{''.join(parts)}</section>"


def points(records: Iterable[Mapping], name: str) -> list[tuple[int, float]]:
    """A metric by step, where it is a finite number."""
    return [
        (record["step"], float(record[name]))
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]


def skips(records: Iterable[Mapping]) -> list[tuple[int, int]]:
    """Steps at which more skipped ones were counted than before, and how many more."""
    found, before = [], 0.0
    for step, count in points(records, "skipped"):
        if count > before:
            found.append((step, int(count - before)))
        before = count
    return found


def text(value: Any) -> str:
    """A value as HTML shows it, letter for letter."""
    return html.escape(str(value))


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.1f} {unit}" if size > 60 else f"{count:.0f} {unit}"
    return f"{seconds:.0f} s"


def date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _class(name: str) -> str:
    """A class for a photo's file: its name may hold what CSS would read otherwise."""
    return "p" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:16]


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _total(run: Mapping) -> int:
    optim = run["config"].get("optim")
    return int(optim.get("total_steps", 0)) if isinstance(optim, dict) else 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value) if value != "" else "(none)"


if __name__ == "__main__":
    REPORT.run(main)
