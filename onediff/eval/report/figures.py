"""The figures of a model: CIDEr beside floors and peers, robustness, where it looks, training. Also as files."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from onediff.eval.report.charts import Bar, Curve, Interval, Point, bar_chart, line_chart
from onediff.eval.report.peers import doubts, published

MAX_POINTS = 240  # of a curve
TIMES_100 = "CIDEr times 100"
NUISANCES = {  # -> (title, x axis)
    "jpeg_quality": ("JPEG compression of both images", "JPEG quality"),
    "noise": ("noise on both images", "standard deviation, grey levels of 255"),
    "shift_percent": ("shift of the second image", "shift, % of the side"),
    "scale_percent": ("enlargement of the second image", "enlargement, %"),
    "brightness_percent": ("brightness of the second image", "change of brightness, %")}
CURVES = {"change_type_accuracy": ("type right", "a"), "operation_accuracy": ("operation right", "a"),
          "changed_object_accuracy": ("object right", "b"), "false_alarm_rate": ("false alarms", "c")}
FLOORS = {"constant": "best constant sentence", "random_train": "random training caption",
          "nearest_train": "caption of the nearest training pair"}
INSIDE = {"inside_share": ("attention of the delta tokens", "ours"),
          "difference_inside_share": ("pixel differences", "floor"),
          "area_share": ("looking everywhere alike", "floor")}
POINTING = {"pointing_accuracy": ("patch looked at most", "ours"),
            "difference_pointing_accuracy": ("patch that differs most", "floor"),
            "centre_pointing_accuracy": ("middle of the image", "floor"),
            "pointing_ceiling": ("any patch (most that can be reached)", "floor")}


def figures(metrics: Mapping[str, Any], stress: Mapping[str, Any],
            curves: Mapping[str, list[dict[str, float]]]) -> dict[str, Markup]:
    """Name -> chart: cider/<benchmark>, stress/<benchmark>/<nuisance>, attention/<benchmark>/<what> and
    train/<phase>/<what>. What has no numbers is left out.
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
    """The model beside floors and, where its test split is whole, beside what others published by the same protocol."""
    bars = [Bar("this model", "ours", 100 * result["CIDEr"], _percent(result["score_intervals"]["CIDEr"]))]
    bars += [Bar(label, "floor", 100 * result["floor"][floor]["CIDEr"]) for floor, label in FLOORS.items()
             if floor in result["floor"]]
    if result["leave_one_out"]:
        bars.append(Bar("one reference against the others", "floor", 100 * result["leave_one_out"]["CIDEr"]))
    for row in published(key) if "incomplete" not in result else ():
        doubt = doubts(row)
        kind = "floor" if row.get("floor") else "doubtful" if doubt else "peer"
        bars.append(Bar(row["system"], kind, float(row["CIDEr"]), note=doubt or "published"))
    bars.sort(key=lambda bar: -bar.value)
    return bar_chart(bars, title=f"{key}: CIDEr", x_label=TIMES_100)


def stress_chart(benchmark: str, nuisance: str, curve: Mapping[str, Any]) -> Markup:
    """Shares under a nuisance of growing strength; CIDEr alone where no grammar reads the captions."""
    title, x_label = NUISANCES.get(nuisance, (nuisance, "strength"))
    none = "none" if nuisance == "jpeg_quality" else "0"
    points = sorted((_place(nuisance, strength), none if strength == "none" else
                     strength.replace("-", "\N{MINUS SIGN}"), point) for strength, point in curve.items())
    drawn = {key: style for key, style in CURVES.items() if all(key in point for _, _, point in points)}
    lines = [Curve(label, kind, [(x, 100 * point[key]) for x, _, point in points],
                   [_percent(point["intervals"][key]) for _, _, point in points])
             for key, (label, kind) in (drawn or {"CIDEr": ("CIDEr", "a")}).items()]
    single = f"{lines[0].label}, " if len(lines) == 1 else ""
    return line_chart(lines, title=f"{benchmark}: {title}", x_label=x_label, high=100 if drawn else None,
                      y_label=f"{single}% of pairs" if drawn else TIMES_100,
                      ticks=[(x, text) for x, text, _ in points], marked=_place(nuisance, "none"))


def _place(nuisance: str, strength: str) -> float:
    """x of a strength: the better a JPEG, the nearer to none at all."""
    if strength == "none":
        return 0.0
    return 100 - float(strength) if nuisance == "jpeg_quality" else float(strength)


def attention_charts(benchmark: str, attention: Mapping[str, Any]) -> dict[str, Markup]:
    """How much of the attention meets the changed region, and how often its highest patch does."""
    if not attention:
        return {}
    shown = {"inside": (INSIDE, f"{benchmark}: share inside the changed region", "% of what falls on the image"),
             "pointing": (POINTING, f"{benchmark}: middle lies in the changed region", "% of images")}
    return {f"attention/{benchmark}/{name}": bar_chart(
        [Bar(label, kind, 100 * attention[key], _percent(attention["intervals"][key]))
         for key, (label, kind) in parts.items()], title=title, x_label=x_label)
            for name, (parts, title, x_label) in shown.items()}


def _percent(bounds: Sequence[float]) -> Interval:
    return 100 * bounds[0], 100 * bounds[1]


# --- training ---------------------------------------------------------------------------------------------------------


def training_charts(phase: str, lines: list[dict[str, float]]) -> dict[str, Markup]:
    steps, val = series(lines, "loss"), series(lines, "val_CIDEr")
    charts = {}
    if steps:
        losses = [Curve("each step", "faint", thin(steps)), Curve("mean of steps nearby", "a", thin(smooth(steps)))]
        charts[f"train/{phase}/loss"] = line_chart(losses, title=f"{phase}: loss", x_label="step", y_label="loss")
    if val:
        charts[f"train/{phase}/val"] = line_chart([Curve("CIDEr", "a", [(x, 100 * y) for x, y in val])],
                                                  title=f"{phase}: CIDEr on val", x_label="step", y_label=TIMES_100)
    return charts


def last_loss(lines: Iterable[dict[str, float]]) -> float | None:
    """Mean of the last steps; None without any."""
    steps = series(lines, "loss")
    return smooth(steps)[-1][1] if steps else None


def series(lines: Iterable[dict[str, float]], key: str) -> list[Point]:
    """(step, value), one per step: a resumed run may have written a step twice, and the last one counts."""
    return sorted({line["step"]: line[key] for line in lines if line.get(key) is not None}.items())


def smooth(points: Sequence[Point]) -> list[Point]:
    """Mean over the points nearby, a thirtieth of the curve in all; as wide as the ends allow."""
    reach = len(points) // 60
    return [(x, statistics.fmean(y for _, y in points[max(0, k - reach):k + reach + 1]))
            for k, (x, _) in enumerate(points)]


def thin(points: Sequence[Point]) -> list[Point]:
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    return [*points[:-1:step], *points[-1:]]


# --- numbers of others ------------------------------------------------------------------------------------------------
