"""Ablations: how much each part of the model, the training and the data contributes; one table.

    python -m benchmarks.ablations run --seeds 3 --jobs 2   # train and score the variants whose results are missing
    python -m benchmarks.ablations table                    # write docs/ablations.md from the results

Every variant trains both phases of presets/tiny.yaml with fewer steps and fewer pairs, and captions the same test pairs
of `scenes` and `edits` with the default question. A variant changes parameters, or replaces a part of the model by one
that does nothing. The seed determines initial weights and batches; the data are the same for all seeds. `--jobs 2`
trains two variants at a time, each on one thread. An interrupted run continues with the runs that are not finished.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks import script
from benchmarks.baselines import captions_of
from benchmarks.outcomes import TEST, WORN, mean_of, outcomes
from onediff.config import Config, Runtime, load_params
from onediff.data.record import Record, read_records, write_shards
from onediff.data.synthesis.edits.records import edit_records
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.analysis.behaviour import GRAMMARS
from onediff.eval.analysis.stress import choose, trials
from onediff.eval.caption import caption_records
from onediff.files import key_of, new_folder, read_json, waiting_lock, write_json
from onediff.library_logs import silence_libraries
from onediff.model.captioner import Captioner
from onediff.model.changed_object import AttributeTokens, ChangedObject
from onediff.model.fusion import CELL_PX, Fusion, Stem
from onediff.model.registration import READ, Registration
from onediff.train import phases

HOME, RESULTS, TABLE = Path(".onediff/ablations"), Path("docs/ablations"), Path("docs/ablations.md")
PRESET = Path("presets/tiny.yaml")
COUNTS = {"train": (2000, 3000), "test": (125, 260)}  # numbers of scenes and of edits
ALIGN_STEPS, TUNE_STEPS = 100, 1000
OWN = {"scenes": "change_type_accuracy", "edits": "operation_accuracy"}  # figures for the own question of each record

_TOWER_ALONE = {"model.delta.fusion": None, "tune.auxiliary": None}
_MATCHED = {"model.delta.inputs": "pair_and_matched_difference"}  # The default is `pair`.
# Maps the name of each variant to the values that it changes in params.yaml, by their path.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "the paper: no fusion": _TOWER_ALONE | {"model.delta.inputs": "pair"},
    "no fusion, inputs: pair and matched difference": _TOWER_ALONE | _MATCHED,
    "inputs: pair and matched difference": _MATCHED,
    "no stem": {},
    "no mixing": {},
    "no object token": {},
    "no attribute words": {},
    "no registration": {},
    "no auxiliary loss": {"tune.auxiliary": None},
    "no loss on places": {"tune.auxiliary.place": 0.0, "tune.auxiliary.changed": 0.0},
    "no loss on the object": {"tune.auxiliary.object": 0.0},
    "no nuisance": {"data.nuisance.share": 0.0},
    "no generated pictures": {"data.edits.shares": {"photograph": 0.67, "generated": 0.0, "canvas": 0.33}},
    "own questions only": {"tune.default_question": 0.0},
    "default question only": {"tune.default_question": 1.0},
}

app = typer.Typer(add_completion=False, help=__doc__)


def blind(stem: Stem, images: Tensor) -> Tensor:
    """Return an empty map of the shape that the stem returns; it replaces Stem.forward."""
    channels = stem.second[0].out_channels
    return images.new_zeros(len(images), channels, images.shape[2] // CELL_PX, images.shape[3] // CELL_PX)


def unmixed(fusion: Fusion, config: Any, *, build: Any = Fusion.__init__) -> None:
    """Build Fusion without the convolutions that mix neighbouring places; it replaces Fusion.__init__."""
    build(fusion, config)
    fusion.mix = nn.Sequential()


def silent(thing: ChangedObject, *inputs: Tensor, read: Any = ChangedObject.forward) -> tuple[Tensor, Tensor, list]:
    """Read the changed object, but return empty tokens; it replaces ChangedObject.forward."""
    tokens, changed, attributes = read(thing, *inputs)
    return torch.zeros_like(tokens), changed, attributes


def wordless(words: AttributeTokens, attributes: Sequence[Tensor], embedding: Any) -> Tensor:
    """Return empty tokens of the attributes; it replaces AttributeTokens.forward."""
    return words.marks.new_zeros(len(attributes[0]), *words.marks.shape)


def unregistered(registration: Registration, images: Tensor) -> Tensor:
    """Return zeros instead of the numbers about the camera motion; it replaces Registration.forward."""
    return images.new_zeros(len(images), 2, READ)


# Maps the name of a variant to the part of the model that it replaces: (class, attribute, replacement).
REPLACED: dict[str, tuple[type, str, Any]] = {
    "no stem": (Stem, "forward", blind), "no mixing": (Fusion, "__init__", unmixed),
    "no object token": (ChangedObject, "forward", silent),
    "no attribute words": (AttributeTokens, "forward", wordless),
    "no registration": (Registration, "forward", unregistered)}


@app.command()
def run(seeds: int = 3, jobs: int = 2,
        only: Annotated[list[str] | None, typer.Option(help="Run only these variants.")] = None,
        scale: Annotated[float, typer.Option(help="Factor on the number of training steps.")] = 1.0) -> None:
    """Train and score every variant and seed whose result is missing in docs/ablations, and write the table."""
    if unknown := set(only or ()) - VARIANTS.keys():
        raise ValueError(f"--only {sorted(unknown)[0]}: must be one of {', '.join(VARIANTS)}; correct the option")
    waiting = [(name, seed) for seed in range(1, seeds + 1) for name in only or VARIANTS
               if not result_file(name, seed).exists()]
    for first in range(0, len(waiting), jobs):
        started = [subprocess.Popen([sys.executable, "-m", "benchmarks.ablations", "one", name, str(seed),
                                     "--scale", str(scale)], env=os.environ | {"OMP_NUM_THREADS": "1"})
                   for name, seed in waiting[first : first + jobs]]
        # A list, because all processes must have ended before an error stops the benchmark.
        if any([process.wait() for process in started]):  # noqa: C419
            raise ValueError("a variant failed; see the error message above")
    table()


@app.command()
def one(name: str, seed: int, scale: float = 1.0) -> None:
    """Train and score one variant with one seed."""
    silence_libraries()
    torch.set_num_threads(1)
    if name in REPLACED:
        setattr(*REPLACED[name])
    base = load_params(PRESET)
    config, plain = (varied(base, changes, seed=seed, scale=scale) for changes in (VARIANTS[name], {}))
    data, test = pairs_of(config, "train"), pairs_of(plain, "test")
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        gflops = train(config, data, Path(scratch))
        figures = scored(Captioner.load(Path(scratch) / "tune/final"), config, test)
    write_json(result_file(name, seed), {"variant": name, "seed": seed, "gflops_per_pair": gflops, "figures": figures},
               indent=1)
    print(name, seed, json.dumps(figures), flush=True)


@app.command()
def table() -> None:
    """Write docs/ablations.md: the mean figures of each variant, in percent, and their deviation over the seeds."""
    results = [read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    if not results:
        raise ValueError(f"{RESULTS} must contain at least one result, but has none; "
                         "'python -m benchmarks.ablations run' makes them")
    figures, rows = list(results[0]["figures"]), []
    for name in VARIANTS:
        if runs := [result for result in results if result["variant"] == name]:
            rows.append([name, str(len(runs)), f"{runs[0]['gflops_per_pair']:.2f}", *(
                spread([run["figures"][figure] for run in runs if figure in run["figures"]]) for figure in figures)])
    script.write_table(TABLE, script.table(["variant", "seeds", "GFLOP a pair", *figures], rows))


def spread(values: list[float]) -> str:
    """Format the mean of shares in percent and, if there are several, their standard deviation."""
    if not values:
        return ""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{''.join(c if c.isalnum() else '-' for c in name)}.{seed}.json"


def varied(config: Config, changes: Mapping[str, Any], *, seed: int, scale: float) -> Config:
    """Return the settings with fewer steps, multiplied by `scale`, and with the changes of one variant."""
    values = config.model_dump(mode="json")
    short = {"align.steps": max(1, round(scale * ALIGN_STEPS)), "tune.steps": max(2, round(scale * TUNE_STEPS)),
             "tune.validate_every": None}
    for path, value in (short | dict(changes)).items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[key] = value
    return Config.model_validate(values | {"seed": seed})


def train(config: Config, data: Path, folder: Path) -> float:
    """Train the phases `align` and `tune`, and return the GFLOPs per pair in a training step of `tune`.

    The vision tower is not counted, because training reads its features from the cache.
    """
    gflops: list[float] = []

    def log(step: int, line: dict[str, float]) -> None:
        gflops.append(1e3 * line["tflops_per_s"] / line["pairs_per_s"])

    runtime = Runtime(device="cpu", scratch=str(HOME / "scratch"), checkpoint_every_s=1e9)
    for phase in ("align", "tune"):
        (folder / phase).mkdir()
    if aligning := phases.align(config, runtime, data=data, folder=folder / "align"):
        phases.train(aligning, log)
    phases.train(phases.tune(config, runtime, data=data, start=folder / "align/final", folder=folder / "tune"), log)
    return gflops[-1]


def scored(captioner: Captioner, config: Config, data: Path) -> dict[str, float]:
    """Return the figures of `benchmarks.outcomes`, and the main figure of each source for its own questions."""
    records = list(read_records(data, "test-*.parquet"))
    rows, lines = [vars(record) for record in records], []
    scenes = [record for record in records if record.source == "scenes"]
    chosen = set(choose([vars(record) for record in scenes], config.stress.num_pairs, seed=0))
    worn = trials("scenes", [record for record in scenes if record.pair_id in chosen], config.stress, seed=0)
    for trial, pairs in [(TEST, iter(records)), *worn]:
        if trial in (TEST, *WORN.values()):
            lines += [{"trial": trial, "pair_id": record.pair_id, "prediction": text}
                      for record, text in caption_records(captioner, pairs, config.caption, {})]
    figures = {name: mean_of([each]) for name, each in outcomes(captions_of(lines), rows).items()}
    own = {record.pair_id: text for record, text in caption_records(
        captioner, records, config.caption, {}, question=lambda record: record.instruction)}
    return figures | {f"own question: {source}": GRAMMARS[source].behaviour(
        own, [row for row in rows if row["source"] == source])[figure] for source, figure in OWN.items()}


def pairs_of(config: Config, split: str) -> Path:
    """Return the folder with the pairs of a split, which the first call generates with the settings `data`.

    The pairs depend on the seed of the preset, and not on the seed of the training.
    """
    config = config.model_copy(update={"seed": load_params(PRESET).seed})
    folder = HOME / f"{split}-{key_of([config.data.model_dump(), COUNTS[split]])[:16]}"
    with waiting_lock(folder.with_suffix(".lock")):
        if not folder.exists():
            with new_folder(folder) as part:
                write_shards(generated(config, split), part, split, shard_pairs=4000)
    return folder


def generated(config: Config, split: str) -> Iterator[Record]:
    num_scenes, num_edits = COUNTS[split]
    for index in range(num_scenes):
        yield from scene_records(config, split, index)
    for index in range(num_edits):
        yield from edit_records(config, split, index)


if __name__ == "__main__":
    script.main(app)
