"""Numbers over steps -> a picture in HTML and SVG, without scripts or other files.

Lines are in an SVG that stretches with the page, labels beside it in HTML, so that text
keeps its size on a phone. Colours and sizes are classes in report.css.
"""

import html
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

SIDE = 1000  # of the picture's own coordinates
BUCKETS = 400  # of a long line; each keeps its lowest and its highest point
HOVERS = 150  # columns that say their values
INSIDE = 0.98  # share of the points that the frame holds; others lie on its edge,
WORTH = 1.5  # if the axis of all would be longer by this factor

Point = tuple[int, float]


@dataclass(frozen=True)
class Series:
    """What is drawn together.

    kind: "thin" or "thick" line, or "dots"; the class that draws it.
    """

    label: str
    points: Sequence[Point]
    kind: str = "thick"


@dataclass(frozen=True)
class Axis:
    """Where values lie: `at` gives 0..1 from the low end; `ticks` are (value, label)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return min(max((value - low) / (high - low), 0.0), 1.0)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    marks: Sequence[tuple[int, str]] = (),
    marked: str = "",
    from_zero: bool = False,
    log: bool = False,
    percent: bool = False,
) -> str:
    """A `figure` with axes, ticks, a legend, and values that show where one points.

    Args:
        series: points in order of their steps; values that are not finite are left out.
        marks: steps that get a line across, and what is said where one points at it.
        marked: what they are, for the legend.
        from_zero: the axis of values begins at 0.
        log: it is logarithmic where values are positive and span more than a decade.
        percent: values are shares.
    """
    series = [_finite(s) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    x = step_axis(max(s.points[-1][0] for s in series))
    values = [value for s in series for _, value in s.points]
    y = value_axis(values, from_zero=from_zero, log=log, percent=percent)
    drawn = [*_grid(y), *(_line(s, i, x, y) for i, s in enumerate(series))]
    drawn += [f'<path class="mark" d="M{_x(x, step)} 0V{SIDE}"/>' for step, _ in marks]
    labels = [
        f'<span class="y" style="top:{100 - 100 * y.at(value):.2f}%">{label}</span>'
        for value, label in y.ticks
    ] + [
        f'<span class="x" style="left:{100 * x.at(value):.2f}%">{label}</span>'
        for value, label in x.ticks
    ]
    last = series[0].points[-1]
    legend = _legend(series, marked if marks else "", y, percent)
    return (
        f"<figure><figcaption><b>{_text(title)}</b> {legend}</figcaption>"
        f'<div class="plot"><svg viewBox="0 0 {SIDE} {SIDE}" '
        f'preserveAspectRatio="none" role="img" aria-label="{_text(title)}: '
        f'{number(last[1], percent)} at step {last[0]:,}">'
        f"{''.join(drawn)}{_hovers(series, marks, x, y, percent)}</svg>"
        f"{''.join(labels)}</div></figure>"
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """The running mean over about a twentieth of the points, the past ones alone."""
    keep = 1 - 2 / (max(len(points) / 20, 3) + 1)
    total = weight = 0.0
    found = []
    for step, value in points:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            found.append((step, total / weight))
    return found


def step_axis(last: int) -> Axis:
    high = max(last, 1)
    ticks = _ticks(0, high, 4)
    return Axis(0, high, tuple((t, f"{t:,.0f}") for t in ticks if t == int(t) <= high))


def value_axis(
    values: Sequence[float],
    *,
    from_zero: bool = False,
    log: bool = False,
    percent: bool = False,
) -> Axis:
    """An axis that begins and ends at ticks and holds all values, or nearly all."""
    values = sorted(values)
    out = int(len(values) * (1 - INSIDE) / 2)
    low, high = values[out], values[-1 - out]
    if values[-1] - values[0] <= WORTH * (high - low):
        low, high = values[0], values[-1]
    if log and low > 0 and high > 10 * low:
        return _log_axis(low, high)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a constant, or nothing at all
        pad = abs(high) / 2 or 1.0
        low, high = (low if from_zero else low - pad), high + pad
    ticks = _ticks(low, high, 5)
    gap = (ticks[1] - ticks[0]) * (100 if percent else 1)
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    plain = 1e-4 < gap
    labels = (
        f"{t * 100:.{digits}f} %"
        if percent
        else f"{t:,.{digits}f}"
        if plain
        else number(t)
        for t in ticks
    )
    return Axis(ticks[0], ticks[-1], tuple(zip(ticks, labels)))


def number(value: float, percent: bool = False) -> str:
    """Three digits that count: 12,345 · 2.35 · 3e-5."""
    if percent:
        return f"{value * 100:.3g} %"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.3g}")


def _log_axis(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [10.0**e for e in range(first, last + 1)]
    if last - first < 3:
        ticks = [f * t for t in ticks[:-1] for f in (1, 2, 5)] + ticks[-1:]
        below = [t for t in ticks if t <= low][-1]
        above = next(t for t in ticks if t >= high)
        ticks = [t for t in ticks if below <= t <= above]
    powers = [t for t in ticks if math.log10(t) == round(math.log10(t))]
    shown = powers[:: math.ceil(len(powers) / 6)] if len(powers) > 2 else ticks
    labels = tuple((t, number(t)) for t in shown)
    return Axis(ticks[0], ticks[-1], labels, log=True)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [round(i * gap, 12) for i in range(first, last + 1)]


def _finite(series: Series) -> Series:
    points = [p for p in series.points if math.isfinite(p[1])]
    return Series(series.label, points, series.kind)


def _line(series: Series, number: int, x: Axis, y: Axis) -> str:
    places = [(_x(x, s), _y(y, v)) for s, v in _reduce(series.points)]
    # A line of no length is a round dot: a circle would be stretched with the picture.
    join = "M{} {}h0" if series.kind == "dots" else "L{} {}"
    path = "".join(join.format(*place) for place in places)
    if series.kind != "dots":
        path = "M" + path[1:] + ("h0" if len(places) == 1 else "")
    return f'<path class="{series.kind} s{number}" d="{path}"/>'


def _reduce(points: Sequence[Point]) -> list[Point]:
    """At most two points a bucket, its lowest and its highest, so that peaks stay."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    size = math.ceil(len(points) / BUCKETS)
    kept = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _grid(y: Axis) -> list[str]:
    return [f'<path class="grid" d="M0 {_y(y, t)}H{SIDE}"/>' for t, _ in y.ticks]


def _hovers(series: Sequence[Series], marks, x: Axis, y: Axis, percent: bool) -> str:
    """Columns over the whole height, each with the last values that it covers."""
    columns: dict[int, dict[int, Point]] = {}
    for i, s in enumerate(series):
        for point in s.points:
            columns.setdefault(int(x.at(point[0]) * HOVERS), {})[i] = point
    places = sorted(columns)
    edges = [0, *((a + b + 1) / 2 for a, b in itertools.pairwise(places)), HOVERS + 1]
    drawn = []
    for place, left, right in zip(places, edges, edges[1:]):
        points = columns[place]
        says = [
            f"{series[i].label} {number(value, percent)} at step {step:,}"
            for i, (step, value) in points.items()
        ]
        says += [mark for step, mark in marks if left <= x.at(step) * HOVERS < right]
        dots = "".join(
            f'<path class="at s{i}" d="M{_x(x, step)} {_y(y, value)}h0"/>'
            for i, (step, value) in points.items()
        )
        unit = SIDE / HOVERS
        drawn.append(
            f'<g class="hover"><title>{_text(chr(10).join(says))}</title><rect '
            f'x="{left * unit:.1f}" width="{(right - left) * unit:.1f}" '
            f'height="{SIDE}"/>{dots}</g>'
        )
    return "".join(drawn)


def _legend(series: Sequence[Series], marked: str, y: Axis, percent: bool) -> str:
    """What is drawn how, the last value of each, and what the frame does not hold."""
    keys = [
        f'<span class="{f"key {s.kind} s{i}" if len(series) > 1 else "key none"}">'
        f"{_text(s.label)} {number(s.points[-1][1], percent)}</span>"
        for i, s in enumerate(series)
    ]
    if marked:
        keys.append(f'<span class="key across">{_text(marked)}</span>')
    values = [value for s in series for _, value in s.points]
    for name, value, cut in (
        ("lowest", min(values), min(values) < y.low),
        ("highest", max(values), max(values) > y.high),
    ):
        if cut:
            says = f"{name} {number(value, percent)}, outside the frame"
            keys.append(f'<span class="key none">{says}</span>')
    return " ".join(keys)


def _x(axis: Axis, step: float) -> str:
    return f"{axis.at(step) * SIDE:.1f}"


def _y(axis: Axis, value: float) -> str:
    return f"{SIDE - axis.at(value) * SIDE:.1f}"


def _text(text: str) -> str:
    return html.escape(text)
