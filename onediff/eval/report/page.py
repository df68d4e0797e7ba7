"""Everything about one model on one page: a single HTML file that contains its pictures and figures."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from onediff.eval.metrics.catalog import BEHAVIOUR, BEHAVIOUR_HEADLINES, METRICS
from onediff.eval.protocols import PROTOCOLS
from onediff.eval.report.charts import COLOURS, page_style
from onediff.eval.report.figures import last_loss
from onediff.eval.report.gallery import Album, Example
from onediff.eval.report.peers import doubts, published

SPEED = (("pairs_per_s", "rows/s", "{:.0f}"), ("tokens_per_s", "tokens/s", "{:,.0f}"),
         ("padding_share", "padding left out", "{:.1%}"), ("loader_wait_share", "waiting for data", "{:.1%}"),
         ("memory_gib", "memory, GiB", "{:.2f}"), ("tflops_per_s", "TFLOP/s", "{:.3g}"), ("mfu", "MFU", "{:.1%}"))
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


@dataclass(frozen=True)
class ModelResults:
    """What the stages before wrote about a model, as on disk; `stress` and `audit` are empty where there are none.

    `params`: params.yaml as text; `curves`: the lines of data/curves by phase.
    """

    when: str
    subtitle: str
    params: str
    metrics: Mapping[str, Any]
    gate: Mapping[str, Any]
    stress: Mapping[str, Any]
    curves: Mapping[str, list[dict[str, float]]]
    card: Mapping[str, Any]
    audit: Mapping[str, Any]


def render_page(results: ModelResults, albums: Mapping[str, Album], figures: Mapping[str, Markup]) -> str:
    """The page as HTML. `figures`: those of figures.py."""
    metrics, audit = ordered(results.metrics), results.audit.get("benchmarks", {})
    audited = [key for key in AUDIT if any(key in counts for counts in audit.values())]
    language = {benchmark.split("/")[0]: result["language"] for benchmark, result in metrics.items()
                if "language" in result}  # the protocols of one source share its captions
    return _template().render(
        **vars(results) | {
            "metrics": metrics, "gate": ordered(results.gate),
            "audit": (["verdict", *(AUDIT[key] for key in audited)], {
                name: [counts.get(key, NO_VALUE) for key in ("verdict", *audited)] for name, counts in audit.items()})},
        albums=albums, names=METRICS, trials=STRESS,
        behaviour={name: (metric.label, metric.counts + ("" if metric.higher_is_better else "; lower is better"))
                   for name, metric in BEHAVIOUR.items()},
        headlines={benchmark: [*((BEHAVIOUR[key].label, f"{100 * result[key]:.1f} %") for key in BEHAVIOUR_HEADLINES
                                 if key in result), ("CIDEr", f"{100 * result['CIDEr']:.1f}")]
                   for benchmark, result in metrics.items() if benchmark != "scenes_far"},
        # Others' numbers by the same protocol; none beside a part of the test split.
        peers={key: [row | {"doubts": doubts(row)} for row in published(key)] for key, result in metrics.items()
               if "incomplete" not in result},
        phases={name: _phase(lines) for name, lines in results.curves.items()},
        language=([column for column, _ in LANGUAGE.values()], {
            source: [form.format(values[key]) if key in values else NO_VALUE for key, (_, form) in LANGUAGE.items()]
            for source, values in language.items()}),
        types={name: _type_table(result) for name, result in metrics.items()}, counts=_count_table(results.card),
        choices=_choices(albums), colours=COLOURS, chart_style=Markup(page_style()),
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
    present = dict.fromkeys(sources)
    known = (protocol.source for protocol in PROTOCOLS.values())
    return [source for source in dict.fromkeys((*known, *present)) if source in present]


def _type_table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per change type: its pairs, the share that is right, CIDEr and ROUGE-L."""
    right = result.get("change_type_accuracy_by_type") or result.get("operation_accuracy_by_operation") or {}
    if "false_alarm_rate" in result:
        right = {**right, "none": 1 - result["false_alarm_rate"]}
    return [{"type": kind, "right": right.get(kind), **values} for kind, values in result["by_change_type"].items()]


def _count_table(card: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """(source, {split: pairs})."""
    counts = card["num_pairs"].items()
    return [(source, {split: sum(sources[source].values()) for split, sources in counts if source in sources})
            for source in dict.fromkeys(source for _, sources in counts for source in sources)]


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
            "speed": [(label, form.format(statistics.median(values))) for key, label, form in SPEED
                      if (values := [line[key] for line in lines if key in line])]}
