"""Synthetic edits: InstructPix2Pix edits an image by an instruction, and CLIP decides whether the result is kept.

Method and thresholds (presets/paper.yaml): Brooks, Holynski and Efros, "InstructPix2Pix", CVPR 2023.
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
from onediff.files import read_json, write_json
from onediff.inputs.images import open_image, png
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

SIDE = 64  # The U-Net of the pipeline needs images whose width and height are multiples of this.
MIN_LENGTH = 1e-5  # If the difference of two unit vectors is shorter than this, it is only rounding error.
OUTCOMES = ("kept", "image too unlike", "image too unlike its caption", "direction unlike the captions'", "flagged",
            "unreadable")


@dataclass(frozen=True)
class Task:
    """An image of a collection and the edit instruction to apply; `output` is the caption of the edited image."""

    entry: Entry
    edit: str
    output: str


@dataclass(frozen=True)
class Editor:
    """Edits each image `num_samples` times with InstructPix2Pix and keeps the samples that pass the CLIP filters.

    Each worker process calls the editor once. This call loads the models and returns a function that edits the image
    of one task at a time.
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
        # This text changes if the weights or the precision of the models change.
        models = f"{total:.12g} {pipeline.dtype} {embedder.identity}"

        def work(task: Task) -> tuple[Path, dict[str, int]]:
            """Edit the image of a task, or reuse the finished result of an earlier run.

            Returns the folder with the kept records, and the number of samples per outcome.
            """
            [image] = load([task.entry])
            inputs = [self.source, self.settings.model_dump(), self.seed, models, task.edit, task.output,
                      task.entry.name, task.entry.caption, digest(image.content)]
            folder = self.folder / digest(json.dumps(inputs).encode())
            outcomes = folder / "fates.json"
            if not outcomes.exists():
                counts: Counter[str] = Counter()
                records = list(self._records(pipeline, embedder, task, image.content, counts))
                write_shards(records, folder, "train", shard_pairs=max(1, len(records)))
                write_json(outcomes, counts)  # This file marks the task as finished, so it is written last.
            return folder, read_json(outcomes)

        return work

    def _records(self, pipeline: Any, embedder: Embedder, task: Task, content: bytes,
                 counts: Counter[str]) -> Iterator[Record]:
        """Edit the image of a task, yield a record for each sample that is kept, and count all outcomes in `counts`.

        The image is resized first: the longer side to about `image_px`, both sides to multiples of SIDE.
        """
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
        # One batch contains only samples of this image, each with its own generator, so other tasks change nothing.
        output = pipeline(prompt=[task.edit] * count, image=[before] * count, num_inference_steps=settings.steps,
                          guidance_scale=settings.guidance, image_guidance_scale=settings.image_guidance,
                          generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds], output_type="pil")
        # Without a safety checker in the pipeline, `nsfw_content_detected` is None.
        flagged = output.nsfw_content_detected or [False] * count
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
    """Yield the records in the folder of a finished task; the folder has no shard if no sample was kept."""
    if any(folder.glob("*.parquet")):
        yield from read_records(folder)


def similarities(embedder: Embedder, before: Image.Image, edited: list[Image.Image], *,
                 captions: tuple[str, str]) -> list[dict[str, float]]:
    """Return the CLIP cosine similarities of each edited image, with the keys of InstructPix2Pix's metadata.jsonl.

    sim_image compares both images; sim_0 and sim_1 compare the first and the edited image with their captions;
    sim_direction compares the step from image to image with the step from caption to caption.
    """
    first, *others = embedder.images([before, *edited])
    texts = embedder.texts(list(captions))
    return [{"sim_image": _cosine(first, other), "sim_0": _cosine(first, texts[0]), "sim_1": _cosine(other, texts[1]),
             "sim_direction": _cosine(other - first, texts[1] - texts[0])} for other in others]


def verdict(values: dict[str, float], settings: Diffusion) -> str:
    """Return "kept", or the outcome of the first similarity filter that rejects the sample."""
    is_too_low = {
        "image too unlike": values["sim_image"] < settings.min_image_similarity,
        "image too unlike its caption": min(values["sim_0"], values["sim_1"]) < settings.min_caption_similarity,
        "direction unlike the captions'": values["sim_direction"] < settings.min_direction_similarity}
    return next((outcome for outcome, applies in is_too_low.items() if applies), "kept")


def _cosine(a: Any, b: Any) -> float:
    """Return the cosine of two vectors, or 0 if a vector is zero up to rounding, such as the step of equal captions."""
    lengths = [float(vector @ vector) ** 0.5 for vector in (a, b)]
    return round(float(a @ b) / (lengths[0] * lengths[1]), 6) if min(lengths) > MIN_LENGTH else 0.0
