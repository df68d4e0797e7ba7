"""Build the report: a single HTML file about one model, which contains all images and charts that it shows."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from onediff.eval.metrics.catalog import BEHAVIOUR, BEHAVIOUR_HEADLINES, METRICS
from onediff.eval.protocols import PROTOCOLS
from onediff.eval.report.charts import COLOURS, page_style
from onediff.eval.report.figures import FLOORS, last_loss
from onediff.eval.report.gallery import Album, Example
from onediff.eval.report.peers import doubts, published
from onediff.eval.unscored import unscored

NUM_FIRST = 3  # number of pairs of each source that the gallery shows before the reader opens the rest
NUM_SENTENCES = 3  # largest number of benchmarks that the summary of the report mentions
SCORE_COLUMNS = ("CIDEr", *(name for name in METRICS if name != "CIDEr"))  # narrow screens show the first column only
SOURCES = {  # source (dataset) -> description of its pairs
    "scenes": "rendered table tops; camera and light move a little in every pair, changed or not",
    "scenes_far": "rendered table tops as in scenes, but camera and light move twice as far; used for tests only",
    "edits": "a picture, and the same picture after a programmed edit"}
PHASES = {"align": "Coupled Sample Training", "tune": "multi-task instruction tuning"}
SPEED = (("pairs_per_s", "pairs per second", "{:.0f}"), ("tokens_per_s", "tokens per second", "{:,.0f}"),
         ("padding_share", "padding avoided", "{:.1%}"), ("loader_wait_share", "time spent waiting for data", "{:.1%}"),
         ("memory_gib", "memory, GiB", "{:.2f}"), ("tflops_per_s", "TFLOP/s", "{:.3g}"), ("mfu", "MFU", "{:.1%}"))
STRESS = {  # section of stress.json -> (heading, {key of a share -> (label, what the share counts)})
    "identical": ("One image is shown twice", {
        "false_alarm_rate": ("false alarms", "captions that claim a change although the two images are equal; "
                                             "lower is better"),
        "unreadable_rate": ("unreadable", "captions that the grammar cannot parse, which also count as false alarms; "
                                          "lower is better"),
        "same_caption_rate": ("caption unchanged", "changed pairs that get exactly the caption of the normal pair; "
                                                   "lower is better")}),
    "unrelated": ("The second image is from another, unrelated pair", {
        "no_change_rate": ("“nothing changed”", "captions that claim that nothing changed; lower is better"),
        "unreadable_rate": ("unreadable", "captions that the grammar cannot parse"),
        "same_caption_rate": ("caption unchanged", "changed pairs that get exactly the caption of the normal pair; "
                                                   "lower is better")}),
    "swapped": ("The two images are swapped", {
        "swap_accuracy": ("inverse change right", "changed pairs for which type, object and result of the inverse "
                                                  "change are right"),
        "swap_consistency": ("swap consistency", "changed pairs for which the caption of the swapped pair is the "
                                                 "inverse of the normal caption, whether that is right or wrong"),
        "false_alarm_rate": ("false alarms", "unchanged pairs for which a change is claimed; lower is better"),
        "same_caption_rate": ("caption unchanged", "changed pairs that get exactly the caption of the normal pair; "
                                                   "lower is better")}),
}
LANGUAGE = {  # key -> (column, format)
    "words": ("words per caption", "{:.1f}"), "vocabulary": ("different words", "{:,.0f}"),
    "different": ("different captions", "{:.1%}"),
    "distinct_1": ("distinct-1", "{:.3f}"), "distinct_2": ("distinct-2", "{:.3f}"),
    "copied": ("copied from training", "{:.1%}"), "empty": ("empty", "{:.1%}")}
NO_VALUE = "\N{EN DASH}"
AUDIT = {  # key of data/reports/diffcap/audit.json -> label of the row in the table
    "verdict": "verdict", "num_pairs": "test pairs",
    "equal_image": "test pairs with an image that is also a training image",
    "near_image": "test pairs with an image that is nearly equal to a training image",
    "equal_caption": "test pairs with a caption that is also a training caption",
    "rare_caption": "test pairs with such a caption that is also rare, which suggests a leak",
    "near_caption": "test pairs with a rare caption that is nearly equal to a training caption",
    "dropped": "training pairs removed because of a leak",
    "lookalikes": "test pairs with a similar-looking training image, which is normal for generated pairs"}


@dataclass(frozen=True)
class ModelResults:
    """The results of one model, from the files that the earlier DVC stages wrote.

    `when` and `subtitle` are shown under the title of the report. `params` is the text of params.yaml. `metrics` has
    the scores on the test split, `gate` the scores on the `gate` split. `curves` maps a training phase to the lines of
    its curve file. `card` describes the training data. `stress` and `audit` are empty if these stages did not run.
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
    """Return the report as the text of an HTML file.

    `albums` maps a source (dataset) to the pairs that the gallery shows; `figures` are the charts that
    `figures.figures` returns.
    """
    metrics = ordered(results.metrics)
    phases = {name: _phase(lines) for name, lines in results.curves.items()}
    return _template().render(
        **vars(results) | {"metrics": metrics, "gate": ordered(results.gate), "audit": _audit_table(results.audit)},
        summary=summary(metrics, results.card, phases), albums=albums, names=SCORE_COLUMNS, trials=STRESS,
        sources=SOURCES, phase_names=PHASES, first_pairs=first_pairs, ordered_sources=ordered_sources,
        behaviour={name: (metric.label, metric.counts + ("" if metric.higher_is_better else "; lower is better"))
                   for name, metric in BEHAVIOUR.items()},
        headlines={benchmark: _headlines(result) for benchmark, result in metrics.items() if benchmark != "scenes_far"},
        # Published scores are comparable only if our score uses the same protocol and our test split is complete.
        peers={key: [row | {"doubts": doubts(row)} for row in published(key)] for key, result in metrics.items()
               if "incomplete" not in result},
        phases=phases, language=_language_table(metrics), counts=_count_table(results.card),
        unscored=unscored(results.card),
        types={name: _type_table(result) for name, result in metrics.items()}, floors=FLOORS,
        questions={name: table for name, result in metrics.items() if (table := _question_table(result))},
        parts={name: parts for name, result in metrics.items() if (parts := _part_table(result))},
        choices=_choices(albums), colours=COLOURS, chart_style=Markup(page_style()),
        figures_of=lambda start: [chart for name, chart in figures.items() if name.startswith(start)])


@cache
def _template() -> Template:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["thousands"] = "{:,}".format
    return environment.get_template("report.html.j2")


def ordered(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of all benchmarks in the order of PROTOCOLS; benchmarks that PROTOCOLS lacks come last."""
    return {name: results[name] for name in dict.fromkeys((*PROTOCOLS, *results)) if name in results}


def ordered_sources(sources: Iterable[str]) -> list[str]:
    """Return the distinct sources in the order of PROTOCOLS; sources that PROTOCOLS lacks come last."""
    present = dict.fromkeys(sources)
    known = (protocol.source for protocol in PROTOCOLS.values())
    return [source for source in dict.fromkeys((*known, *present)) if source in present]


def summary(metrics: Mapping[str, Any], card: Mapping[str, Any], phases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the sentences that open the report: what the model does, how it was trained, and how well it performs."""
    counts = {source: sum(types.values()) for source, types in card["num_pairs"].get("train", {}).items()}
    train = sorted(counts.items(), key=lambda item: -item[1])
    sentences = ["This model reads two images and describes in one sentence what changed between them."]
    if train:
        sentences.append(f"It was trained on {_listed([f'{count:,} pairs of {name}' for name, count in train])}"
                         + _training_steps(phases) + ".")
    reported = [(name, result) for name, result in metrics.items() if name != "scenes_far"][:NUM_SENTENCES]
    return [*sentences, *(f"On {result['num_pairs']:,} test pairs of {name}, it {_achievement(result)}."
                          for name, result in reported)]


def _training_steps(phases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a text with the number of steps of each training phase, such as ", in one phase: ...".

    The text is empty if no training step was recorded.
    """
    steps = [f"{name} ({phase['steps']:,} steps)" for name, phase in phases.items() if phase["steps"]]
    return f", in {len(steps)} {'phase' if len(steps) == 1 else 'phases'}: {_listed(steps)}" if steps else ""


def _achievement(result: Mapping[str, Any]) -> str:
    """Return the part of a sentence that tells how well the model performs on one benchmark, in plain words."""
    if "change_type_accuracy" in result:
        alarms = f" and claims a change for {100 * result['false_alarm_rate']:.1f} % of the unchanged pairs" \
            if "false_alarm_rate" in result else ""
        return f"names the right kind of change for {100 * result['change_type_accuracy']:.1f} % of the changed pairs" \
            + alarms
    if "operation_accuracy" in result:
        return f"names the right edit for {100 * result['operation_accuracy']:.1f} % of the pairs"
    best = _best_baseline(result)
    return f"scores {100 * result['CIDEr']:.1f} CIDEr" + (
        "" if best is None else f"; the best captions that need no understanding of the images score {100 * best:.1f}")


def _listed(texts: Sequence[str]) -> str:
    """Join texts to a list for use in a sentence, such as "a, b and c"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def _best_baseline(result: Mapping[str, Any]) -> float | None:
    """Return the highest CIDEr of the trivial baselines, or None if no trivial baseline was scored."""
    return max((result["floor"][name]["CIDEr"] for name in FLOORS if name in result["floor"]), default=None)


def _headlines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the main figures of a benchmark, each as (label, value as text, explanation)."""
    shares = [(BEHAVIOUR[key].label, f"{100 * result[key]:.1f} %", BEHAVIOUR[key].counts)
              for key in BEHAVIOUR_HEADLINES if key in result]
    best = _best_baseline(result)
    return [*shares, ("CIDEr", f"{100 * result['CIDEr']:.1f}",
                      "" if best is None else f"best trivial baseline: {100 * best:.1f}")]


def first_pairs(pairs: Sequence[Example]) -> list[Example]:
    """Return the pairs that the gallery shows first, with different change types if possible.

    At least one of them has a wrong caption, if any of the `pairs` has one.
    """
    by_type: dict[str, Example] = {}
    for pair in pairs:
        by_type.setdefault(pair.change_type, pair)
    chosen = [*by_type.values(), *(pair for pair in pairs if pair not in by_type.values())][:NUM_FIRST]
    wrong = [pair for pair in pairs if not pair.right]
    return [*chosen[:NUM_FIRST - 1], wrong[0]] if wrong and all(pair.right for pair in chosen) else chosen


def _audit_table(audit: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the table of the leak audit as (benchmarks, rows). A row is (label, one value for each benchmark)."""
    benchmarks = ordered(audit.get("benchmarks", {}))

    def cell(value: int | str) -> str:
        return value if isinstance(value, str) else f"{value:,}"

    return list(benchmarks), [(label, [cell(counts.get(key, NO_VALUE)) for counts in benchmarks.values()])
                              for key, label in AUDIT.items() if any(key in counts for counts in benchmarks.values())]


def _language_table(metrics: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the table of language figures as (column headings, {source: cells of its row})."""
    # All benchmarks of a source score the same captions, so each source has only one row.
    language = {benchmark.split("/")[0]: result["language"] for benchmark, result in metrics.items()
                if "language" in result}
    return [column for column, _ in LANGUAGE.values()], {
        source: [_formatted(values[key], form) if key in values else NO_VALUE for key, (_, form) in LANGUAGE.items()]
        for source, values in language.items()}


def _formatted(value: float, form: str) -> str:
    """Format a number, with a space before a percent sign, as in all numbers of the page."""
    return form.format(value).replace("%", " %")


def _type_table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one table row for each change type: number of pairs, share of right captions, mean CIDEr and ROUGE-L."""
    right = result.get("change_type_accuracy_by_type") or result.get("operation_accuracy_by_operation") or {}
    if "no_change_accuracy" in result:
        right = {**right, "none": result["no_change_accuracy"]}
    return [{"type": kind, "right": right.get(kind), **values} for kind, values in result["by_change_type"].items()]


def _question_table(result: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
    """Return one table row for each behaviour figure that was measured with several questions: (label, values).

    The values are those of the default question and of the own question of each record, on all pairs; then, on a sample
    of pairs, that of the default question, and mean, lowest and highest value of the paraphrases.
    """
    own, spread = result.get("own_question", {}), result.get("paraphrases", {})
    return [(metric.label, [result.get(name), own[name],
                            *(spread.get(name, {}).get(key) for key in ("default", "mean", "low", "high"))])
            for name, metric in BEHAVIOUR.items() if name in own]


def _part_table(result: Mapping[str, Any]) -> list[tuple[str, str, int, float]]:
    """Return one table row for each kind of picture and each operation that leads back, which only edits have.

    A row is (group of rows, label, number of pairs, share of right captions).
    """
    return [(group, label, part["num_pairs"], part[figure])
            for group, key, figure in (("picture", "by_picture", "operation_accuracy"),
                                       ("way back", "swapped_accuracy_by_operation", "swapped_accuracy"))
            for label, part in result.get(key, {}).items()]


def _count_table(card: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """Return the number of pairs of each source in each split, as (source, {split: number of pairs})."""
    counts = card["num_pairs"].items()
    return [(source, {split: sum(sources[source].values()) for split, sources in counts if source in sources})
            for source in ordered_sources(source for _, sources in counts for source in sources)]


def _choices(albums: Mapping[str, Album]) -> dict[str, list[str]]:
    """Return the filters of the gallery, as {name of the filter: values that the reader can choose}."""
    pairs: list[Example] = [pair for album in albums.values() for pair in (*album.shown, *album.worst, *album.lost)]
    return {"source": list(dict.fromkeys(pair.source for pair in pairs)),
            "type": sorted({pair.change_type for pair in pairs}),
            "outcome": ["right", "wrong"] if any(pair.checks for pair in pairs) else [],
            "lost": ["lost"] if any(album.lost for album in albums.values()) else []}


def _phase(lines: list[dict[str, float]]) -> dict[str, Any]:
    """Return facts about one training phase: number of steps, seconds, last loss, and median speed figures."""
    # Steps are numbered from 0, so the number of steps is one more than the number of the last step.
    return {"steps": int(max((line["step"] for line in lines if line.get("loss") is not None), default=-1)) + 1,
            "loss": last_loss(lines),
            "seconds": max((line["seconds"] for line in lines if "seconds" in line), default=None),
            "speed": [(label, _formatted(statistics.median(values), form)) for key, label, form in SPEED
                      if (values := [line[key] for line in lines if key in line])]}
