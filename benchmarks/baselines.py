"""Compares OneDiff with a Siamese CNN under the same conditions, over several seeds; tables in docs/baselines.md.

    python -m benchmarks.baselines             # trains the CNNs that are missing, then writes the tables
    python -m benchmarks.baselines --threads 1

Run `python -m benchmarks.seeds run` before: the CNN of a seed is trained on the training pairs of this seed, and both
systems caption the test pairs of this seed. The CNN starts from random weights and is trained twice: for as many steps
as OneDiff, and for as much processor time. An interrupted run continues with the first CNN that is not finished.

The conditions are the same: the same images with the same nuisance; no system is told which source a pair comes from,
because OneDiff is asked the default question and the CNN takes no question; each step writes the most probable word;
the weights are those with the highest CIDEr on the split `val`; and the same grammars read the captions.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import script, seeds
from benchmarks.outcomes import TEST, WORN, Outcomes, difference, interval, mean_of, outcomes, resampled
from onediff.baselines.siamese_cnn import Architecture, SiameseCaptioner
from onediff.baselines.siamese_training import Pairs, Training, fit
from onediff.config import load_params
from onediff.data.record import Record, read_records, read_table
from onediff.eval.analysis.stress import choose, trials
from onediff.eval.caption_files import read_predictions
from onediff.eval.metrics.ngrams import corpus_cider
from onediff.eval.metrics.words import Predictions
from onediff.files import new_folder, read_json, read_jsonl, write_json, write_jsonl
from onediff.ops.predict import siamese_cnn
from onediff.paths import CAPTIONS, DIFFCAP, PARAMS, STRESS_DETAILS, TRAINED

HOME, TABLE = Path(".onediff/baselines"), Path("docs/baselines.md")
ONEDIFF = "OneDiff, tiny"
CNNS = {"equal_steps": "Siamese CNN, equal steps", "equal_time": "Siamese CNN, equal processor time"}
SOURCES, TESTS = ("scenes", "edits"), "test-*.parquet"
FINISHED, SAID = "training.json", "captions.jsonl"
ARCHITECTURE = Architecture()
TIMED_STEPS = 30  # The processor time of a step of the CNN is measured on this number of steps.


def main(threads: int = 2) -> None:
    """Train the CNNs that are missing for each seed, and write the tables."""
    trained = {int(path.stem): read_json(path) for path in sorted(seeds.HOME.glob("[0-9]*.json"))}
    if not trained:
        raise ValueError(f"{seeds.HOME} must contain at least one trained seed, but has none; "
                         "'python -m benchmarks.seeds run' trains three")
    for seed, result in trained.items():
        for name in CNNS:
            if not (HOME / f"{seed}/{name}" / FINISHED).exists():
                train(seeds.HOME / str(seed), HOME / f"{seed}/{name}", seed=seed, threads=threads,
                      cpu_minutes=result["cpu_minutes"] if name == "equal_time" else None)
    script.write_table(TABLE, [*training_table(trained), "", *score_table(list(trained))])


def train(project: Path, folder: Path, *, seed: int, threads: int, cpu_minutes: float | None) -> None:
    """Train a CNN on the data of a project, and save the CNN and its captions in `folder`.

    The number of steps is that of both phases of OneDiff, or as many as fit into `cpu_minutes` of processor time.
    """
    torch.set_num_threads(threads)
    config = load_params(project / PARAMS)
    pairs, val = (Pairs.read(project / DIFFCAP, split, image_px=ARCHITECTURE.image_px) for split in ("train", "val"))
    steps = sum(phase.steps or 0 for phase in (config.align, config.tune) if phase)
    if cpu_minutes is not None:
        start = time.process_time()
        fit(pairs, ARCHITECTURE, Training(steps=TIMED_STEPS, seed=seed), validate=lambda _: 0.0, log=lambda *_: None)
        steps = max(1, round(60 * cpu_minutes * TIMED_STEPS / (time.process_time() - start)))
    training, curve = Training(steps=steps, batch_size=config.tune.batch_size, seed=seed), dict[int, float]()

    def log(step: int, values: dict[str, float]) -> None:
        if "val" in values:
            curve[step] = values["val"]
            print(f"{folder}: step {step} of {steps}, val CIDEr {values['val']:.3f}", flush=True)

    start, start_s = time.process_time(), time.monotonic()
    captioner = fit(pairs, ARCHITECTURE, training, validate=lambda captioner: val_cider(captioner, val), log=log)
    facts = {"cpu_minutes": (time.process_time() - start) / 60, "minutes": (time.monotonic() - start_s) / 60,
             "num_parameters": sum(value.numel() for value in captioner.model.parameters()), "val": curve,
             "training": asdict(training)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as part:
        captioner.save(part)
        write_jsonl(part / SAID, captioned(siamese_cnn(part), project))
        write_json(part / FINISHED, facts, indent=1)


def val_cider(captioner: SiameseCaptioner, val: Pairs) -> float:
    texts = [text for first in range(0, len(val), 64)
             for text in captioner.caption_pixels(val[range(first, min(first + 64, len(val)))])]
    return corpus_cider({str(number): text for number, text in enumerate(texts)},
                        {str(number): references for number, references in enumerate(val.references)})


def captioned(system: Callable[[Iterator[Record]], Iterator[tuple[Record, str]]],
              project: Path) -> Iterator[dict[str, str]]:
    """Let a system caption the test pairs of a project, and the pairs of the stress trials that are compared."""
    config, records = load_params(project / PARAMS), list(test_records(project))
    scenes = [record for record in records if record.source == "scenes"]
    chosen = set(choose([vars(record) for record in scenes], config.stress.num_pairs, seed=config.seed))
    worn = trials("scenes", [record for record in scenes if record.pair_id in chosen], config.stress, seed=config.seed)
    for trial, pairs in [(TEST, iter(records)), *worn]:
        if trial in (TEST, *WORN.values()):
            for record, text in system(pairs):
                yield {"trial": trial, "pair_id": record.pair_id, "prediction": text}


def test_records(project: Path) -> Iterator[Record]:
    return (record for record in read_records(project / DIFFCAP, TESTS) if record.source in SOURCES)


def captions_of(lines: Sequence[Mapping[str, str]]) -> dict[str, Predictions]:
    """Return {trial: {pair_id: caption}} from the lines of a file."""
    result: dict[str, Predictions] = {}
    for line in lines:
        result.setdefault(line["trial"], {})[line["pair_id"]] = line["prediction"]
    return result


def system_outcomes(seed: int) -> dict[str, dict[str, Outcomes]]:
    """Return {system: {figure: outcomes}} of OneDiff and of both CNNs for one seed."""
    project = seeds.HOME / str(seed)
    rows = [row for row in read_table(project / DIFFCAP, TESTS) if row["source"] in SOURCES]
    ours = {TEST: {key: text for source in SOURCES
                   for key, text in read_predictions(project / CAPTIONS / f"test/{source}.jsonl").items()},
            **captions_of(read_jsonl(project / STRESS_DETAILS / "scenes.jsonl"))}
    return {ONEDIFF: outcomes(ours, rows), **{
        label: outcomes(captions_of(read_jsonl(HOME / f"{seed}/{name}" / SAID)), rows) for name, label in CNNS.items()}}


def score_table(chosen: Sequence[int]) -> list[str]:
    """Return the Markdown lines of the figures of all systems, and of the differences between OneDiff and each CNN.

    Figures are means over the seeds, in percent, with 95 % intervals over groups of pairs and seeds.
    """
    by_seed = [system_outcomes(seed) for seed in chosen]
    figures = list(by_seed[0][ONEDIFF])
    rows: dict[str, list[str]] = {}
    for figure in figures:
        systems = {name: [each[name][figure] for each in by_seed] for name in by_seed[0]}
        means, drawn = {name: mean_of(each) for name, each in systems.items()}, resampled(systems)
        for name, value in means.items():
            low, high = interval(drawn[name])
            rows.setdefault(name, []).append(f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        for name in CNNS.values():
            test = difference(means[ONEDIFF] - means[name], drawn[ONEDIFF], drawn[name])
            rows.setdefault(f"{ONEDIFF} minus {name}", []).append(
                f"{100 * test.value:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}], p {test.p:.4f}")
    return script.table(["", *figures], [[name, *cells] for name, cells in rows.items()])


def training_table(trained: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return the Markdown lines of what was pretrained, and of the mean cost of the training."""
    first = seeds.HOME / str(next(iter(trained)))
    config = load_params(first / PARAMS)
    rows = [[ONEDIFF, "vision tower and language model, on single images and text",
             f"{num_parameters(first / TRAINED) / 1e6:.2f}M",
             f"{sum(phase.steps or 0 for phase in (config.align, config.tune) if phase):,}",
             _mean([result["cpu_minutes"] for result in trained.values()])]]
    for name, label in CNNS.items():
        facts = [read_json(HOME / f"{seed}/{name}" / FINISHED) for seed in trained]
        rows.append([label, "nothing", f"{facts[0]['num_parameters'] / 1e6:.2f}M",
                     f"{sum(each['training']['steps'] for each in facts) / len(facts):,.0f}",
                     _mean([each["cpu_minutes"] for each in facts])])
    return script.table(["system", "pretrained", "parameters", "steps", "processor time of training, minutes"], rows)


def _mean(minutes: Sequence[float]) -> str:
    return f"{sum(minutes) / len(minutes):.1f}"


def num_parameters(model: Path) -> int:
    """Return the number of parameters in the safetensors files of a model folder."""
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


if __name__ == "__main__":
    script.main(main)
