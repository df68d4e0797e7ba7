"""Draw charts as self-contained SVG: curves with bands for their intervals, and horizontal bars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from markupsafe import Markup

Point = tuple[float, float]
Interval = tuple[float, float]

TEXT_CLASS = "label"  # CSS class of labels and values in charts
COLOURS = {  # name -> (colour of the light mode, colour of the dark mode)
    "ground": ("#fbfbf9", "#14171a"), "panel": ("#ffffff", "#1c2024"), "ink": ("#1d2228", "#e7e9ea"),
    "soft": ("#5d6771", "#a3adb6"), "line": ("#e2e4e0", "#343b42"), "accent": ("#1f6f78", "#5cc0c8"),
    "good": ("#23773b", "#6fcf87"), "bad": ("#b3372f", "#f08a80"), "second": ("#8a5a00", "#e3ac4e"),
    "floor": ("#868f98", "#76808a"), "peer": ("#6f8db8", "#6a8ab3"),
}
_STYLE = Template("""\
svg.chart { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; font-size: 12px; }
svg.chart text { fill: $soft; } svg.chart .title { fill: $ink; font-weight: 600; font-size: 13px; }
svg.chart .$text_class { fill: $ink; } svg.chart .grid { stroke: $line; } svg.chart .axis { stroke: $floor; }
svg.chart .marked { stroke: $soft; stroke-dasharray: 2 3; }
svg.chart .a { stroke: $accent; fill: $accent; } svg.chart .b { stroke: $second; fill: $second; }
svg.chart .c { stroke: $bad; fill: $bad; } svg.chart .d { stroke: $soft; fill: $soft; }
svg.chart polyline[class] { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg.chart polygon[class] { stroke: none; opacity: .16; }
svg.chart polyline.b { stroke-dasharray: 7 3; } svg.chart polyline.c { stroke-dasharray: 2 3; }
svg.chart polyline.faint[class] { stroke-width: 1.2; stroke: $accent; opacity: .3; }
svg.chart .ours { fill: $accent; } svg.chart .floor { fill: $floor; } svg.chart .peer { fill: $peer; }
svg.chart .doubtful { fill: none; stroke: $peer; stroke-width: 1.5; stroke-dasharray: 4 3; }
svg.chart .whisker { stroke: $ink; stroke-width: 1.5; }
""")
WIDTH_PX, LEFT, RIGHT = 400, 40, 14
PLOT_PX, ROW_PX = 150, 34


@dataclass(frozen=True)
class Curve:
    """A curve of a line chart.

    `points` are (x, y), sorted by x. `intervals` has the (low, high) interval of y for each point, or is empty. `kind`
    is the CSS class that selects the colour and the dashes of the curve: a, b, c, d or faint.
    """

    label: str
    kind: str
    points: Sequence[Point]
    intervals: Sequence[Interval] = ()


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart.

    `kind` is the CSS class that selects the colour: ours (this model), floor (a trivial baseline), peer (a published
    score) or doubtful (a published score that is not clearly comparable). `note` is printed in italics after the label.
    """

    label: str
    kind: str
    value: float
    interval: Interval | None = None
    note: str = ""


def page_style() -> str:
    """Return the CSS rules of all charts, for an HTML page that defines COLOURS as CSS custom properties."""
    return _STYLE.substitute({name: f"var(--{name})" for name in COLOURS}, text_class=TEXT_CLASS)


def standalone(chart: Markup) -> str:
    """Return the text of an SVG file of the chart, with light colours on a white background.

    The file contains the colour values themselves, because LaTeX and office programs do not understand CSS custom
    properties.
    """
    style = _STYLE.substitute({name: light for name, (light, _) in COLOURS.items()}, text_class=TEXT_CLASS)
    head, rest = chart.split(">", 1)
    return f'{head}><style>{style}</style><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'


def line_chart(curves: Sequence[Curve], *, title: str, x_label: str, y_label: str,
               ticks: Sequence[tuple[float, str]] | None = None, high: float | None = None,
               marked: float | None = None) -> Markup:
    """Draw a line chart of the curves that have points, and return it as SVG.

    The y axis goes from 0 to `high`; by default, `high` is a round number not below the largest y. `ticks` are the
    labels of the x axis as (x, text); by default, the smallest and the largest x are labelled. `marked` is the x
    position of a vertical dotted line.
    """
    curves = [curve for curve in curves if curve.points]
    xs = [x for curve in curves for x, _ in curve.points]
    first, last = min(xs), max(xs)
    legend = _legend([curve for curve in curves if curve.kind != "faint"])
    top = 50 + (20 if legend else 0)
    bottom = top + PLOT_PX
    high = high or round_up(max(y for curve in curves for _, y in curve.points))

    def to_pixels(point: Point) -> Point:
        share = (point[0] - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH_PX - LEFT - RIGHT), bottom - min(point[1], high) / high * PLOT_PX

    parts = [*legend, f'<text x="{LEFT - 34}" y="{top - 10}">{escape(y_label)}</text>']
    for quarter in range(5):
        y = top + PLOT_PX * (1 - quarter / 4)
        parts.append(f'<line class="{"grid" if quarter else "axis"}" x1="{LEFT}" x2="{WIDTH_PX - RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                     f'{high * quarter / 4:.3g}</text>')
    if marked is not None:
        x = to_pixels((marked, 0))[0]
        parts.append(f'<line class="marked" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
    for x, text in ticks or [(x, f"{x:g}") for x in dict.fromkeys((first, last))]:
        x_px = to_pixels((x, 0))[0]
        parts.append(f'<text x="{x_px:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
    middle = (LEFT + WIDTH_PX - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>')
    for curve in curves:
        parts += _drawn(curve.kind, [to_pixels(point) for point in curve.points],
                        [(to_pixels((x, low))[1], to_pixels((x, up))[1]) for (x, _), (low, up)
                         in zip(curve.points, curve.intervals, strict=bool(curve.intervals))])
    return _svg(title, _curves_in_words(curves, x_label), bottom + 44, parts)


def _curves_in_words(curves: Sequence[Curve], x_label: str) -> str:
    """Return the first and the last y value of each curve as a text for screen readers."""
    return "; ".join(f"{curve.label} from {curve.points[0][1]:.3g} to {curve.points[-1][1]:.3g}" for curve in curves
                     if curve.kind != "faint") + f", over {x_label}"


def _legend(curves: Sequence[Curve]) -> list[str]:
    """Return the SVG elements of the legend, or an empty list for a single curve, which needs no legend."""
    parts, x = [], LEFT - 34
    for curve in curves if len(curves) > 1 else ():
        parts += _drawn(curve.kind, [(x, 34), (x + 24, 34)], [])
        parts.append(f'<text class="{TEXT_CLASS}" x="{x + 30}" y="38">{escape(curve.label)}</text>')
        x += 48 + round(6.4 * len(curve.label))
    return parts


def _drawn(kind: str, points: Sequence[Point], bands: Sequence[Interval]) -> list[str]:
    """Return the SVG elements of a curve. The points and the bands of intervals are given in pixels.

    A curve of at most 30 points also gets a dot at each point; the shape of the dot depends on `kind`.
    """
    parts = []
    if bands:
        edge = [*((x, up) for (x, _), (_, up) in zip(points, bands, strict=True)),
                *((x, low) for (x, _), (low, _) in zip(points[::-1], bands[::-1], strict=True))]
        parts.append(f'<polygon class="band {kind}" points="{_path(edge)}"/>')
    parts.append(f'<polyline class="{kind}" points="{_path(points)}"/>')
    if len(points) <= 30 and kind != "faint":
        parts += [_dot(kind, x, y) for x, y in points]
    return parts


def _dot(kind: str, x: float, y: float) -> str:
    shapes = {"b": f'<rect class="b" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>',
              "c": f'<path class="c" d="M{x:.1f},{y - 4:.1f}l4,7h-8z"/>'}
    return shapes.get(kind, f'<circle class="{kind}" r="3" cx="{x:.1f}" cy="{y:.1f}"/>')


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def bar_chart(bars: Sequence[Bar], *, title: str, x_label: str, high: float | None = None) -> Markup:
    """Draw a chart of horizontal bars, and return it as SVG.

    The label of a bar is above the bar, and the value is at the end of the bar. The x axis goes from 0 to `high`; by
    default, `high` is a round number not below the largest value or interval end.
    """
    high = high or round_up(max(max(bar.value, *(bar.interval or (0.0,))) for bar in bars))
    left, width = 6, WIDTH_PX - 6 - 52
    bottom = 34 + ROW_PX * len(bars)
    parts = []
    for quarter in range(5):
        x = left + width * quarter / 4
        kind, anchor = ("grid", "middle") if quarter else ("axis", "start")
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="30" y2="{bottom}"/>'
                     f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{high * quarter / 4:.3g}</text>')
    for row, bar in enumerate(bars):
        y, length = 34 + ROW_PX * row, min(bar.value, high) / high * width
        ends = [left + min(end, high) / high * width for end in bar.interval or ()]
        note = f' <tspan font-style="italic">{escape(bar.note)}</tspan>' if bar.note else ""
        style = f'class="{TEXT_CLASS}"' + (' font-weight="600"' if bar.kind == "ours" else "")
        parts.append(f'<text {style} x="{left + 3}" y="{y + 11}">{escape(bar.label)}{note}</text>'
                     f'<rect class="{bar.kind}" x="{left}" y="{y + 16}" width="{length:.1f}" height="11" rx="2"/>'
                     f'<text {style} x="{max(left + length, *ends, 0) + 6:.1f}" y="{y + 26}">{bar.value:.1f}</text>')
        if ends:
            parts.append(f'<path class="whisker" fill="none" d="M{ends[0]:.1f},{y + 21.5}H{ends[1]:.1f}'
                         f'M{ends[0]:.1f},{y + 18}v7M{ends[1]:.1f},{y + 18}v7"/>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 33}" text-anchor="middle">{escape(x_label)}</text>')
    in_words = "; ".join(f"{bar.label} {bar.value:.1f}" for bar in bars)
    return _svg(title, f"{in_words}; {x_label}", bottom + 42, parts)


def round_up(value: float) -> float:
    """Return the smallest round number that is not below the value, or 1.0 if the value is not positive and finite.

    The round numbers are 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8 and 10 times a power of ten. An axis is divided into four
    equal parts, and a quarter of these numbers has few digits.
    """
    if value <= 0 or not math.isfinite(value):
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10)
    return scale * next(step for step in steps if value <= step * scale * (1 + 1e-9))


def _svg(title: str, in_words: str, height: float, parts: Sequence[str]) -> Markup:
    """Return the SVG element of a chart with a visible title. Screen readers read the title and `in_words`."""
    name = escape(title)
    return Markup(f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH_PX} {height:g}" '
                  f'role="img" aria-label="{name}: {escape(in_words)}"><text class="title" x="6" y="16">{name}</text>'
                  f'{"".join(parts)}</svg>')
