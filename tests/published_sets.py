"""Functions that write small imitations of published datasets in their official formats, for tests of the readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Records, pairs, sentences and empty sentences of each split of Spot-the-Diff.
SPOT = {"train": (9524, 8566, 17676, 53), "val": (1634, 1493, 3310, 6), "test": (1404, 1270, 2107, 7)}
# Requests, image pairs and sentences per request of each split of Image-Editing-Request.
REQUESTS = {"train": (3061, 2507, 1), "valid": (383, 357, 3), "test": (495, 446, 3)}
# The number of image pairs that two splits of Image-Editing-Request share.
SHARED = {("test", "valid"): 55, ("train", "valid"): 2, ("train", "test"): 1}
# The first scene number of each split of CLEVR-Change, and the number after the last scene.
SCENES = {"train": (0, 33830), "val": (33830, 35818), "test": (35818, 39803)}
TYPES = ("color", "material", "move", "drop", "add")
BIRD_COLUMNS = ("img1ObservationURL", "img1ImgURL", "img1Species", "img1Selection", "img2ObservationURL", "img2ImgURL",
                "img2Species", "img2Selection", "split", "annN", "description")


def put(path: Path, value: object) -> Path:
    """Write a text to a text file, or any other value to a JSON file, and create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def picture(path: Path, seed: int, *, side: int = 8) -> Path:
    """Write a small image of random pixels, in the format that the file extension states."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def spot_entries(split: str) -> list[dict[str, Any]]:
    """Return entries of Spot-the-Diff with repeated ids and empty sentences, as many as in the official files."""
    records, pairs, num_sentences, num_empty = SPOT[split]
    start = {"train": 0, "val": 20_000, "test": 40_000}[split]
    ids = [str(start + k % pairs) for k in range(records)]
    texts = [["" if k < num_empty else f"change {k}"] for k in range(records)]
    for extra in range(num_sentences - records):
        texts[-1 - extra % 700].append(f"another {extra}")
    return [{"img_id": name, "sentences": sentences} for name, sentences in zip(ids, texts, strict=True)]


def request_entries() -> dict[str, list[dict[str, Any]]]:
    """Return entries of Image-Editing-Request by split.

    As in the official files, image pairs repeat under different uids, and some pairs occur in two splits.
    """
    names = {split: [(f"{split}_{k}.jpg", f"{split}_{k}_b.png") for k in range(pairs)]
             for split, (_, pairs, _) in REQUESTS.items()}
    first = 0
    for (one, other), number in SHARED.items():
        names[other][first:first + number] = names[one][first:first + number]
        first += number
    return {split: [{"uid": f"{split}_{k}", "img0": names[split][k % pairs][0], "img1": names[split][k % pairs][1],
                     "sents": [f"request {k} {r}" for r in range(each)]} for k in range(records)]
            for split, (records, pairs, each) in REQUESTS.items()}


def scene_files() -> dict[str, Any]:
    """Return the content of the four annotation files of CLEVR-Change by file name."""
    numbers = list(range(SCENES["test"][1]))
    names = [f"CLEVR_default_{k:06d}.png" for k in numbers]
    return {"splits.json": {split: numbers[first:last] for split, (first, last) in SCENES.items()},
            "change_captions.json": {name: ["the cube moved", "the cube is elsewhere"] for name in names},
            "no_change_captions.json": {name: ["nothing changed"] for name in names},
            "type_mapping.json": {kind: [f"{k:06d}.png" for k in numbers[index::5]]
                                  for index, kind in enumerate(TYPES)}}


def bird_row(number: int, split: str, annotator: int, description: str) -> str:
    """Return one line of the table of Birds-to-Words."""
    photos = (f"https://static.inaturalist.org/photos/{number}{side}/large.jpg?1234" for side in (1, 2))
    cells = [part for url in photos for part in ("https://www.inaturalist.org/observations/9", url, "Larus", "visual")]
    return "\t".join([*cells, split, str(annotator), description])


def bird_table(rows: list[str]) -> str:
    """Return the table of Birds-to-Words with its header line."""
    return "\n".join(["\t".join(BIRD_COLUMNS), *rows]) + "\n"


def edit_folder(root: Path, prompts: int, *, samples: int) -> None:
    """Create the folders and JSON files of the InstructPix2Pix dataset, without images."""
    for number in range(prompts):
        folder = root / f"shard-{number % 3:02d}" / f"{number:07d}"
        put(folder / "prompt.json", {"input": f"a dog {number}", "edit": "make it a cat", "output": "a cat"})
        put(folder / "metadata.jsonl", "".join(
            json.dumps({"seed": seed, "sim_0": 0.3, "sim_1": 0.3, "sim_direction": 0.4, "sim_image": 0.8}) + "\n"
            for seed in range(samples)))


def captioned_rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield rows in the format of LLaVA-558K."""
    for k in range(count):
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"a thing {k}"}]
        yield {"id": f"{k:09d}", "image": f"{k % 700:05d}/{k:09d}.jpg", "conversations": turns}


def conversation_rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield rows in the format of LLaVA-665K, where every sixteenth row is text only and ids repeat."""
    for k in range(count):
        turns = [{"from": "human", "value": f"What is {k}?\n<image>"}, {"from": "gpt", "value": f"It is {k}."}] * 3
        row = {"id": f"{k // 2:012d}", "image": f"coco/train2017/{k // 2:012d}.jpg", "conversations": turns}
        yield {"id": row["id"], "model": "", "conversations": turns} if k % 16 == 15 else row


def put_list(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as one JSON list without keeping all rows in memory."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write("," if number else "[")
            json.dump(row, file)
        file.write("]")
