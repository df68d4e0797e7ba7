"""The model card of a version, in Hugging Face's format: written from the pipeline's own files, by no hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onediff.config import Config, Phase, load_params
from onediff.data.folders import sources_of
from onediff.eval.metrics.catalog import BEHAVIOUR_HEADLINES, CAPTION_HEADLINES, HEADLINES

TEMPLATE = Path(__file__).with_name("card.md.j2")
FLOORS = {"constant": "floor: best constant sentence", "random_train": "floor: random training caption",
          "nearest_train": "floor: caption of the nearest training pair"}
PHASES = ("align", "tune")

Scores = Mapping[str, Mapping[str, Any]]


def write_card(folder: Path, *, root: Path = Path()) -> Path:
    """Writes folder/README.md about the pipeline's present results, with the ids of folder/lineage if it is there; its
    path.

    Raises FileNotFoundError for results that 'dvc repro' has not made yet.
    """
    from huggingface_hub import ModelCard

    data = root / "data"
    config, card = load_params(root / "params.yaml"), _read(data / "diffcap/card.json")
    scores = {"test": _read(data / "metrics.json"), "gate": _read(data / "gate.json")}
    stress = _read(data / "stress.json")
    runs = {phase: _read(data / "runs" / f"{phase}.json") for phase in PHASES if getattr(config, phase)}
    lineage = folder / "lineage/lineage.json"
    made = ModelCard.from_template(
        _card_data(scores), template_path=str(TEMPLATE), config=config, data=card, data_rows=_data_rows(card),
        phases=_phases(config, runs), captions=CAPTION_HEADLINES, caption_rows=list(_caption_rows(scores)),
        behaviour=_behaviour(scores), behaviour_rows=list(_behaviour_rows(scores)),
        unchanged=list(_unchanged(scores, stress)), weak=list(_weak(scores["test"])), stress=list(_stress(stress)),
        incomplete=card.get("incomplete", {}),
        protocols=sorted({its["protocol"] for its in scores["test"].values()}),
        generated_only=set(sources_of(config.data)) == set(config.data.generated),
        lineage=_read(lineage) if lineage.exists() else None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(made.content.rstrip() + "\n", encoding="utf-8")
    return folder / "README.md"


def _card_data(scores: Mapping[str, Scores]) -> Any:
    """The front matter, whose model-index a hub shows as a table of results."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [EvalResult(task_type="image-to-text", task_name="image difference captioning", dataset_type=benchmark,
                          dataset_name=f"{benchmark}, split {split}", dataset_split=split,
                          metric_type=metric.lower(), metric_name=f"{metric} (times 100)",
                          metric_value=round(100 * its[metric], 2))
               for split, benchmark, its in _each(scores)
               for metric in HEADLINES if isinstance(its.get(metric), (int, float))]
    return ModelCardData(language="en", license="other", license_name="that-of-its-data-and-checkpoints",
                         license_link="LICENSE", library_name="onediff", pipeline_tag="image-to-text",
                         tags=["image-difference-captioning", "onediff"], model_name="OneDiff", eval_results=results)


def _data_rows(card: Mapping[str, Any]) -> list[list[str]]:
    """One row per source: pairs of each split, what, licence, home."""
    rows = []
    for source, about in sorted(card["sources"].items()):
        counts = [f"{sum(card['num_pairs'].get(split, {}).get(source, {}).values()):,}"
                  for split in ("train", "val", "gate", "test")]
        rows.append([source, *counts, about["what"], about["licence"], about["home"]])
    return rows


def _phases(config: Config, runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name, run in runs.items():
        phase: Phase = getattr(config, name)
        rates = {part: getattr(phase, f"lr_{part}") for part in ("vision", "delta", "projector", "language")}
        found.append({"name": name, "steps": run["steps"], "batch_size": phase.batch_size,
                      "mixture": ", ".join(f"{source} {share:g}" for source, share in phase.mixture.items()),
                      "rates": ", ".join(f"{part} {rate:g}" for part, rate in rates.items() if rate),
                      "minutes": run["seconds"] / 60, "pairs_per_s": run["pairs_per_s"]})
    return found


# --- scores, times 100 as papers print them --------------------------------------------------------------------------


def _each(scores: Mapping[str, Scores]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    return ((split, benchmark, its) for split, benchmarks in scores.items() for benchmark, its in benchmarks.items())


def _caption_rows(scores: Mapping[str, Scores]) -> Iterator[list[str]]:
    """Split, benchmark, who, number of pairs, then a cell per metric; the floors below each benchmark."""
    for split, benchmark, its in _each(scores):
        yield [split, benchmark, "**OneDiff**", f"{its['num_pairs']:,}",
               *(_cell(its.get(name), its["score_intervals"].get(name)) for name in CAPTION_HEADLINES)]
        for floor, values in its.get("floor", {}).items():
            yield ["", "", FLOORS.get(floor, floor), "", *(_cell(values.get(name)) for name in CAPTION_HEADLINES)]


def _behaviour(scores: Mapping[str, Scores]) -> list[str]:
    """The figures of behaviour that any benchmark has."""
    return [name for name in BEHAVIOUR_HEADLINES if any(name in its for _, _, its in _each(scores))]


def _behaviour_rows(scores: Mapping[str, Scores]) -> Iterator[list[str]]:
    """Split, benchmark, then a cell for each figure that any benchmark has."""
    shown = _behaviour(scores)
    for split, benchmark, its in _each(scores):
        if any(name in its for name in shown):
            yield [split, benchmark, *(_cell(its.get(name), its["intervals"].get(name)) for name in shown)]


def _cell(value: Any, bounds: Any = None) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{100 * value:.1f}" + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else "")


def _unchanged(scores: Mapping[str, Scores], stress: Scores) -> Iterator[list[str]]:
    """How often it reports a change where there is none: benchmark, on what, rate with interval."""
    for split, benchmark, its in _each(scores):
        if "false_alarm_rate" in its:
            yield [benchmark, f"pairs without a change, split {split}",
                   _cell(its["false_alarm_rate"], its["intervals"].get("false_alarm_rate"))]
    for benchmark, its in stress.items():
        same = its.get("identical", {})
        if "false_alarm_rate" in same:
            yield [benchmark, f"the same image twice, {its['num_pairs']} pairs of split test",
                   _cell(same["false_alarm_rate"], same["intervals"].get("false_alarm_rate"))]


def _stress(stress: Scores) -> Iterator[list[str]]:
    """Benchmark, disturbance, its strongest grade, then CIDEr and false alarms without it and with it."""
    for benchmark, its in stress.items():
        for kind, curve in its.get("curves", {}).items():
            grades = [grade for grade in curve if grade != "none"]
            if not grades or "none" not in curve:
                continue
            worst = min(grades, key=lambda grade: curve[grade]["CIDEr"])
            yield [benchmark, kind.replace("_", " "), worst,
                   *(_cell(curve[grade].get(name)) for name in ("CIDEr", "false_alarm_rate")
                     for grade in ("none", worst))]


def _weak(scores: Scores) -> Iterator[str]:
    """The kind of change that it gets right least often, of each benchmark that tells."""
    for benchmark, its in scores.items():
        kinds = its.get("change_type_accuracy_by_type") or its.get("operation_accuracy_by_operation") or {}
        told = {kind: share for kind, share in kinds.items() if kind != "none" and isinstance(share, (int, float))}
        if told:
            kind = min(told, key=lambda key: told[key])
            yield (f"{benchmark}: worst on `{kind}`: it names this change in {100 * told[kind]:.0f} % of such pairs of "
                   "split test")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: the model card tells of it; 'dvc repro' makes it") from None
