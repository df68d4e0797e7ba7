"""Synthetic edits: InstructPix2Pix edits an image by an instruction, and CLIP decides whether the edit is credible.

Brooks, Holynski and Efros, "InstructPix2Pix", CVPR 2023, whose thresholds are in presets/paper.yaml.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from onediff.config import Diffusion
from onediff.data.embedding import Embedder
from onediff.data.record import Record, digest, read_records, write_shards
from onediff.data.sources.collection import Entry, load
from onediff.files import write_json
from onediff.inputs.images import open_image, png
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

SIDE = 64  # images are made multiples of it, which the pipeline's U-Net needs
MIN_LENGTH = 1e-5  # a shorter difference of unit vectors is due to rounding
OUTCOMES = ("kept", "image too unlike", "image too unlike its caption", "direction unlike the captions'", "flagged",
            "unreadable")


@dataclass(frozen=True)
class Task:
    """An image of the collection and the edit to apply; `output` is the caption of the edited image."""

    entry: Entry
    edit: str
    output: str


@dataclass(frozen=True)
class Editor:
    """Edits a task's image `num_samples` times and keeps what passes the filters.

    Called in each worker: it loads the pipeline and CLIP once and gives the function that does the work.
    """

    source: str
    settings: Diffusion
    clip: str
    seed: int
    max_megapixels: float
    device: str
    folder: Path

    def __call__(self) -> Callable[[Task], tuple[Path, dict[str, int]]]:
        from diffusers import StableDiffusionInstructPix2PixPipeline

        embedder = Embedder(self.clip, self.device)
        dtype = embedder.model.dtype
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(self.settings.pipeline, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        pipeline = pipeline.to(embedder.model.device)
        parts = [part for _, part in sorted(pipeline.components.items()) if hasattr(part, "parameters")]
        total = sum(float(p.detach().double().abs().sum()) for part in parts for p in part.parameters())
        models = f"{total:.12g} {pipeline.dtype} {embedder.identity}"  # differs if weights or their precision differ

        def work(task: Task) -> tuple[Path, dict[str, int]]:
            """The folder of the kept records, and how many samples had which outcome. A finished task is reused."""
            [image] = load([task.entry])
            inputs = [self.source, self.settings.model_dump(), self.seed, models, task.edit, task.output,
                      task.entry.name, task.entry.caption, digest(image.content)]
            folder = self.folder / digest(json.dumps(inputs).encode())
            outcomes = folder / "fates.json"
            if not outcomes.exists():
                counts: Counter[str] = Counter()
                records = list(self._records(pipeline, embedder, task, image.content, counts))
                write_shards(records, folder, "train", shard_pairs=max(1, len(records)))
                write_json(outcomes, counts)  # last: without this file, a restart repeats the task
            return folder, json.loads(outcomes.read_text(encoding="utf-8"))

        return work

    def _records(self, pipeline: Any, embedder: Embedder, task: Task, content: bytes,
                 counts: Counter[str]) -> Iterator[Record]:
        """The longer side of the image becomes about `image_px`, and both sides multiples of SIDE."""
        import torch

        settings, name, captions = self.settings, task.entry.name, (task.entry.caption, task.output)
        try:
            image = open_image(content, max_megapixels=self.max_megapixels)
        except ValueError:
            counts["unreadable"] += 1
            return
        scale = settings.image_px / max(image.size)
        width, height = (max(SIDE, round(side * scale / SIDE) * SIDE) for side in image.size)
        before = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        count = settings.num_samples
        seeds = [int(digest(f"{self.seed}|{name}|{number}".encode())[:8], 16) for number in range(count)]
        # The samples of one image make a batch, and each has its own generator: other edits change nothing here.
        output = pipeline(prompt=[task.edit] * count, image=[before] * count, num_inference_steps=settings.steps,
                          guidance_scale=settings.guidance, image_guidance_scale=settings.image_guidance,
                          generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds], output_type="pil")
        flagged = output.nsfw_content_detected or [False] * count  # by the safety checker of the pipeline
        measured = similarities(embedder, before, output.images, captions=captions)
        for seed, after, is_flagged, values in zip(seeds, output.images, flagged, measured, strict=True):
            outcome = "flagged" if is_flagged else verdict(values, settings)
            counts[outcome] += 1
            if outcome == "kept":
                key = f"{digest(name.encode())[:16]}-{seed:010d}"
                yield Record(
                    pair_id=f"{self.source}-train-{key}", source=self.source, split="train",
                    group_id=f"{self.source}-{name}", before=png(before, compress_level=6),
                    after=png(after, compress_level=6), references=[],
                    instruction=DEFAULT_INSTRUCTION, change_type="unlabelled",
                    provenance={"official_id": key, "official_split": "train", "names": [name, f"{key}.png"],
                                "captions": list(captions), "edit": task.edit, "seed": seed, **values})


def records_of(folder: Path) -> Iterator[Record]:
    """The kept records of a finished task; a task may have none, and then its folder has no shard."""
    if any(folder.glob("*.parquet")):
        yield from read_records(folder)


def similarities(embedder: Embedder, before: Image.Image, edited: list[Image.Image], *,
                 captions: tuple[str, str]) -> list[dict[str, float]]:
    """Cosines per edited image, named as InstructPix2Pix's metadata.jsonl names them.

    sim_image: the two images; sim_0, sim_1: each image and its caption; sim_direction: from image to image and from
    caption to caption.
    """
    first, *others = embedder.images([before, *edited])
    texts = embedder.texts(list(captions))
    return [{"sim_image": _cosine(first, other), "sim_0": _cosine(first, texts[0]), "sim_1": _cosine(other, texts[1]),
             "sim_direction": _cosine(other - first, texts[1] - texts[0])} for other in others]


def verdict(values: dict[str, float], settings: Diffusion) -> str:
    """"kept", or the first filter that the sample does not pass."""
    is_too_low = {
        "image too unlike": values["sim_image"] < settings.min_image_similarity,
        "image too unlike its caption": min(values["sim_0"], values["sim_1"]) < settings.min_caption_similarity,
        "direction unlike the captions'": values["sim_direction"] < settings.min_direction_similarity}
    return next((outcome for outcome, applies in is_too_low.items() if applies), "kept")


def _cosine(a: Any, b: Any) -> float:
    """0 where one has no length but rounding, as the direction between equal captions."""
    lengths = [float(vector @ vector) ** 0.5 for vector in (a, b)]
    return round(float(a @ b) / (lengths[0] * lengths[1]), 6) if min(lengths) > MIN_LENGTH else 0.0
