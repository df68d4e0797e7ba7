"""Predictions and references in every format: the scores are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onediff.eval.caption_files import Form, read_predictions, read_references, write_predictions, write_references
from onediff.eval.protocols import score_files

PREDICTIONS = {"0": "the red cube is gone", "1": "no difference", "2": "the man moved", "3": "a car left"}
REFERENCES = {"0": ["the red cube has gone", "the cube vanished"], "1": ["there is no change"],
              "2": ["the man has moved to the left"], "3": ["a car has left the lot"]}
RESULTS = [{"image_id": int(key), "caption": text} for key, text in PREDICTIONS.items()]
ANNOTATIONS: dict[str, Any] = {
    "images": [{"id": int(key)} for key in REFERENCES], "type": "captions", "info": {}, "licenses": [],
    "annotations": [{"id": 0, "image_id": int(key), "caption": text}
                    for key, texts in REFERENCES.items() for text in texts]}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


PREDICTION_FILES = {
    "lines": lines([{"pair_id": key, "prediction": text} for key, text in PREDICTIONS.items()]),
    "lines with numbers": lines([{"pair_id": int(key), "prediction": text} for key, text in PREDICTIONS.items()]),
    "coco": json.dumps(RESULTS), "indented coco": json.dumps(RESULTS, indent=2),
    "list": json.dumps([{"pair_id": key, "prediction": text} for key, text in PREDICTIONS.items()])}
REFERENCE_FILES = {
    "lines": lines([{"pair_id": key, "references": texts} for key, texts in REFERENCES.items()]),
    "coco": json.dumps(ANNOTATIONS), "indented coco": json.dumps(ANNOTATIONS, indent=2),
    "coco without images": json.dumps({"annotations": ANNOTATIONS["annotations"]}),
    "list": json.dumps(ANNOTATIONS["annotations"])}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_every_format_and_encoding_gives_equal_captions(encoding: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for form, text in PREDICTION_FILES.items():
        path.write_text(text, encoding=encoding)
        assert read_predictions(path) == PREDICTIONS, form
    for form, text in REFERENCE_FILES.items():
        path.write_text(text, encoding=encoding)
        assert {row["pair_id"]: row["references"] for row in read_references(path)} == REFERENCES, form


def test_files_of_coco_have_the_scores_of_json_lines(tmp_path: Path) -> None:
    scores = []
    for form in ("lines", "coco"):
        (tmp_path / "p").write_text(PREDICTION_FILES[form])
        (tmp_path / "r").write_text(REFERENCE_FILES[form], encoding="utf-8-sig")
        scores.append(score_files([tmp_path / "p"], tmp_path / "r"))
    assert scores[0] == scores[1]
    assert scores[0]["METEOR"] == pytest.approx(0.3173, abs=5e-5)


def test_written_files_of_both_formats_are_read_back(tmp_path: Path) -> None:
    rows = [{"pair_id": f"scenes-{key}", "references": texts, "group_id": f"g{key}", "change_type": "move"}
            for key, texts in REFERENCES.items()]
    forms: tuple[Form, ...] = ("jsonl", "coco")
    for form in forms:
        assert write_references(tmp_path / "r", iter(rows), form) == 4
        assert read_references(tmp_path / "r") == rows
        assert write_predictions(tmp_path / "p", iter(PREDICTIONS.items()), form) == 4
        assert read_predictions(tmp_path / "p") == PREDICTIONS


@pytest.mark.parametrize(("change", "message"), [
    ({"annotations": 3}, "annotations: a list expected, got 3"),
    ({"images": [{"id": 0}]}, "annotation 3: image_id '1' must be the id of one of the images, but is not"),
    ({"annotations": [{"image_id": None, "caption": "a"}]}, "annotation 1: 'image_id' must be a string or a whole"),
    ({"images": [{"file_name": "a.png"}]}, r"image 1: must have 'id', but lacks \['id'\]"),
])
def test_the_error_for_wrong_annotations_contains_their_place(change: dict[str, Any], message: str,
                                                              tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(ANNOTATIONS | change))
    with pytest.raises(ValueError, match=message):
        read_references(path)


def test_an_image_without_annotations_is_refused_when_it_is_scored(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(json.dumps([*RESULTS, {"image_id": 4, "caption": "a"}]))
    (tmp_path / "r").write_text(json.dumps(ANNOTATIONS | {"images": [*ANNOTATIONS["images"], {"id": 4}]}))
    with pytest.raises(ValueError, match=r"each pair must have at least one reference, got 1 \(4\) without"):
        score_files([tmp_path / "p"], tmp_path / "r")
