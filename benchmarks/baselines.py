"""Compares the champion with baselines on the test sets of data/diffcap: a Siamese CNN, and trivial baselines.

    python -m benchmarks.baselines                           # trains the CNN if needed; writes docs/baselines.md
    python -m benchmarks.baselines --comparison same_place   # adds a CNN that compares only equal positions

Run `make run` before: it writes data/diffcap, and the captions of the champion in data/captions/test. Without these
captions, the scores of the champion are read from data/metrics.json, and differences are not tested. The CNN is trained
from random weights on the training pairs of all sources with all references. The weights with the highest CIDEr on the
`val` split are kept. A trivial baseline is a source of captions that ignores the images.

The table can also contain variants of the champion: change params.yaml in a clone, run `dvc repro caption`, and copy
data/captions/test to .onediff/baselines/ablations/NAME.
"""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import script
from onediff.data.record import read_table
from onediff.eval.analysis.behaviour import GRAMMARS
from onediff.eval.floors import best_constant, random_captions
from onediff.eval.metrics.catalog import BEHAVIOUR_HEADLINES, CAPTION_HEADLINES
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.metrics.ngrams import corpus_cider
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import PairRow, protocol_of, read_predictions, references_digest
from onediff.eval.resample import compare, intervals
from onediff.files import write_json
from onediff.paths import CAPTIONS, DIFFCAP, METRICS

FLOORS = {"nearest_train": "caption of the training pair with the nearest pixels"}
HOME, TABLE, CHAMPION = Path(".onediff/baselines"), Path("docs/baselines.md"), "OneDiff, the champion"
BENCHMARKS = ("scenes", "scenes_far", "edits")
LABELS = {"change_type_accuracy": "type", "changed_object_accuracy": "object", "false_alarm_rate": "false alarms",
             "swap_consistency": "swap", "operation_accuracy": "operation"}
COMPARISONS = {"matched": "Siamese CNN", "same_place": "Siamese CNN, difference at the same place alone"}

Figures = dict[str, tuple[float, Sequence[float]]]  # maps each metric to the score and the 95 % interval


def main(comparison: str = "matched", steps: int = 3900, threads: int = 2) -> None:
    """Train the Siamese CNN if it does not exist yet, and write the scores of all systems to docs/baselines.md."""
    if not (HOME / comparison / "training.json").exists():
        train(comparison, steps, threads)
    train_rows, test_rows = (read_table(DIFFCAP, f"{split}-*.parquet") for split in ("train", "test"))
    lines = training_table()
    for benchmark in BENCHMARKS:
        source = protocol_of(benchmark).train_source
        captions = [text for row in train_rows if row["source"] == source for text in row["references"]]
        lines += section(benchmark, [row for row in test_rows if row["source"] == benchmark], captions)
    script.write_table(TABLE, lines)


def train(comparison: str, steps: int, threads: int) -> None:
    """Train a Siamese CNN, caption the test sets with it, and save the CNN and the captions in one folder."""
    import torch

    from onediff.baselines.siamese_cnn import Architecture, SiameseCaptioner
    from onediff.baselines.siamese_training import Pairs, Training, fit
    from onediff.ops.predict import siamese_cnn, write_predictions

    torch.set_num_threads(threads)
    architecture, training = Architecture(comparison=comparison), Training(steps=steps)  # type: ignore[arg-type]
    pairs, val = (Pairs.read(DIFFCAP, split, image_px=architecture.image_px) for split in ("train", "val"))
    start, start_cpu = time.monotonic(), time.process_time()
    curve: list[dict[str, float]] = []

    def log(step: int, values: dict[str, float]) -> None:
        curve.append({"step": step, **values})
        if "val" in values or step % 100 == 0:
            loss = sum(line["loss"] for line in curve[-100:]) / len(curve[-100:])
            print(f"step {step}: loss {loss:.3f}" + (f", val CIDEr {values['val']:.3f}" if "val" in values else "")
                  + f", {time.monotonic() - start:.0f} s", flush=True)

    def val_cider(captioner: SiameseCaptioner) -> float:
        captions = [text for first in range(0, len(val), 64)
                    for text in captioner.caption_pixels(val[range(first, min(first + 64, len(val)))])]
        return corpus_cider({str(number): text for number, text in enumerate(captions)},
                     {str(number): texts for number, texts in enumerate(val.references)})

    captioner = fit(pairs, architecture, training, validate=val_cider, log=log)
    facts = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - start_cpu, "threads": threads,
             "num_parameters": sum(value.numel() for value in captioner.model.parameters()), "num_pairs": len(pairs),
             "val": {line["step"]: line["val"] for line in curve if "val" in line}, "training": asdict(training)}
    folder = HOME / comparison
    shutil.rmtree(folder, ignore_errors=True)
    captioner.save(folder)
    for benchmark in BENCHMARKS:
        write_predictions(benchmark, siamese_cnn(folder), folder / f"{benchmark}.jsonl")
    # training.json is written last, because the presence of this file marks the folder as complete.
    write_json(folder / "training.json", facts, indent=1)


def training_table() -> list[str]:
    """Return the lines of a Markdown table with the size and the training time of each trained CNN."""
    lines = ["| CNN | parameters | pairs seen | best val CIDEr, at step | processor time, minutes | in all, minutes |",
             "|---" * 6 + "|"]
    for folder, name in trained_cnns().items():
        facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        step, best = max(facts["val"].items(), key=lambda item: item[1])
        seen = facts["training"]["steps"] * facts["training"]["batch_size"]
        lines.append(f"| {name} | {facts['num_parameters'] / 1e6:.2f}M | {seen:,} | {100 * best:.1f}, {int(step):,} | "
                     f"{facts['cpu_seconds'] / 60:.1f} | {facts['seconds'] / 60:.1f} |")
    return [*lines, ""]


def trained_cnns() -> dict[Path, str]:
    return {HOME / key: name for key, name in COMPARISONS.items() if (HOME / key / "training.json").exists()}


def peers() -> dict[str, Path]:
    """Return a dict from the name of each variant of the champion and of each CNN to the folder of its predictions."""
    return {**{f"OneDiff, {folder.name}": folder for folder in sorted((HOME / "ablations").glob("*"))},
            **{name: folder for folder, name in trained_cnns().items()}}


def section(benchmark: str, rows: Sequence[PairRow], train_captions: list[str]) -> list[str]:
    """Return the Markdown lines of one benchmark: a table with the scores of the champion and of all other systems.

    The last rows of the table are the differences between the champion and each other trained system.
    """
    references = {row["pair_id"]: list(row["references"]) for row in rows}
    groups = [row["group_id"] for row in rows]
    predictions = predictions_by_system(benchmark, references, train_captions)
    scores = {name: score(texts, references) for name, texts in predictions.items()}
    figures = {name: figures_of(benchmark, scores[name], predictions[name], rows) for name in scores}
    if CHAMPION not in predictions:
        figures = {CHAMPION: recorded(benchmark, references)} | figures
    names = [*CAPTION_HEADLINES, *(key for key in BEHAVIOUR_HEADLINES if key in figures[CHAMPION])]
    lines = [f"**{benchmark}** ({len(rows)} pairs in {len(set(groups))} groups)", "",
             _line("", (LABELS.get(key, key) for key in names)), "|---" * (1 + len(names)) + "|"]
    lines += [_line(name, (with_interval(*values[key]) for key in names)) for name, values in figures.items()]
    empty = [""] * (len(names) - len(CAPTION_HEADLINES))
    # The other trivial baselines have no intervals, because data/metrics.json contains scores but no captions of them.
    lines += [_line(FLOORS.get(name, name), [*(f"{100 * values[key]:.1f}" for key in CAPTION_HEADLINES), *empty])
              for name, values in metrics(benchmark)["floor"].items() if name not in ("constant", "random_train")]
    if CHAMPION in predictions:
        lines += [_line(f"champion minus {name}", [*differences(scores, name, groups), *empty]) for name in peers()]
    return [*lines, ""]


def _line(name: str, cells: Iterable[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in (name, *cells))


def predictions_by_system(benchmark: str, references: dict[str, list[str]],
                          train_captions: list[str]) -> dict[str, Predictions]:
    constant, ours = best_constant(train_captions, references), CAPTIONS / f"test/{benchmark}.jsonl"
    return {**({CHAMPION: read_predictions(ours)} if ours.exists() else {}),
            **{name: read_predictions(folder / f"{benchmark}.jsonl") for name, folder in peers().items()},
            f'best constant, "{constant}"': dict.fromkeys(references, constant),
            "random training caption": random_captions(train_captions, references)}


def figures_of(benchmark: str, scores: Scores, predictions: Predictions, rows: Sequence[PairRow]) -> Figures:
    """Return a dict from each metric to the score of one system on one benchmark and the 95 % interval."""
    grammar = GRAMMARS.get(protocol_of(benchmark).grammar)
    shares = grammar.behaviour(predictions, rows) if grammar else {}
    spans = intervals(scores, [row["group_id"] for row in rows])
    return {**{key: (value, spans[key]) for key, value in scores.corpus.items()},
            **{key: (shares[key], shares["intervals"][key]) for key in BEHAVIOUR_HEADLINES if key in shares}}


def recorded(benchmark: str, references: dict[str, list[str]]) -> Figures:
    """Return the scores of the champion on a benchmark from data/metrics.json, which needs no captions.

    Raises ValueError if these scores were computed with references other than `references`.
    """
    result = metrics(benchmark)
    if result["references"] != references_digest(references):
        raise ValueError(f"data/metrics.json: the scores of {benchmark} must belong to the references in {DIFFCAP}, "
                         "but were computed with other references; run 'make run' to compute captions and scores")
    spans = result["score_intervals"] | result["intervals"]
    return {key: (result[key], spans[key]) for key in (*CAPTION_HEADLINES, *BEHAVIOUR_HEADLINES) if key in result}


def metrics(benchmark: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(METRICS.read_text(encoding="utf-8"))[benchmark]
    return table


def differences(scores: dict[str, Scores], peer: str, groups: list[str]) -> list[str]:
    """Return one text for each metric: the score of the champion minus the score of `peer`, its interval and p-value.

    Intervals and p-values are from a paired bootstrap over groups of pairs.
    """
    compared = compare(scores[CHAMPION], scores[peer], groups)
    return [f"{100 * (figure.first - figure.second):+.1f} [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}], "
            f"p {figure.p:.4f}" for figure in (compared[key] for key in CAPTION_HEADLINES)]


def with_interval(value: float, bounds: Sequence[float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(100 * value, *(100 * bound for bound in bounds))


if __name__ == "__main__":
    script.main(main)
