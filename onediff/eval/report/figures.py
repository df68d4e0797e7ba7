"""Draw the charts of the report: CIDEr of this model and of other systems, stress test, attention, and training.

Stage `report` shows these charts on the page and also writes each of them as an SVG file.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from onediff.eval.report.charts import Bar, Curve, Interval, Point, bar_chart, line_chart
from onediff.eval.report.peers import doubts, published

MAX_POINTS = 240  # largest number of points that are drawn of a training curve
TIMES_100 = "CIDEr times 100"
NUISANCES = {  # perturbation of the stress test -> (title of the chart, label of the x axis)
    "jpeg_quality": ("JPEG compression of both images", "JPEG quality"),
    "noise": ("noise on both images", "standard deviation, grey levels (0 to 255)"),
    "shift_percent": ("shift of the second image", "shift, % of the image side"),
    "scale_percent": ("enlargement of the second image", "enlargement, %"),
    "brightness_percent": ("brightness of the second image", "change of brightness, %")}
CURVES = {"change_type_accuracy": ("type right", "a"), "operation_accuracy": ("operation right", "a"),
          "changed_object_accuracy": ("object right", "b"), "false_alarm_rate": ("false alarms", "c")}
FLOORS = {"constant": "best constant sentence", "random_train": "random training caption",
          "nearest_train": "caption of the nearest training pair"}
INSIDE = {"inside_share": ("attention of the delta tokens", "ours"),
          "difference_inside_share": ("pixel differences", "floor"),
          "area_share": ("uniform attention", "floor")}
POINTING = {"pointing_accuracy": ("patch with the most attention", "ours"),
            "difference_pointing_accuracy": ("patch with the largest pixel difference", "floor"),
            "centre_pointing_accuracy": ("centre of the image", "floor"),
            "pointing_ceiling": ("best possible patch (upper bound)", "floor")}


def figures(metrics: Mapping[str, Any], stress: Mapping[str, Any],
            curves: Mapping[str, list[dict[str, float]]]) -> dict[str, Markup]:
    """Return all charts of the report as {name: chart}; a chart without numbers is left out.

    The names are cider/<benchmark>, stress/<benchmark>/<perturbation>, attention/<benchmark>/inside,
    attention/<benchmark>/pointing, train/<phase>/loss and train/<phase>/val.
    """
    charts = {f"cider/{key}": cider_chart(key, result) for key, result in metrics.items()}
    for benchmark, result in stress.items():
        charts |= {f"stress/{benchmark}/{nuisance}": stress_chart(benchmark, nuisance, curve)
                   for nuisance, curve in result["curves"].items()}
        charts |= attention_charts(benchmark, result.get("attention", {}))
    for phase, lines in curves.items():
        charts |= training_charts(phase, lines)
    return charts


def cider_chart(key: str, result: Mapping[str, Any]) -> Markup:
    """Return the bar chart of CIDEr on one benchmark: this model, the trivial baselines, and published scores.

    Published scores are shown only if our test split is complete, because otherwise they are not comparable.
    """
    bars = [Bar("this model", "ours", 100 * result["CIDEr"], _percent(result["score_intervals"]["CIDEr"]))]
    bars += [Bar(label, "floor", 100 * result["floor"][floor]["CIDEr"]) for floor, label in FLOORS.items()
             if floor in result["floor"]]
    if result["leave_one_out"]:
        bars.append(Bar("one reference against the other references", "floor", 100 * result["leave_one_out"]["CIDEr"]))
    for row in published(key) if "incomplete" not in result else ():
        doubt = doubts(row)
        kind = "floor" if row.get("floor") else "doubtful" if doubt else "peer"
        bars.append(Bar(row["system"], kind, float(row["CIDEr"]), note=doubt or "published"))
    bars.sort(key=lambda bar: -bar.value)
    return bar_chart(bars, title=f"{key}: CIDEr", x_label=TIMES_100)


def stress_chart(benchmark: str, nuisance: str, curve: Mapping[str, Any]) -> Markup:
    """Return the line chart of the stress test for one perturbation. The x axis is the strength of the perturbation.

    `curve` maps each strength to figures. The lines are the figures of CURVES, as % of pairs; if no grammar can parse
    the captions of the benchmark, the line is CIDEr.
    """
    title, x_label = NUISANCES.get(nuisance, (nuisance, "strength"))
    none = "none" if nuisance == "jpeg_quality" else "0"
    points = sorted((_position(nuisance, strength), none if strength == "none" else
                     strength.replace("-", "\N{MINUS SIGN}"), point) for strength, point in curve.items())
    drawn = {key: style for key, style in CURVES.items() if all(key in point for _, _, point in points)}
    lines = [Curve(label, kind, [(x, 100 * point[key]) for x, _, point in points],
                   [_percent(point["intervals"][key]) for _, _, point in points])
             for key, (label, kind) in (drawn or {"CIDEr": ("CIDEr", "a")}).items()]
    single = f"{lines[0].label}, " if len(lines) == 1 else ""
    return line_chart(lines, title=f"{benchmark}: {title}", x_label=x_label, high=100 if drawn else None,
                      y_label=f"{single}% of pairs" if drawn else TIMES_100,
                      ticks=[(x, text) for x, text, _ in points], marked=_position(nuisance, "none"))


def _position(nuisance: str, strength: str) -> float:
    """Return the x coordinate of a strength of a perturbation in the chart.

    Low JPEG quality is far right, because it is the strongest compression.
    """
    if strength == "none":
        return 0.0
    return 100 - float(strength) if nuisance == "jpeg_quality" else float(strength)


def attention_charts(benchmark: str, attention: Mapping[str, Any]) -> dict[str, Markup]:
    """Return two bar charts of the attention of the delta tokens, or no charts if the attention was not measured.

    The chart `inside` shows which share of the attention falls on the changed region. The chart `pointing` shows how
    often the centre of the patch with the most attention lies in the changed region.
    """
    if not attention:
        return {}
    shown = {"inside": (INSIDE, f"{benchmark}: attention inside the changed region", "% of the image's attention"),
             "pointing": (POINTING, f"{benchmark}: pointing at the changed region", "% of images")}
    return {f"attention/{benchmark}/{name}": bar_chart(
        [Bar(label, kind, 100 * attention[key], _percent(attention["intervals"][key]))
         for key, (label, kind) in parts.items()], title=title, x_label=x_label)
            for name, (parts, title, x_label) in shown.items()}


def _percent(bounds: Sequence[float]) -> Interval:
    return 100 * bounds[0], 100 * bounds[1]


def training_charts(phase: str, lines: list[dict[str, float]]) -> dict[str, Markup]:
    """Return the charts of a training phase: the loss, and CIDEr on the `val` split if it was measured."""
    steps, val = series(lines, "loss"), series(lines, "val_CIDEr")
    charts = {}
    if steps:
        losses = [Curve("each step", "faint", thin(steps)), Curve("moving average", "a", thin(smooth(steps)))]
        charts[f"train/{phase}/loss"] = line_chart(losses, title=f"{phase}: loss", x_label="step", y_label="loss")
    if val:
        charts[f"train/{phase}/val"] = line_chart([Curve("CIDEr", "a", [(x, 100 * y) for x, y in val])],
                                                  title=f"{phase}: CIDEr on val", x_label="step", y_label=TIMES_100)
    return charts


def last_loss(lines: Iterable[dict[str, float]]) -> float | None:
    """Return the mean loss of the last training steps, or None if no step has a loss."""
    steps = series(lines, "loss")
    return smooth(steps)[-1][1] if steps else None


def series(lines: Iterable[dict[str, float]], key: str) -> list[Point]:
    """Return the values of `key` in the lines of a curve file as (step, value), sorted by step.

    A resumed training run may have written a step twice; then the later line is used.
    """
    return sorted({line["step"]: line[key] for line in lines if line.get(key) is not None}.items())


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the moving average of the points over a window of about one thirtieth of all points.

    At both ends of the curve, the window is shorter.
    """
    reach = len(points) // 60
    return [(x, statistics.fmean(y for _, y in points[max(0, k - reach):k + reach + 1]))
            for k, (x, _) in enumerate(points)]


def thin(points: Sequence[Point]) -> list[Point]:
    """Return evenly spaced points of a curve, at most about MAX_POINTS, with the first and the last point."""
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    return [*points[:-1:step], *points[-1:]]
