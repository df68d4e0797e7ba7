"""Everything about one model on one page: a single HTML file with its pictures and figures inside, no network."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from onediff.eval.metrics.compute import METRICS
from onediff.eval.protocols import PROTOCOLS
from onediff.eval.report.charts import COLOURS, page_style
from onediff.eval.report.figures import last_loss
from onediff.eval.report.gallery import Album, Example
from onediff.eval.report.published import doubts, published

SPEED = (("pairs_per_s", "rows/s", "{:.0f}"), ("tokens_per_s", "tokens/s", "{:,.0f}"),
         ("padding_share", "padding left out", "{:.1%}"), ("loader_wait_share", "waiting for data", "{:.1%}"),
         ("memory_gib", "memory, GiB", "{:.2f}"), ("tflops_per_s", "TFLOP/s", "{:.3g}"), ("mfu", "MFU", "{:.1%}"))
BEHAVIOUR = {  # key in metrics.json -> (label, what it counts)
    "change_found_rate": ("change found", "changed pairs for which a change is claimed"),
    "change_type_accuracy": ("type right", "changed pairs"),
    "changed_object_accuracy": ("object right", "changed pairs: color and shape"),
    "change_accuracy": ("all right", "changed pairs: type, object and what became of it"),
    "false_alarm_rate": ("false alarms", "unchanged pairs not recognised as unchanged; lower is better"),
    "swap_consistency": ("swap consistency", "pairs whose caption is undone when before and after are exchanged"),
    "operation_accuracy": ("operation right", "all pairs"),
}
HEADLINES = ("change_type_accuracy", "changed_object_accuracy", "false_alarm_rate", "swap_consistency",
             "operation_accuracy")
STRESS = {  # part of stress.json -> (what is shown, {key -> (label, what it counts)})
    "identical": ("One image shown twice", {
        "false_alarm_rate": ("false alarms", "not said that nothing changed; lower is better"),
        "unreadable_rate": ("unreadable", "part of them: captions that the grammar cannot read; lower is better"),
        "same_caption_rate": ("caption stays", "changed pairs captioned word for word as with both images; "
                                               "lower is better")}),
    "unrelated": ("Two images that share nothing", {
        "no_change_rate": ("“nothing changed”", "said all the same; lower is better"),
        "unreadable_rate": ("unreadable", "captions that the grammar cannot read"),
        "same_caption_rate": ("caption stays", "changed pairs captioned word for word as with the right second image; "
                                               "lower is better")}),
    "swapped": ("After shown as before, before as after", {
        "swap_accuracy": ("way back right", "changed pairs: type, object and outcome of the change back"),
        "swap_consistency": ("takes itself back", "changed pairs: the opposite of what is said of the pair, "
                                                  "right or wrong"),
        "false_alarm_rate": ("false alarms", "unchanged pairs; lower is better"),
        "same_caption_rate": ("caption stays", "changed pairs captioned word for word as unswapped; lower is better")}),
}
LANGUAGE = {  # key -> (column, form)
    "words": ("words", "{:.1f}"), "vocabulary": ("different words", "{:,.0f}"),
    "different": ("different captions", "{:.1%}"),
    "distinct_1": ("distinct-1", "{:.3f}"), "distinct_2": ("distinct-2", "{:.3f}"),
    "copied": ("copied from training", "{:.1%}"), "empty": ("empty", "{:.1%}")}
NO_VALUE = "\N{EN DASH}"
AUDIT = {"num_pairs": "test pairs", "equal_image": "equal image", "near_image": "near image",
         "equal_caption": "equal caption", "rare_caption": "of these rare", "near_caption": "near caption",
         "dropped": "training pairs dropped", "lookalikes": "lookalikes in training"}


def render_page(*, when: str, subtitle: str, params: str, metrics: Mapping[str, Any], gate: Mapping[str, Any],
                stress: Mapping[str, Any], curves: Mapping[str, list[dict[str, float]]], card: Mapping[str, Any],
                audit: Mapping[str, Any], albums: Mapping[str, Album], figures: Mapping[str, Markup]) -> str:
    """The page as HTML. `params`: params.yaml as text; `curves`: lines of data/curves by phase; `figures`: those of
    figures.py; others as on disk, stress and audit empty where there are none.
    """
    metrics, gate = ordered(metrics), ordered(gate)
    return _template().render(
        when=when, subtitle=subtitle, params=params, metrics=metrics, gate=gate, card=card, albums=albums,
        names=METRICS, behaviour=BEHAVIOUR, headlines=_headlines(metrics), stress=stress, trials=STRESS,
        peers=_peers(metrics),
        phases={name: _phase(lines) for name, lines in curves.items()}, language=_language(metrics),
        types={name: _type_table(result) for name, result in metrics.items()}, counts=_count_table(card),
        audit=_audit(audit), choices=_choices(albums), colours=COLOURS, chart_style=Markup(page_style()),
        figures_of=lambda start: [chart for name, chart in figures.items() if name.startswith(start)])


@cache
def _template() -> Template:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["words"] = lambda name: name.replace("_", " ")
    return environment.get_template("report.html.j2")


def ordered(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in dict.fromkeys((*PROTOCOLS, *results)) if name in results}


def ordered_sources(sources: Iterable[str]) -> list[str]:
    known = dict.fromkeys(protocol.source for protocol in PROTOCOLS.values())
    given = dict.fromkeys(sources)
    return [source for source in dict.fromkeys((*known, *given)) if source in given]


def _headlines(metrics: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """benchmark -> (label, value) of the figures that the top of the page shows."""
    return {benchmark: [*((BEHAVIOUR[key][0], f"{100 * result[key]:.1f} %") for key in HEADLINES if key in result),
                        ("CIDEr", f"{100 * result['CIDEr']:.1f}")]
            for benchmark, result in metrics.items() if benchmark != "scenes_far"}


def _peers(metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What others published of the same benchmark by the same protocol; none beside a part of the test split."""
    return {key: [row | {"doubts": doubts(row)} for row in published(key)] for key, result in metrics.items()
            if "incomplete" not in result}


def _type_table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per change type: its pairs, the share that is right, CIDEr and ROUGE-L."""
    right = result.get("change_type_accuracy_by_type") or result.get("operation_accuracy_by_operation") or {}
    if "false_alarm_rate" in result:
        right = {**right, "none": 1 - result["false_alarm_rate"]}
    return [{"type": kind, "right": right.get(kind), **values} for kind, values in result["by_change_type"].items()]


def _language(metrics: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Columns, and the cells of each source: the protocols of one share its captions."""
    told = {protocol_name.split("/")[0]: result["language"] for protocol_name, result in metrics.items()
            if "language" in result}
    return [column for column, _ in LANGUAGE.values()], {
        source: [form.format(its[key]) if key in its else NO_VALUE for key, (_, form) in LANGUAGE.items()]
        for source, its in told.items()}


def _count_table(card: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """(source, {split: pairs})."""
    table: dict[str, dict[str, int]] = {}
    for split, sources in card["num_pairs"].items():
        for source, kinds in sources.items():
            table.setdefault(source, {})[split] = sum(kinds.values())
    return list(table.items())


def _audit(audit: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
    """Columns, and the counts and the verdict of each benchmark, as far as the file has them."""
    found = audit.get("benchmarks", {})
    keys = [key for key in AUDIT if any(key in its for its in found.values())]
    return ["verdict", *(AUDIT[key] for key in keys)], {
        name: [its.get("verdict", NO_VALUE), *(its.get(key, NO_VALUE) for key in keys)] for name, its in found.items()}


def _choices(albums: Mapping[str, Album]) -> dict[str, list[str]]:
    """What the gallery can be filtered by."""
    pairs: list[Example] = [pair for album in albums.values() for pair in (*album.shown, *album.worst, *album.lost)]
    return {"benchmark": list(dict.fromkeys(pair.source for pair in pairs)),
            "type": sorted({pair.change_type for pair in pairs}),
            "outcome": ["right", "wrong"] if any(pair.checks for pair in pairs) else [],
            "lost": ["lost"] if any(album.lost for album in albums.values()) else []}


def _phase(lines: list[dict[str, float]]) -> dict[str, Any]:
    """Length and throughput of one phase."""
    return {"steps": int(max((line["step"] for line in lines if line.get("loss") is not None), default=0)),
            "loss": last_loss(lines),
            "seconds": max((line["seconds"] for line in lines if "seconds" in line), default=None),
            "speed": [(said, form.format(statistics.median(values))) for key, said, form in SPEED
                      if (values := [line[key] for line in lines if key in line])]}
