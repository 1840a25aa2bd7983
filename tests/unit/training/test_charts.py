"""Curves of a report: where points land, what is left out, and that a page holds what strangers wrote as text."""

import math
import re
from xml.etree import ElementTree

import pytest

from dora_diffusion.training.run.charts import Curve, binned, chart, smoothed


def svg_of(*curves: Curve) -> ElementTree.Element:
    return ElementTree.fromstring(chart(curves).partition("</p>\n")[2])


def points_of(svg: ElementTree.Element, number: int = 0) -> list[tuple[float, float]]:
    line = svg.findall("polyline")[number].attrib["points"]
    return [tuple(map(float, pair.split(","))) for pair in line.split()]


def test_points_lie_in_proportion_between_the_axes() -> None:
    svg = svg_of(Curve("loss", [(0, 1.0), (5, 3.0), (10, 2.0)], "#000", has_dots=True))
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg)
    assert x1 - x0 == pytest.approx(x2 - x1) and x0 < x1
    assert y1 < y2 < y0  # SVG counts downwards
    assert (y0 - y1) == pytest.approx(2 * (y0 - y2), abs=0.2)
    assert len(svg.findall("circle")) == 3
    labels = {float(text.text): text.attrib for text in svg.findall("text")}
    assert float(labels[2.0]["y"]) - 4 == pytest.approx(y2, abs=0.2) or labels[2.0]["text-anchor"] == "middle"


@pytest.mark.parametrize("points", [[(3, 0.5)], [(0, 0.0), (1, 0.0)], [(0, -2.0)], [(0, 1e-9), (1, 2e-9)]])
def test_what_has_no_height_or_width_is_drawn_all_the_same(points) -> None:
    places = points_of(svg_of(Curve("loss", points, "#000")))
    assert len(places) == len(points) and all(map(math.isfinite, sum(places, ())))


def test_what_is_no_number_is_left_out_and_nothing_is_no_chart() -> None:
    points = [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)]
    assert len(points_of(svg_of(Curve("loss", points, "#000")))) == 2
    assert chart([Curve("loss", [(1, math.nan)], "#000"), Curve("none", [], "#000")]) == ""


def test_a_spike_of_a_faint_curve_is_cut_off_and_one_of_another_is_not() -> None:
    steps = [(step, 1.0 + step % 2) for step in range(1, 200)]
    usual = Curve("mean", [(0, 1.0), (200, 2.0)], "#000")
    faint = svg_of(Curve("each", [*steps, (200, 1e6)], "#000", is_faint=True), usual)
    bold = svg_of(Curve("each", [*steps, (200, 1e6)], "#000"), usual)
    rise = [abs(points_of(svg, 1)[0][1] - points_of(svg, 1)[1][1]) for svg in (faint, bold)]
    assert rise[0] > 100 and rise[1] < 1
    top = min(y for _, y in points_of(faint, 0))
    assert top >= 12  # within the frame


def test_long_runs_are_binned_by_their_means_and_smoothed_over_neighbours() -> None:
    points = [(step, float(step % 2)) for step in range(10_000)]
    found = binned(points)
    assert len(found) <= 300 and {round(y, 1) for _, y in found} == {0.5}
    assert sum(x for x, _ in found) / len(found) == pytest.approx(4999.5, rel=0.01)
    assert binned(points[:50]) == points[:50]
    short = smoothed(points[:50])
    assert [x for x, _ in short] == list(range(50))
    assert short[20][1] == pytest.approx(sum(step % 2 for step in range(14, 27)) / 13)
    assert smoothed([]) == [] and smoothed([(1, 2.0)]) == [(1, 2.0)]


def test_names_and_colours_are_escaped() -> None:
    drawn = chart([Curve('<script>"', [(0, 1.0), (1, 2.0)], '"><script>')])
    assert "<script>" not in drawn and re.search(r"&lt;script&gt;", drawn)
