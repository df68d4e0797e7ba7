"""Write the model card of a registered version, in the format of Hugging Face, from the results of the pipeline."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onediff.config import Config, load_params
from onediff.data.folders import sources_of
from onediff.eval.metrics.catalog import BEHAVIOUR_HEADLINES, CAPTION_HEADLINES, HEADLINES
from onediff.files import read_json, write_text

TEMPLATE = Path(__file__).with_name("card.md.j2")
FLOORS = {"constant": "trivial baseline: best constant sentence",
          "random_train": "trivial baseline: random training caption",
          "nearest_train": "trivial baseline: caption of the nearest training pair"}

Tables = Mapping[str, Mapping[str, Any]]  # benchmark -> scores
Labelled = list[tuple[str, str, Mapping[str, Any]]]  # split, benchmark, scores


def write_card(folder: Path, *, root: Path = Path()) -> Path:
    """Write a model card with the current results of the pipeline to FOLDER/README.md, and return the path.

    The card also shows the lineage if FOLDER/lineage exists. Raises FileNotFoundError if one of the results does not
    exist yet.
    """
    from huggingface_hub import ModelCard

    data = root / "data"
    config, card = load_params(root / "params.yaml"), read_json(data / "diffcap/card.json")
    tests, gates, stress = (read_json(data / f"{name}.json") for name in ("metrics", "gate", "stress"))
    scores = [(split, benchmark, table) for split, tables in (("test", tests), ("gate", gates))
              for benchmark, table in tables.items()]
    behaviour = [name for name in BEHAVIOUR_HEADLINES if any(name in table for _, _, table in scores)]
    runs = {phase: read_json(data / "runs" / f"{phase}.json") for phase in ("align", "tune") if getattr(config, phase)}
    lineage = folder / "lineage/lineage.json"
    content = ModelCard.from_template(
        _card_data(scores), template_path=str(TEMPLATE), config=config, data=card, data_rows=_data_rows(card),
        phases=[_phase(config, name, run) for name, run in runs.items()], captions=CAPTION_HEADLINES,
        caption_rows=list(_caption_rows(scores)), behaviour=behaviour,
        behaviour_rows=[
            [split, benchmark, *(_cell(table.get(name), table["intervals"].get(name)) for name in behaviour)]
            for split, benchmark, table in scores if any(name in table for name in behaviour)],
        unchanged=list(_unchanged(scores, stress)), weak=list(_weak(tests)), stress=list(_stress(stress)),
        incomplete=card.get("incomplete", {}),
        protocols=sorted({table["protocol"] for table in tests.values()}),
        generated_only=set(sources_of(config.data)) == set(config.data.generated),
        lineage=read_json(lineage) if lineage.exists() else None).content
    write_text(folder / "README.md", content.rstrip() + "\n")
    return folder / "README.md"


def _card_data(scores: Labelled) -> Any:
    """Return the metadata at the top of the model card. The Hugging Face Hub shows the scores in it as a table."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [EvalResult(task_type="image-to-text", task_name="image difference captioning", dataset_type=benchmark,
                          dataset_name=f"{benchmark}, split {split}", dataset_split=split,
                          metric_type=metric.lower(), metric_name=f"{metric} (times 100)",
                          metric_value=round(100 * table[metric], 2))
               for split, benchmark, table in scores
               for metric in HEADLINES if isinstance(table.get(metric), (int, float))]
    return ModelCardData(language="en", license="other", license_name="that-of-its-data-and-checkpoints",
                         license_link="LICENSE", library_name="onediff", pipeline_tag="image-to-text",
                         tags=["image-difference-captioning", "onediff"], model_name="OneDiff", eval_results=results)


def _data_rows(card: Mapping[str, Any]) -> list[list[str]]:
    """Return one table row for each data source: name, number of pairs per split, description, licence, home page."""
    return [[source, *(f"{sum(card['num_pairs'].get(split, {}).get(source, {}).values()):,}"
                       for split in ("train", "val", "gate", "test")), about["what"], about["licence"], about["home"]]
            for source, about in sorted(card["sources"].items())]


def _phase(config: Config, name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    phase = getattr(config, name)
    rates = {part: getattr(phase, f"lr_{part}") for part in ("vision", "delta", "projector", "language")}
    return {"name": name, "steps": run["steps"], "batch_size": phase.batch_size,
            "mixture": ", ".join(f"{source} {share:g}" for source, share in phase.mixture.items()),
            "rates": ", ".join(f"{part} {rate:g}" for part, rate in rates.items() if rate),
            "minutes": run["seconds"] / 60, "pairs_per_s": run["pairs_per_s"]}


def _caption_rows(scores: Labelled) -> Iterator[list[str]]:
    """Yield table rows of caption scores, times 100: one row for OneDiff, then one for each trivial baseline.

    The columns are split, benchmark, system, number of pairs, and one for each metric.
    """
    for split, benchmark, table in scores:
        yield [split, benchmark, "**OneDiff**", f"{table['num_pairs']:,}",
               *(_cell(table.get(name), table["score_intervals"].get(name)) for name in CAPTION_HEADLINES)]
        for floor, values in table.get("floor", {}).items():
            yield ["", "", FLOORS.get(floor, floor), "", *(_cell(values.get(name)) for name in CAPTION_HEADLINES)]


def _cell(value: Any, bounds: Any = None) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{100 * value:.1f}" + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else "")


def _unchanged(scores: Labelled, stress: Tables) -> Iterator[list[str]]:
    """Yield table rows: benchmark, kind of pairs without a change, and the false-alarm rate with its interval."""
    rows = [(benchmark, f"pairs without a change, split {split}", table) for split, benchmark, table in scores]
    rows += [(benchmark, f"the same image twice, {table['num_pairs']} pairs of split test", table.get("identical", {}))
             for benchmark, table in stress.items()]
    for benchmark, pairs, table in rows:
        if "false_alarm_rate" in table:
            yield [benchmark, pairs, _cell(table["false_alarm_rate"], table["intervals"].get("false_alarm_rate"))]


def _stress(stress: Tables) -> Iterator[list[str]]:
    """Yield one table row for each benchmark and perturbation of the stress test.

    The columns are benchmark, perturbation, the strength at which CIDEr is lowest, then CIDEr and the false-alarm rate,
    each without and with the perturbation of that strength.
    """
    for benchmark, table in stress.items():
        for kind, curve in table.get("curves", {}).items():
            grades = [grade for grade in curve if grade != "none"]
            if grades and "none" in curve:
                worst = min(grades, key=lambda grade: curve[grade]["CIDEr"])
                yield [benchmark, kind.replace("_", " "), worst,
                       *(_cell(curve[grade].get(name)) for name in ("CIDEr", "false_alarm_rate")
                         for grade in ("none", worst))]


def _weak(tests: Tables) -> Iterator[str]:
    """Yield one sentence for each benchmark: which kind of change the captions state correctly least often."""
    for benchmark, table in tests.items():
        kinds = table.get("change_type_accuracy_by_type") or table.get("operation_accuracy_by_operation") or {}
        shares = {kind: share for kind, share in kinds.items() if kind != "none" and isinstance(share, (int, float))}
        if shares:
            worst = min(shares, key=lambda kind: shares[kind])
            yield (f"{benchmark}: weakest on `{worst}`; {100 * shares[worst]:.0f} % of the captions of such pairs "
                   "state the right kind of change (split test)")
