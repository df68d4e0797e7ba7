"""Peers of the champion on the test sets of data/diffcap: a Siamese CNN trained on the same pairs, and the floors.

    python -m benchmarks.baselines                                 # trains the CNN unless it is there, then the table
    python -m benchmarks.baselines train --comparison same_place   # one that compares the same place alone; a row more
    python -m benchmarks.baselines table                           # docs/baselines.md, from what is there

The CNN sees the training pairs of all sources, every reference, nothing pretrained; what it says best of `val` by CIDEr
is kept. `make run` must have come before: data/diffcap, and the champion's captions in data/captions/test; without
these its figures are those of data/metrics.json, and no difference is tested. Ablations of the champion at its full
length are rows, too: change params.yaml in a clone, `dvc repro caption`, and put its data/captions/test under the name
.onediff/baselines/ablations/<what was changed>.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from onediff.data.record import read_table
from onediff.eval.analysis.behaviour import GRAMMARS
from onediff.eval.floors import best_constant, random_captions
from onediff.eval.metrics.catalog import BEHAVIOUR_HEADLINES as BEHAVIOUR
from onediff.eval.metrics.catalog import CAPTION_HEADLINES as METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.metrics.ngrams import corpus_cider
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import PairRow, protocol_of, read_predictions, references_digest
from onediff.eval.resample import compare, intervals
from onediff.paths import DIFFCAP

if TYPE_CHECKING:
    from onediff.baselines.siamese_cnn import SiameseCaptioner

FLOORS = {"nearest_train": "caption of the training pair with the nearest pixels"}
HOME, TABLE, CHAMPION = Path(".onediff/baselines"), Path("docs/baselines.md"), "OneDiff, the champion"
BENCHMARKS = ("scenes", "scenes_far", "edits")
LABELS = {"change_type_accuracy": "type", "changed_object_accuracy": "object", "false_alarm_rate": "false alarms",
             "swap_consistency": "swap", "operation_accuracy": "operation"}
COMPARISONS = {"matched": "Siamese CNN", "same_place": "Siamese CNN, difference at the same place alone"}

Measures = dict[str, tuple[float, Sequence[float]]]

app = typer.Typer(add_completion=False, help=__doc__)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        if not (HOME / "matched/training.json").exists():
            train()
        table()


@app.command()
def train(comparison: str = "matched", steps: int = 3900, threads: int = 2) -> None:
    """Trains a CNN and captions the test sets with it."""
    import torch

    from onediff.baselines.siamese_cnn import Architecture
    from onediff.baselines.siamese_training import Pairs, Training, fit

    torch.set_num_threads(threads)
    architecture, training = Architecture(comparison=comparison), Training(steps=steps)  # type: ignore[arg-type]
    pairs, val = (Pairs.read(DIFFCAP, split, image_px=architecture.image_px) for split in ("train", "val"))
    began, worked = time.monotonic(), time.process_time()
    curve: list[dict[str, float]] = []

    def log(step: int, told: dict[str, float]) -> None:
        curve.append({"step": step, **told})
        if "val" in told or step % 100 == 0:
            loss = sum(line["loss"] for line in curve[-100:]) / len(curve[-100:])
            print(f"step {step}: loss {loss:.3f}" + (f", val CIDEr {told['val']:.3f}" if "val" in told else "")
                  + f", {time.monotonic() - began:.0f} s", flush=True)

    def judge(captioner: SiameseCaptioner) -> float:
        said = [text for start in range(0, len(val), 64)
                for text in captioner.caption_pixels(val[range(start, min(start + 64, len(val)))])]
        keys = [str(number) for number in range(len(val))]
        return corpus_cider(dict(zip(keys, said, strict=True)), dict(zip(keys, val.references, strict=True)))

    captioner = fit(pairs, architecture, training, judge=judge, log=log)
    facts = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - worked, "threads": threads,
             "num_parameters": sum(value.numel() for value in captioner.model.parameters()), "num_pairs": len(pairs),
             "val": {line["step"]: line["val"] for line in curve if "val" in line}, "training": asdict(training)}
    folder = HOME / comparison
    shutil.rmtree(folder, ignore_errors=True)
    captioner.save(folder)
    caption(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")  # last: it is whole


def caption(folder: Path) -> None:
    from onediff.ops.predict import siamese_cnn, write_predictions

    for benchmark in BENCHMARKS:
        write_predictions(benchmark, siamese_cnn(folder), folder / f"{benchmark}.jsonl")


@app.command()
def table() -> None:
    """docs/baselines.md, and on the screen: every system beside the others, with 95 % intervals."""
    captions = read_table(DIFFCAP, "train-*.parquet")
    test = read_table(DIFFCAP, "test-*.parquet")
    lines = trained()
    for benchmark in BENCHMARKS:
        rows = [row for row in test if row["source"] == benchmark]
        source = protocol_of(benchmark).train_source
        lines += section(benchmark, rows, [text for row in captions if row["source"] == source
                                           for text in row["references"]])
    print("\n".join(lines))
    head = TABLE.read_text(encoding="utf-8").split("<!-- table -->")[0] if TABLE.exists() else ""
    TABLE.write_text(f"{head}<!-- table -->\n" + "\n".join(lines) + "\n", encoding="utf-8")


def trained() -> list[str]:
    """What each CNN is and took."""
    lines = ["| CNN | parameters | pairs seen | best val CIDEr, at step | processor time, minutes | in all, minutes |",
             "|---" * 6 + "|"]
    for folder in folders():
        facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        step, best = max(facts["val"].items(), key=lambda item: item[1])
        seen = facts["training"]["steps"] * facts["training"]["batch_size"]
        lines.append(f"| {COMPARISONS[folder.name]} | {facts['num_parameters'] / 1e6:.2f}M | {seen:,} | "
                     f"{100 * best:.1f}, {int(step):,} | {facts['cpu_seconds'] / 60:.1f} | "
                     f"{facts['seconds'] / 60:.1f} |")
    return [*lines, ""]


def folders() -> list[Path]:
    return [HOME / name for name in COMPARISONS if (HOME / name / "training.json").exists()]


def peers() -> dict[str, Path]:
    """Name -> folder of what it says about each benchmark: the champion's ablations, and the CNNs."""
    return {**{f"OneDiff, {folder.name}": folder for folder in sorted((HOME / "ablations").glob("*"))},
            **{COMPARISONS[folder.name]: folder for folder in folders()}}


def section(benchmark: str, rows: Sequence[PairRow], train_captions: list[str]) -> list[str]:
    """The table of one benchmark, and whether the champion is better than each peer."""
    references = {row["pair_id"]: list(row["references"]) for row in rows}
    groups = [row["group_id"] for row in rows]
    said = systems(benchmark, references, train_captions)
    scores = {name: score(texts, references) for name, texts in said.items()}
    measured = {name: measures(benchmark, scores[name], said[name], rows) for name in scores}
    if CHAMPION not in said:
        measured = {CHAMPION: recorded(benchmark, references)} | measured
    names = [*METRICS, *(key for key in BEHAVIOUR if key in measured[CHAMPION])]
    lines = [f"**{benchmark}** ({len(rows)} pairs in {len(set(groups))} groups)", "",
             "| | " + " | ".join(LABELS.get(key, key) for key in names) + " |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {name} | " + " | ".join(with_interval(*found[key]) for key in names) + " |"
              for name, found in measured.items()]
    empty = " |" * (len(names) - len(METRICS))
    lines += [line + empty for line in other_floors(benchmark)]
    if CHAMPION in said:
        lines += [difference(scores, name, groups) + empty for name in peers()]
    return [*lines, ""]


def systems(benchmark: str, references: dict[str, list[str]], train_captions: list[str]) -> dict[str, Predictions]:
    constant, ours = best_constant(train_captions, references), Path(f"data/captions/test/{benchmark}.jsonl")
    return {**({CHAMPION: read_predictions(ours)} if ours.exists() else {}),
            **{name: read_predictions(folder / f"{benchmark}.jsonl") for name, folder in peers().items()},
            f'best constant, "{constant}"': dict.fromkeys(references, constant),
            "random training caption": random_captions(train_captions, references)}


def measures(benchmark: str, scores: Scores, said: Predictions, rows: Sequence[PairRow]) -> Measures:
    """Each figure and its 95 % interval."""
    grammar = GRAMMARS.get(protocol_of(benchmark).grammar)
    shares = grammar.behaviour(said, rows) if grammar else {}
    spans = intervals(scores, [row["group_id"] for row in rows])
    return {**{key: (value, spans[key]) for key, value in scores.corpus.items()},
            **{key: (shares[key], shares["intervals"][key]) for key in BEHAVIOUR if key in shares}}


def recorded(benchmark: str, references: dict[str, list[str]]) -> Measures:
    """The champion's figures as data/metrics.json has them, where its captions are no longer there."""
    result = metrics(benchmark)
    if result["references"] != references_digest(references):
        raise ValueError(f"data/metrics.json: scores of {benchmark} are of other references than those in {DIFFCAP}, "
                         "and data/captions holds no captions to score again: 'make run' makes all of them")
    spans = result["score_intervals"] | result["intervals"]
    return {key: (result[key], spans[key]) for key in (*METRICS, *BEHAVIOUR) if key in result}


def metrics(benchmark: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("data/metrics.json").read_text(encoding="utf-8"))
    return found[benchmark]


def other_floors(benchmark: str) -> list[str]:
    """What else data/metrics.json holds as a floor, such as the nearest training pair's caption; without intervals."""
    return [f"| {FLOORS.get(name, name)} | " + " | ".join(f"{100 * found[key]:.1f}" for key in METRICS) + " |"
            for name, found in metrics(benchmark)["floor"].items() if name not in ("constant", "random_train")]


def difference(scores: dict[str, Scores], peer: str, groups: list[str]) -> str:
    """The champion less a peer by paired bootstrap, p in brackets."""
    cells = []
    for found in (compare(scores[CHAMPION], scores[peer], groups)[key] for key in METRICS):
        span = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        cells.append(f"{100 * (found.first - found.second):+.1f} {span}, p {found.p:.4f}")
    return f"| champion less {peer} | " + " | ".join(cells) + " |"


def with_interval(value: float, bounds: Sequence[float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(100 * value, *(100 * bound for bound in bounds))


if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.baselines: {error}")
