from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from onediff.eval.report.charts import Bar, Curve, bar_chart, line_chart, round_up, standalone
from onediff.eval.report.figures import smooth, stress_chart, thin

POINTS = [(float(x), 2.0) for x in range(10)]


def test_a_curve_reaches_from_the_left_edge_to_the_last_point() -> None:
    chart = line_chart([Curve("loss", "a", POINTS)], title="loss", x_label="step", y_label="loss")
    path = re.findall(r'polyline class="a" points="([^"]+)"', chart)[0].split()
    assert path[0] == "40.0,50.0" and path[-1] == "386.0,50.0" and ">9</text>" in chart


def test_a_curve_with_one_point_can_be_drawn() -> None:
    assert "<polyline" in line_chart([Curve("loss", "a", POINTS[:1])], title="one", x_label="x", y_label="y")


def test_standalone_charts_are_valid_xml_without_css_variables() -> None:
    for chart in (bar_chart([Bar("a < b", "ours", 3.0, (2.0, 4.0))], title="t & u", x_label="x"),
                  line_chart([Curve("c", "a", POINTS, [(1.0, 3.0)] * 10)], title="t", x_label="x", y_label="y")):
        text = standalone(chart)
        ElementTree.fromstring(text)
        assert "var(" not in text and "#1f6f78" in text


def test_the_jpeg_axis_goes_from_no_compression_to_the_lowest_quality() -> None:
    def point(share: float) -> dict[str, object]:
        return {"change_type_accuracy": share, "intervals": {"change_type_accuracy": [share, share]}}

    chart = stress_chart("scenes", "jpeg_quality", {"none": point(0.9), "10": point(0.2), "90": point(0.8)})
    ticks = re.findall(r'text-anchor="middle">(none|90|10)</text>', chart)
    assert ticks == ["none", "90", "10"]


def test_smoothing_keeps_a_straight_line_and_thinning_keeps_the_ends() -> None:
    line = [(float(x), 3.0 * x) for x in range(600)]
    assert smooth(line)[300] == pytest.approx(line[300])
    assert thin(line)[0] == line[0] and thin(line)[-1] == line[-1] and len(thin(line)) <= 241


@pytest.mark.parametrize(("value", "expected"), [(0.0, 1.0), (1.1, 1.2), (221.0, 240.0), (100.0, 100.0)])
def test_an_axis_ends_at_a_round_number(value: float, expected: float) -> None:
    assert round_up(value) == pytest.approx(expected)
