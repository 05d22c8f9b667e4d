"""Pictures of curves: axes with round ticks, nothing lost, any text harmless."""

import math
import re
from xml.etree import ElementTree

import pytest

from minigpt4_jax import curves
from minigpt4_jax.curves import Series, chart, number, smooth, value_axis


def labels(axis) -> list[str]:
    return [label for _, label in axis.ticks]


@pytest.mark.parametrize(
    "values, how, wanted",
    [
        ([2.1, 4.4], {}, ["2.0", "2.5", "3.0", "3.5", "4.0", "4.5"]),
        ([2.615, 2.6251], {}, ["2.615", "2.620", "2.625", "2.630"]),
        (
            [3e-5, 1e-4],
            dict(from_zero=True),
            ["0", "2e-5", "4e-5", "6e-5", "8e-5", "0.0001"],
        ),
        ([5e3, 12e3], dict(from_zero=True), ["0", "5,000", "10,000", "15,000"]),
        ([0.31, 0.325], dict(percent=True), ["31.0 %", "31.5 %", "32.0 %", "32.5 %"]),
        ([2.0, 2.0], {}, ["1.0", "1.5", "2.0", "2.5", "3.0"]),
        ([0.0, 0.0], dict(from_zero=True), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([-1.2, -0.4], dict(from_zero=True), ["-1.5", "-1.0", "-0.5", "0.0"]),
        ([1.3, 70.0], dict(log=True), ["1", "10", "100"]),
        ([1.3, 14.0], dict(log=True), ["1", "2", "5", "10", "20"]),
        ([1.3, 7.0], dict(log=True), ["0", "2", "4", "6", "8"]),
        ([0.0, 70.0], dict(log=True), ["0", "20", "40", "60", "80"]),
        ([1e-6, 1e6], dict(log=True), ["1e-6", "0.001", "1", "1,000", "1,000,000"]),
    ],
)
def test_an_axis_has_a_few_round_ticks_around_its_values(values, how, wanted):
    axis = value_axis(values, **how)
    assert labels(axis) == wanted
    assert axis.low <= min(values) and max(values) <= axis.high
    assert axis.at(axis.low) == 0 and axis.at(axis.high) == 1


def test_a_few_odd_values_do_not_flatten_the_others():
    axis = value_axis([10.4] + [2.0 + i / 100 for i in range(100)] + [-7.0])
    assert (axis.low, axis.high) == (2.0, 3.0)
    assert axis.at(10.4) == 1 and axis.at(-7.0) == 0  # drawn at the edge
    page = chart("loss", [Series("each", list(enumerate([10.4] + 99 * [2.0])))])
    assert "highest 10.4, outside the frame" in page


@pytest.mark.parametrize(
    "value, wanted",
    [
        *((0.0, "0"), (2.3456, "2.35"), (3e-05, "3e-5"), (1.5e-10, "1.5e-10")),
        *((999.6, "1,000"), (123456.7, "123,457"), (-0.5, "-0.5")),
    ],
)
def test_a_number_has_three_digits_that_count(value, wanted):
    assert number(value) == wanted


def test_smoothing_looks_back_alone_and_leaves_out_what_is_not_finite():
    points = [(1, 4.0), (2, math.nan), (3, 4.0), (4, 4.0), (5, 9.0)]
    found = smooth(points)
    assert [step for step, _ in found] == [1, 3, 4, 5]
    assert [value for _, value in found[:3]] == pytest.approx([4.0, 4.0, 4.0])
    assert 4.0 < found[3][1] < 9.0
    assert smooth([]) == []


def svg(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def test_points_lie_where_their_axes_say():
    root = svg(chart("loss", [Series("each", [(0, 2.0), (50, 4.0), (100, 3.0)])]))
    (line,) = (p for p in root if p.get("class") == "thick s0")
    assert line.get("d") == "M0.0 1000.0L500.0 0.0L1000.0 500.0"


def test_pointing_at_a_step_says_its_values_and_what_happened():
    series = [
        Series("loss", [(step, 2.0 + step) for step in range(0, 101, 10)]),
        Series("validation", [(50, 7.5)], "dots"),
    ]
    root = svg(chart("loss", series, marks=[(52, "2 skipped by step 52")]))
    titles = [title.text for title in root.iter("title")]
    assert len(titles) == 11
    assert (
        titles[5]
        == "loss 52 at step 50\nvalidation 7.5 at step 50\n2 skipped by step 52"
    )
    rects = [(float(r.get("x")), float(r.get("width"))) for r in root.iter("rect")]
    for (x, width), (following, _) in zip(rects, rects[1:]):
        assert x + width == pytest.approx(following, abs=0.2)  # no gap between columns
    assert [p for p in root if p.get("class") == "mark"]


def test_a_long_run_keeps_its_peaks_in_a_small_picture():
    values = [(step, 2.0 + 0.0011 * (step % 6)) for step in range(30_000)]
    values[12_345] = (12_345, 50.0)
    page = chart("gradient norm", [Series("each", values)])
    assert len(page) < 100_000
    (line,) = (p for p in svg(page) if p.get("class") == "thick s0")
    heights = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", line.get("d"))]
    assert heights.count(0.0) == 1
    assert len(heights) <= 2 * curves.BUCKETS


@pytest.mark.parametrize("points", [[], [(3, math.nan), (4, math.inf)]])
def test_nothing_to_draw_is_no_picture(points):
    assert chart("loss", [Series("each", points)]) == ""


def test_a_single_point_is_a_picture():
    page = chart("loss", [Series("each", [(1, 5.0)], "thin")])
    assert "5 at step 1" in page
    svg(page)


def test_text_cannot_leave_its_place():
    hostile = "</title><script>alert('1')</script>&\""
    page = chart(hostile, [Series(hostile, [(1, 5.0)])], marks=[(1, hostile)])
    assert "<script" not in page
    assert svg(page).get("aria-label").startswith(hostile)
