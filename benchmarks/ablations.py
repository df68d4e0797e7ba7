"""Ablations: how much each part of the model and the training contributes, measured on rendered scenes; one table.

    python -m benchmarks.ablations run --seeds 3   # train and score the variants whose results are missing
    python -m benchmarks.ablations table           # write docs/ablations.md from the results

Every variant trains both phases of presets/tiny.yaml with fewer steps, on equal rendered scenes without the source
`edits`. Then it captions three test sets: scenes like the training scenes; scenes whose changed object is a combination
of color and shape that no training scene shows; and the first set again, with an instruction that training never used.
The seed determines initial weights and batches, but not the scenes. `--jobs 2` trains two variants at a time, each on
one thread.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from benchmarks import script
from onediff.config import Config, Runtime, load_params
from onediff.data.record import Record, read_records, read_table, write_shards
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.analysis.behaviour import scene_behaviour
from onediff.eval.caption import caption_records
from onediff.files import new_folder, write_json
from onediff.inputs.processing import IGNORED
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.library_logs import silence_libraries
from onediff.model.captioner import Captioner
from onediff.train import phases
from onediff.train.pretrain.dialogue import sentence

HOME, RESULTS, TABLE = Path(".onediff/ablations"), Path("docs/ablations"), Path("docs/ablations.md")
JITTER, OBJECTS, NUM_TRAIN, NUM_TEST = 0.15, (2, 3), 1500, 100
HELD_OUT = frozenset({("red", "cube"), ("blue", "sphere"), ("green", "cylinder"), ("yellow", "cube")})
ALIGN_STEPS, TUNE_STEPS = 100, 400
MEASURED = ("change_type_accuracy", "changed_object_accuracy", "change_accuracy", "false_alarm_rate")
# The three test sets: scenes like in training, unseen combinations of color and shape, and an unseen instruction.
TESTS = ("test", "unseen", "asked")

# All variants use token layout A and no fusion, as presets/tiny.yaml did when the ablations were run.
BASE = {"reading": "A", "fusion": None}
# Maps the name of each variant to the values that the variant changes in section `model` of params.yaml.
# The key `align` of a variant is the kind of samples of the phase `align`, or None to skip this phase.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "inputs: pair (the paper)": {"inputs": "pair"},
    "no VDM, all patches": {"num_tokens": 0, "patch_pool": 1},
    "pair, no align": {"inputs": "pair", "align": None},
    "pair, align on single images": {"inputs": "pair", "align": "single"},
    "no align": {"align": None},
    "inputs: pair and difference": {"inputs": "pair_and_difference"},
    "no VDM": {"num_tokens": 0},
    "K 32": {"num_tokens": 32},
    "no image ids": {"image_ids": False},
    "align on single images": {"align": "single"},
    "K 1": {"num_tokens": 1},
    "all patches": {"patch_pool": 1},
    "reading B, all patches": {"reading": "B", "patch_pool": 1},
    "reading C": {"reading": "C"},
    "levels 2, 2, 2, 2": {"levels": [2, 2, 2, 2]},
    "levels 4, 4, 4, 4": {"levels": [4, 4, 4, 4]},
    "cross-attention every second layer": {"levels": [2, 4], "cross_attention_every": 2},
    "BERT initialisation": {"init": str(HOME / "bert")},
}

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(seeds: int = 3, jobs: int = 2,
        only: Annotated[list[str] | None, typer.Option(help="Run only these variants.")] = None,
        scale: Annotated[float, typer.Option(help="Factor on the number of training steps.")] = 1.0) -> None:
    """Train and score every variant and seed whose result is missing in docs/ablations, and write the table."""
    if not (HOME / "diffcap/card.json").exists():
        make_scenes(HOME / "diffcap")
    if not (HOME / "bert").exists():
        make_bert(HOME / "bert")
    waiting = [(name, seed) for name in only or VARIANTS for seed in range(1, seeds + 1)
               if not result_file(name, seed).exists()]
    for first in range(0, len(waiting), jobs):
        started = [subprocess.Popen([sys.executable, "-m", "benchmarks.ablations", "one", name, str(seed),
                                     "--scale", str(scale)], env=os.environ | {"OMP_NUM_THREADS": "1"})
                   for name, seed in waiting[first : first + jobs]]
        if any(process.wait() for process in started):
            raise SystemExit("benchmarks.ablations: a variant failed; see the error message above")
    table()


@app.command()
def one(name: str, seed: int, scale: float = 1.0) -> None:
    """Train and score one variant with one seed."""
    silence_libraries()
    torch.set_num_threads(1)
    config = varied(load_params(Path("presets/tiny.yaml")), VARIANTS[name], seed=seed, scale=scale)
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        gflops = train(config, Path(scratch))
        captioner = Captioner.load(Path(scratch) / "tune/final")
    scores: dict[str, Any] = {}
    for test in TESTS:
        records = read_records(HOME / "diffcap", f"{test}-*.parquet")
        answers = caption_records(captioner, records, config.caption, {}, question=lambda record: record.instruction)
        captions = {record.pair_id: text for record, text in answers}
        shares = scene_behaviour(captions, read_table(HOME / "diffcap", f"{test}-*.parquet"))
        scores[test] = {key: shares[key] for key in MEASURED if key in shares}
    write_json(result_file(name, seed), {"variant": name, "seed": seed, "gflops_per_pair": gflops, "scores": scores})
    print(name, seed, json.dumps(scores["test"]), flush=True)


@app.command()
def table() -> None:
    """Write docs/ablations.md: the mean scores of each variant and their standard deviation over the seeds."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = ["| variant | seeds | GFLOP a pair | type | object | all right | false alarms "
             "| unseen color and shape: object | unseen instruction: type |", "|---" * 9 + "|"]
    columns = [("test", key) for key in MEASURED] + [("unseen", MEASURED[1]), ("asked", MEASURED[0])]
    for name in VARIANTS:
        runs = [result for result in results if result["variant"] == name]
        if runs:
            cells = [spread([run["scores"][test][key] for run in runs]) for test, key in columns]
            lines.append(f"| {name} | {len(runs)} | {runs[0]['gflops_per_pair']:.2f} | " + " | ".join(cells) + " |")
    script.write_table(TABLE, lines)


def spread(values: list[float]) -> str:
    """Format the mean of the values and, if there are several, their standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def result_file(name: str, seed: int) -> Path:
    return RESULTS / f"{''.join(c if c.isalnum() else '-' for c in name)}.{seed}.json"


def varied(config: Config, changes: dict[str, Any], *, seed: int, scale: float) -> Config:
    """Return the settings of the tiny preset with the changes of BASE and of one variant.

    `scale` multiplies the number of training steps.
    """
    values = config.model_dump(mode="json") | {"seed": seed}
    model, align = values["model"], values["align"]
    model["max_length"] = 256  # Some variants need long prompts, which contain all patches of both images.
    for key, value in (BASE | changes).items():
        if key == "align":
            values["align"] = align | {"samples": value} if value else None
        else:
            (model if key in model else model["delta"])[key] = value
    if values["align"]:
        values["align"]["steps"] = max(1, round(scale * ALIGN_STEPS))
    values["tune"] |= {"steps": max(2, round(scale * TUNE_STEPS)), "mixture": {"scenes": 1.0}, "validate_every": None,
                       "auxiliary": None}
    return Config.model_validate(values)


def train(config: Config, scratch: Path) -> float:
    """Train the phases `align` and `tune`, and return the GFLOPs per pair in a training step of `tune`.

    The vision tower is not counted, because training reads its features from the cache.
    """
    gflops: list[float] = []

    def log(step: int, line: dict[str, float]) -> None:
        gflops.append(1e3 * line["tflops_per_s"] / line["pairs_per_s"])

    runtime = Runtime(device="cpu", scratch=str(HOME / "scratch"), checkpoint_every_s=1e9)
    for phase in ("align", "tune"):
        (scratch / phase).mkdir()
    if aligning := phases.align(config, runtime, data=HOME / "diffcap", folder=scratch / "align"):
        phases.train(aligning, log)
    phases.train(phases.tune(config, runtime, data=HOME / "diffcap", start=scratch / "align/final",
                             folder=scratch / "tune"), log)
    return gflops[-1]


def make_scenes(folder: Path) -> None:
    """Generate the training scenes and the three test sets as shards in `folder`."""
    values = load_params(Path("presets/tiny.yaml")).model_dump(mode="json")
    values["data"]["scenes"] |= {"jitter": JITTER, "min_objects": OBJECTS[0], "max_objects": OBJECTS[1]}
    config = Config.model_validate(values)

    def scenes(split: str, num: int, *, held_out: bool) -> Iterator[Record]:
        """Yield the records of the first `num` scenes that show a held-out object, or that show none."""
        groups = (scene_records(config, split, index) for index in count())
        chosen = (records for records in groups if shows_held_out(records[0]) == held_out)
        return (replace(record, instruction=DEFAULT_INSTRUCTION) for records in islice(chosen, num)
                for record in records)

    test = list(scenes("test", NUM_TEST, held_out=False))
    unseen = [record for record in scenes("test", NUM_TEST, held_out=True) if record.change_type != "none"
              and (record.provenance["object"]["color"], record.provenance["object"]["shape"]) in HELD_OUT]
    with new_folder(folder) as part:
        for split, records in (
                ("train", scenes("train", NUM_TRAIN, held_out=False)), ("test", test), ("unseen", unseen),
                ("asked", (replace(record, instruction="Describe the change between the scenes.") for record in test))):
            write_shards(records, part, split, shard_pairs=4000)
        write_json(part / "card.json", {"jitter": JITTER, "held_out": sorted(HELD_OUT)})
    print(f"{NUM_TRAIN} training scenes, {len(test)} test pairs, {len(unseen)} test pairs with an unseen object")


def shows_held_out(record: Record) -> bool:
    """Check whether an image of the pair shows a held-out combination of color and shape.

    The check reads the captions of both images, which describe every object by color, material and shape.
    """
    words = " ".join(record.provenance["captions"]).replace(",", "").split()
    return any(pair in HELD_OUT for pair in zip(words, words[2:], strict=False))


def make_bert(folder: Path) -> None:
    """Train a small BERT, as wide as the Visual Delta Module, on the caption templates and save it in `folder`.

    The paper initializes the Visual Delta Module from BERT-base. This BERT is the equivalent for the tiny preset.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained("presets/backbones/tiny/language")
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer) + 1, hidden_size=128, num_hidden_layers=4,
                                       num_attention_heads=4, intermediate_size=512, hidden_dropout_prob=0.0,
                                       attention_probs_dropout_prob=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(600):
        rows = tokenizer([" ".join(sentence(rng)) for _ in range(32)], padding=True, return_tensors="pt")
        hidden = (torch.rand(rows["input_ids"].shape) < 0.2) & rows["attention_mask"].bool()
        loss = model(input_ids=rows["input_ids"].masked_fill(hidden, len(tokenizer)),
                     attention_mask=rows["attention_mask"],
                     labels=rows["input_ids"].masked_fill(~hidden, IGNORED)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"BERT of width 128: the loss is {loss.item():.2f} per masked token")
    model.save_pretrained(folder)


if __name__ == "__main__":
    app()
