from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_diffusion import save_clip, save_pipeline

from onediff.config import Diffusion
from onediff.data.embedding import Embedder
from onediff.data.sources.collection import Entry
from onediff.data.synthesis.diffusion import Editor, Task, records_of, similarities, verdict

KEEP_ALL = {"min_image_similarity": -1.0, "min_caption_similarity": -1.0, "min_direction_similarity": -1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_pipeline(folder / "pipeline"), save_clip(folder / "clip")


def settings(models: tuple[str, str], **changes: float) -> Diffusion:
    values = {"pipeline": models[0], "image_px": 96, "steps": 2, "guidance": 7.5, "image_guidance": 1.5,
              "num_samples": 2, **KEEP_ALL} | changes
    return Diffusion.model_validate(values)


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def task(tmp_path: Path) -> Task:
    picture(3).save(tmp_path / "a.png")
    return Task(Entry("a.png", "a dog on grass", tmp_path / "a.png"), "make it a cat", "a cat on grass")


def editor(models: tuple[str, str], folder: Path, **changes: float) -> Callable:
    return Editor("drawn", settings(models, **changes), models[1], seed=7, max_megapixels=1, device="cpu",
                  folder=folder / "scratch")()


def test_an_edited_image_becomes_a_record_with_captions_edit_and_seed(models: tuple[str, str], task: Task,
                                                                      tmp_path: Path) -> None:
    place, fates = editor(models, tmp_path)(task)
    records = list(records_of(place))
    assert fates == {"kept": 2} and len(records) == 2
    for record in records:
        provenance = record.provenance
        assert (provenance["captions"], provenance["edit"]) == (["a dog on grass", "a cat on grass"], "make it a cat")
        assert (record.split, record.references, record.group_id) == ("train", [], "drawn-a.png")
        before, after = (Image.open(io.BytesIO(content)) for content in record.images)
        assert before.size == after.size == (128, 64)  # multiples of 64 near 96 x 64
    assert len({record.provenance["seed"] for record in records}) == 2
    assert records[0].after != records[1].after and records[0].before == records[1].before


def test_similarities_equal_separately_computed_cosines(models: tuple[str, str]) -> None:
    embedder, before, after = Embedder(models[1], "cpu"), picture(1), picture(2)
    [cosines] = similarities(embedder, before, [after], captions=("a dog", "a cat"))
    (a, b), (s, t) = embedder.images([before, after]), embedder.texts(["a dog", "a cat"])
    expected = {"sim_image": a @ b, "sim_0": a @ s, "sim_1": b @ t,
                "sim_direction": (b - a) @ (t - s) / np.linalg.norm(b - a) / np.linalg.norm(t - s)}
    assert cosines == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)
    [same] = similarities(embedder, before, [after], captions=("a dog", "a dog"))
    assert same["sim_direction"] == 0


@pytest.mark.parametrize(("values", "fate"), [
    ({}, "kept"), ({"sim_image": 0.74}, "image too unlike"), ({"sim_0": 0.19}, "image too unlike its caption"),
    ({"sim_1": 0.19}, "image too unlike its caption"), ({"sim_direction": 0.19}, "direction unlike the captions'")])
def test_each_filter_rejects_samples_below_the_threshold_of_the_paper(models: tuple[str, str], values: dict[str, float],
                                                                      fate: str) -> None:
    paper = settings(models, min_image_similarity=0.75, min_caption_similarity=0.2, min_direction_similarity=0.2)
    good = {"sim_image": 0.8, "sim_0": 0.3, "sim_1": 0.3, "sim_direction": 0.3}
    assert verdict(good | values, paper) == fate


def test_rejected_samples_are_counted(models: tuple[str, str], task: Task, tmp_path: Path) -> None:
    place, fates = editor(models, tmp_path, min_image_similarity=1.0)(task)
    assert fates == {"image too unlike": 2}
    assert list(records_of(place)) == []


def test_an_unreadable_image_is_counted(models: tuple[str, str], task: Task, tmp_path: Path) -> None:
    task.entry.path.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert editor(models, tmp_path)(task)[1] == {"unreadable": 1}


def test_a_finished_task_is_reused_and_an_unfinished_task_is_repeated(models: tuple[str, str], task: Task,
                                                                      tmp_path: Path) -> None:
    place, _ = editor(models, tmp_path)(task)
    first = {path.name: path.read_bytes() for path in place.iterdir()}
    (place / "train-00000.parquet").write_bytes(b"kept as it is")
    assert editor(models, tmp_path)(task)[0] == place
    assert (place / "train-00000.parquet").read_bytes() == b"kept as it is"
    (place / "fates.json").unlink()
    editor(models, tmp_path)(task)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == first
