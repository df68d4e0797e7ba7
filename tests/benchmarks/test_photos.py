from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import photos
from onediff.data.record import SPLITS
from onediff.data.synthesis.edits.generated import draw_generated
from onediff.data.synthesis.edits.photographs import photo_paths, split_of
from onediff.data.synthesis.phrases import EDIT_TEMPLATES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four generated pictures, and a reduced JPEG copy of a photograph of the training split."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        picture = draw_generated(np.random.default_rng(number), "train", None, size=(61, 43))
        Image.fromarray(picture.pixels).save(folder / f"p{number}.png")
    with Image.open(photo_paths("train", None)["coffee"]) as image:
        image.resize((233, 151)).save(folder / "renamed.jpg", quality=70)
    return folder


def answers(records: list[photos.Record], right: bool) -> dict[str, str]:
    """Return a caption for each record; a wrong one always asks to brighten the image."""
    return {record.pair_id: EDIT_TEMPLATES[record.change_type if right else "brighten"][0].format(new="left")
            for record in records}


def records_of(folder: Path) -> list[photos.Record]:
    return [record for name in ("p0.png", "p1.png") for record in photos.edited(name, folder / name)]


def test_photographs_of_the_training_are_found_by_their_pixels(folder: Path, tmp_path: Path) -> None:
    chosen, left_out = photos.chosen_photos(folder, ["p3.png"])
    assert list(chosen) == ["p0.png", "p1.png", "p2.png"] and left_out == ["p3.png", "renamed.jpg"]
    with Image.open(folder / "p1.png") as image:
        image.resize((122, 86)).save(tmp_path / "other.jpg")
    assert photos.chosen_photos(folder, [str(tmp_path / "other.jpg")])[1] == ["p1.png", "renamed.jpg"]
    with pytest.raises(ValueError, match=r"--leave-out p9.png: must be an image file or a photograph of .* has p0.png"):
        photos.chosen_photos(folder, ["p9.png"])
    with pytest.raises(ValueError, match="all 5 are left out"):
        photos.chosen_photos(folder, [f"p{number}.png" for number in range(4)])


def test_each_photograph_gets_each_edit_once_and_always_the_same(folder: Path) -> None:
    first, second = (photos.edited("p0.png", folder / "p0.png") for _ in range(2))
    assert [record.change_type for record in first] == list(photos.EDITS)
    assert [record.after for record in first] == [record.after for record in second]
    assert all((record.before == record.after) == (record.change_type == "none") for record in first)


def test_the_table_counts_right_operations_and_false_alarms(folder: Path) -> None:
    records = records_of(folder)
    table = photos.score_table(records, {"a": answers(records, True), "b": answers(records, False)})
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in (line.split("|") for line in table)}
    assert rows["**operation right**"] == ["100.0 [100.0, 100.0]", "11.1 [11.1, 11.1]"]
    assert rows["*blur*"] == ["100.0 [100.0, 100.0]", "0.0 [0.0, 0.0]"]
    assert rows["false alarms"] == ["0.0 [0.0, 0.0]", "100.0 [100.0, 100.0]"]
    assert photos.over_models(records, {"a": answers(records, True), "b": answers(records, False)}) == (
        "Operation right, over 2 models: mean 55.6, lowest 11.1, highest 100.0.")
    assert photos.gain(records, answers(records, False), answers(records, True)) == (
        "Own photographs change the share of right operations by +88.9 [+88.9, +88.9] percentage points.")


def test_a_folder_for_training_has_photographs_in_every_split(folder: Path, tmp_path: Path) -> None:
    own = {name: folder / name for name in ("p0.png", "p1.png")} | {"cat.png": photo_paths("test", None)["chelsea"]}
    photos.fill(tmp_path, own)
    splits = {split: [path.name for path in tmp_path.iterdir() if split_of(path.name) == split] for split in SPLITS}
    assert sorted(name.split("_", 1)[1] for name in splits["train"]) == ["cat.png", "p0.png", "p1.png"]
    assert [name for name in splits["test"] if "chelsea" in name] == []
    assert all(len(splits[split]) == len(photo_paths(split, None)) for split in ("val", "gate"))


def test_each_fold_is_captioned_by_a_model_that_did_not_see_it_and_is_trained_once(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[set[str]] = []

    def train(training: dict[str, Path], project: Path) -> Path:
        trained.append(set(training))
        return project

    def caption(records: list[photos.Record], model: Path) -> dict[str, str]:
        assert not {record.group_id for record in records} & trained[-1]
        return answers(records, True)

    monkeypatch.setattr(photos, "train", train)
    monkeypatch.setattr(photos, "captions", caption)
    chosen = {name: folder / name for name in ("p0.png", "p1.png", "p2.png")}
    result = photos.cross_validate(chosen, 2)
    assert {key.split("/")[0] for key in result} == set(chosen) and len(result) == 3 * len(photos.EDITS)
    assert sorted(map(len, trained)) == [1, 2]
    assert photos.cross_validate(chosen, 2) == result and len(trained) == 2
    with pytest.raises(ValueError, match="--folds must be 2 to 3"):
        photos.cross_validate(chosen, 4)


def test_the_preset_trains_with_the_folder_of_photographs(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "presets").mkdir(parents=True)
    root = Path(__file__).resolve().parents[2]
    (project / "presets/tiny.yaml").write_text((root / "presets/tiny.yaml").read_text())
    with pytest.raises(ValueError, match="'dvc repro tune' failed"):  # The folder is no project of DVC.
        photos.train({"p0.png": folder / "p0.png"}, project)
    assert photos.load_params(project / "params.yaml").data.edits.photos == "data/own/edits/photos"
    assert (project / "data/own/edits/photos").is_dir()
