"""The program that each process runs in test_ranks.py: `python ranks.py CASES.json`, with RANK and WORLD_SIZE set.

CASES.json is a list of training runs (cases): their folders and settings. The program trains a small model for each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from parts import DELTA_ID, IMAGE_ID, VOCAB, phase, small

from onediff.config import Runtime
from onediff.inputs.processing import IGNORED
from onediff.model.onediff import OneDiffForConditionalGeneration
from onediff.train.loop import TrainingRun, fit
from onediff.train.speed import Meter

ROWS = 12


def rows_of(model: OneDiffForConditionalGeneration, step: int) -> list[dict[str, torch.Tensor]]:
    """Return the rows of a step, each as a batch of one row.

    Answers have 1 to 40 tokens. In every third step, the rows of one rank have no images.
    """
    generator = torch.Generator().manual_seed(step)
    rows = []
    for number in range(ROWS):
        count = 0 if step % 3 == 1 and number % 2 else (2, 1, 0, 2)[number % 4]
        length = int(torch.randint(1, 41, (), generator=generator))
        words = torch.randint(3, VOCAB, (2 + length,), generator=generator)
        head = torch.tensor([1] + [IMAGE_ID] * model.config.tokens_per_image * count
                            + [DELTA_ID] * model.config.delta_tokens_read * (count == 2))
        ids = torch.cat([head, words])
        labels = ids.clone()
        labels[: -length] = IGNORED
        pairs, targets = int(count == 2), {}
        if model.fusion is not None:
            targets = {"place_targets": torch.rand(pairs, 2, 9, generator=generator),
                       "changed_targets": torch.ones(pairs),
                       "object_targets": torch.randint(3, (pairs, 2), generator=generator)}
        rows.append({**targets, "input_ids": ids[None], "labels": labels[None],
                     "attention_mask": torch.ones_like(ids)[None], "image_counts": torch.tensor([count]),
                     "images": torch.randn(count, 3, 12, 12, generator=generator)})
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad the rows on the right to equal length and concatenate them to one batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    batch = {key: torch.cat([torch.nn.functional.pad(row[key], (0, longest - row[key].shape[1]), value=value)
                             for row in rows]) for key, value in fill.items()}
    return batch | {key: torch.cat([row[key] for row in rows]) for key in rows[0].keys() - batch.keys()}


def run(case: dict[str, Any]) -> None:
    """Train a small model with the settings of the case and save the weights in the folder of the case."""
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    model = small(**case.get("model", {})).to(getattr(torch, case.get("precision", "float32")))
    num_micro = case.get("num_micro", 1)
    world = int(os.environ["WORLD_SIZE"])
    runtime = Runtime(launcher="deepspeed" if world > 1 else "local", gpus=world,
                      micro_batch_size=ROWS // world // num_micro, **case["runtime"])

    def batches(first: int, rank: int) -> Any:
        for step in range(first, 30):
            parts = world * num_micro
            rows = rows_of(model, step)
            yield [{key: value.to(model.dtype) if key == "images" else value
                    for key, value in collate(rows[part::parts]).items()} for part in range(rank, parts, world)]

    def log(step: int, values: dict[str, float]) -> None:
        if step + 1 == case.get("die_at"):
            raise KeyboardInterrupt

    training = TrainingRun("case", phase(**case.get("phase", {})), runtime, folder, model, processor=None, corpus=None,
                           rows=lambda step: [])
    try:
        trained = fit(training, batches, log, Meter(lambda counts: 0.0, None))
    except KeyboardInterrupt:
        os._exit(0)  # End the process without any clean-up, as after SIGKILL.
    if trained.weights is not None:
        torch.save(trained.weights, folder / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for item in json.loads(Path(sys.argv[1]).read_text()):
        run(item)
