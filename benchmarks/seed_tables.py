"""The tables of README.md and docs/results.md: mean figures of the tiny preset, with their range over seeds.

Every table is a function from the figures in docs/seeds.json to Markdown lines. All figures are multiplied by 100, as
papers print caption scores.
"""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.script import table
from onediff.eval.metrics.catalog import BEHAVIOUR, CAPTION_HEADLINES

Figures = Mapping[str, Mapping[str, float]]  # {name: mean, low and high}
# a row of a table: its label, and the name of its figure in each column
Row = tuple[str, Sequence[str]]

BENCHMARKS = {"scenes": "", "scenes_far": ": camera and light move twice as far", "edits": ""}
FLOORS = {"constant": "best constant sentence", "random_train": "random training caption",
          "nearest_train": "caption of the training pair with the nearest pixels"}
PICTURES = {"photograph": "photographs", "generated": "generated pictures", "canvas": "canvases"}


def cell(figures: Figures, name: str) -> str:
    """Return "mean [lowest, highest]" times 100, or only the mean if all seeds agree; nothing without such a figure."""
    if name not in figures:
        return ""
    shown = {key: f"{100 * value:.1f}" for key, value in figures[name].items()}
    return shown["mean"] if shown["low"] == shown["high"] else "{mean} [{low}, {high}]".format(**shown)


def mean(figures: Figures, name: str) -> str:
    return f"{100 * figures[name]['mean']:.1f}" if name in figures else ""


def filled(figures: Figures, title: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table with one cell for each figure; rows without any figure are left out."""
    cells = [[label, *(cell(figures, name) for name in names)] for label, names in rows]
    return table(title, [row for row in cells if any(row[1:])])


def results(figures: Figures) -> list[str]:
    """The table of the README."""
    rows = []
    for benchmark, note in BENCHMARKS.items():
        right = "change_type_accuracy" if benchmark != "edits" else "operation_accuracy"
        rows.append([f"`{benchmark}`, {count(figures, benchmark)} pairs{note}", cell(figures, f"{benchmark}.CIDEr"),
                     mean(figures, f"{benchmark}.floor.constant.CIDEr"), cell(figures, f"{benchmark}.{right}"),
                     cell(figures, f"{benchmark}.changed_object_accuracy"),
                     cell(figures, f"{benchmark}.false_alarm_rate")])
    return table(["benchmark", "CIDEr", "best constant sentence", "kind of change right", "object right",
                  "false alarms"], rows)


def count(figures: Figures, benchmark: str) -> str:
    return f"{figures[f'{benchmark}.num_pairs']['mean']:,.0f}" if f"{benchmark}.num_pairs" in figures else "no"


def scores(figures: Figures) -> list[str]:
    lines: list[str] = []
    for benchmark, note in BENCHMARKS.items():
        floors = [[label, *(mean(figures, f"{benchmark}.floor.{key}.{name}") for name in CAPTION_HEADLINES)]
                  for key, label in FLOORS.items()]
        others = [mean(figures, f"{benchmark}.leave_one_out.{name}") for name in CAPTION_HEADLINES]
        ours = [cell(figures, f"{benchmark}.{name}") for name in CAPTION_HEADLINES]
        lines += [*table([f"`{benchmark}`, {count(figures, benchmark)} pairs{note}", *CAPTION_HEADLINES], [
            ["**OneDiff, tiny**", *ours], *floors, ["one reference against the others", *others]]), ""]
    return lines[:-1]


def behaviour(figures: Figures) -> list[str]:
    rows = [(metric.label, [f"{benchmark}.{name}" for benchmark in BENCHMARKS]) for name, metric in BEHAVIOUR.items()]
    types = keys(figures, "scenes.change_type_accuracy_by_type.")
    rows += [(f"type right, *{kind}*", [f"{benchmark}.change_type_accuracy_by_type.{kind}" for benchmark in BENCHMARKS])
             for kind in types]
    return filled(figures, ["figure", *(f"`{name}`" for name in BENCHMARKS)], rows)


def operations(figures: Figures) -> list[str]:
    """Each operation and each kind of picture of `edits`, with the mean number of pairs."""
    rows = []
    for label, names in [
            *((name, (f"by_picture.{key}.operation_accuracy", "", f"by_picture.{key}.num_pairs", ""))
              for key, name in PICTURES.items()),
            *((f"*{key}*", (f"operation_accuracy_by_operation.{key}", f"swapped_accuracy_by_operation.{key}."
                            "swapped_accuracy", f"by_change_type.{key}.num_pairs",
                            f"swapped_accuracy_by_operation.{key}.num_pairs"))
              for key in keys(figures, "edits.operation_accuracy_by_operation."))]:
        right, swapped, pairs, swapped_pairs = (f"edits.{name}" for name in names)
        rows.append([label, cell(figures, right), pairs_of(figures, pairs), cell(figures, swapped),
                     pairs_of(figures, swapped_pairs)])
    return table(["", "operation right", "pairs", "swapped: way back right", "swapped pairs"], rows)


def pairs_of(figures: Figures, name: str) -> str:
    return f"{figures[name]['mean']:.0f}" if name in figures else ""


def questions(figures: Figures) -> list[str]:
    """Behaviour figures for the default question, for the own question of each record, and for paraphrases."""
    rows = [[f"`{benchmark}`: {metric.label}", cell(figures, f"{benchmark}.{name}"),
             cell(figures, f"{benchmark}.own_question.{name}"), *(
                 mean(figures, f"{benchmark}.paraphrases.{name}.{key}") for key in ("default", "mean", "low", "high"))]
            for benchmark in BENCHMARKS for name, metric in BEHAVIOUR.items()
            if f"{benchmark}.own_question.{name}" in figures]
    return table(["", "default question", "own question", "sample: default question", "sample: paraphrases, mean",
                  "lowest", "highest"], rows)


def stress(figures: Figures) -> list[str]:
    start = "stress.scenes.curves."
    points = dict.fromkeys(tuple(name.removeprefix(start).split(".")[:2]) for name in figures if name.startswith(start))
    names = ("false_alarm_rate", "change_type_accuracy", "changed_object_accuracy")
    ordered = sorted(points, key=lambda point: (point[0], point[1] != "none", point[1] != "none" and float(point[1])))
    rows: list[Row] = [(f"{kind.replace('_', ' ')} {strength}", [
        *(f"{start}{kind}.{strength}.{name}" for name in names),
        f"stress.edits.curves.{kind}.{strength}.operation_accuracy"]) for kind, strength in ordered]
    return filled(figures, ["perturbation", "`scenes`: false alarms", "type right", "object right",
                            "`edits`: operation right"], rows)


def keys(figures: Figures, start: str) -> list[str]:
    """Return the next part of the names that start with `start`, without repetition."""
    return list(dict.fromkeys(name.removeprefix(start).split(".")[0] for name in figures if name.startswith(start)))


# {file name of a page: {name of a block of the page: function that writes its lines}}
BLOCKS: dict[str, dict[str, Callable[[Figures], list[str]]]] = {
    "README.md": {"results": results},
    "results.md": {"scores": scores, "behaviour": behaviour, "operations": operations, "questions": questions,
                   "stress": stress}}
