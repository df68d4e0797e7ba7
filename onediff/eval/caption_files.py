"""Files of predictions and references, in JSON Lines or in the format of COCO.

| | JSON Lines | COCO |
|---|---|---|
| predictions | lines {"pair_id", "prediction"} | a list of {"image_id", "caption"}, called results |
| references | lines {"pair_id", "references": [...]} | {"images": [{"id"}], "annotations": [{"image_id", "caption"}]} |

The content of a file decides which format it has, not its name. An id may be a text or a whole number; both give the
same pair_id. Lines and images may have further keys: "group_id" and "change_type" are read.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from onediff.encoding import read_text
from onediff.eval.metrics.words import Predictions
from onediff.files import write_json, write_jsonl
from onediff.text_files import expect, parse_json, parse_lines

Form = Literal["jsonl", "coco"]
EXTRAS = ("group_id", "change_type")


def read_predictions(path: Path) -> Predictions:
    """Read a file of predictions, and return the predicted captions as {pair_id: caption}.

    Raises ValueError with file and line or entry for a wrong one, and for a file without predictions.
    """
    predictions = {pair_id: row["prediction"] for pair_id, row in _read(path, "prediction").items()}
    if not predictions:
        raise ValueError(f"{path}: must have one line per pair, but is empty; write predictions first, for "
                         "example with 'onediff predict'")
    return predictions


def read_references(path: Path) -> list[dict[str, Any]]:
    """Read a file of references, and return one row for each pair, with `pair_id`, `references` and further keys.

    Raises ValueError with file and line or entry for a wrong one, and for a file without references.
    """
    rows = [*_read(path, "references").values()]
    if not rows:
        raise ValueError(f"{path}: must have one line per pair, but is empty; the command 'onediff references' writes "
                         "such a file")
    return rows


def write_predictions(path: Path, predictions: Iterable[tuple[str, str]], form: Form = "jsonl") -> int:
    """Write (pair_id, caption) for each pair to a file, and return the number of pairs."""
    if form == "jsonl":
        return write_jsonl(path, ({"pair_id": pair_id, "prediction": text} for pair_id, text in predictions))
    results = [{"image_id": pair_id, "caption": text} for pair_id, text in predictions]
    write_json(path, results, ensure_ascii=False)
    return len(results)


def write_references(path: Path, rows: Iterable[Mapping[str, Any]], form: Form = "jsonl") -> int:
    """Write rows with `pair_id`, `references` and EXTRAS to a file, and return the number of rows."""
    if form == "jsonl":
        return write_jsonl(path, ({key: row[key] for key in ("pair_id", "references", *EXTRAS)} for row in rows))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        images.append({"id": row["pair_id"], **{key: row[key] for key in EXTRAS}})
        annotations += [{"id": number, "image_id": row["pair_id"], "caption": text}
                        for number, text in enumerate(row["references"], len(annotations))]
    write_json(path, {"info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations},
               ensure_ascii=False)
    return len(images)


def is_coco(value: Any) -> bool:
    """Return whether a JSON value has the format of COCO: results, or images with annotations."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict) and "image_id" in value[0]
    return isinstance(value, dict) and "annotations" in value


def _read(path: Path, field: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a file of predictions or references as {pair_id: row}; `field` is a key of each row."""
    try:
        text = read_text(path, "a JSON Lines file")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; give a JSON Lines file whose lines have 'pair_id' and "
                                f"'{field}', or a file in the format of COCO") from None
    places: Iterable[tuple[str, Any]]
    if text.lstrip().startswith("[") or is_coco(_first_value(text)):
        value = parse_json(text, str(path))
        if is_coco(value):
            return _read_coco(value, path, field)
        places = ((f"{path} entry {number}", entry) for number, entry in enumerate(value, 1))
    else:
        places = parse_lines(text.split("\n"), path)
    rows: dict[str, dict[str, Any]] = {}
    for place, entry in places:
        pair_id = _pair_id(entry, "pair_id", field, place)
        _check_value(entry[field], field, place)
        if pair_id in rows:
            raise ValueError(f"{place}: each pair_id must be unique, but an earlier line has the same pair_id "
                             f"({pair_id!r}); remove one of the two")
        rows[pair_id] = entry | {"pair_id": pair_id}
    return rows


def _first_value(text: str) -> Any:
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError):
        return None  # Reading the text as JSON Lines raises an error that names the line.


def _read_coco(value: Any, path: Path, field: str) -> dict[str, dict[str, Any]]:
    """Return the captions of COCO results or annotations as `_read` does."""
    if isinstance(value, list):
        rows: dict[str, dict[str, Any]] = {}
        captions, what = value, "entry"
    elif field == "prediction":
        raise ValueError(f"{path}: must contain predictions, but contains annotations of COCO, which are references; "
                         'give a list of {"image_id", "caption"}')
    else:
        rows, what = _images(value, path), "annotation"
        captions = expect(value["annotations"], list, f"{path}, annotations")
    listed = set(rows)
    for number, entry in enumerate(captions, 1):
        place = f"{path} {what} {number}"
        pair_id = _pair_id(entry, "image_id", "caption", place)
        _check_value(entry["caption"], "caption", place)
        if listed and pair_id not in listed:
            raise ValueError(f"{place}: image_id {pair_id!r} must be the id of one of the images, but is not; add the "
                             "image, or remove this annotation")
        if field == "references":  # All captions of an image are its references.
            rows.setdefault(pair_id, {"pair_id": pair_id, "references": []})["references"].append(entry["caption"])
        elif pair_id in rows:
            raise ValueError(f"{place}: each image_id must have one prediction, but an earlier entry has the same "
                             f"image_id ({pair_id!r}); remove one of the two")
        else:
            rows[pair_id] = {"pair_id": pair_id, "prediction": entry["caption"]}
    return rows


def _images(value: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return a row without references for each image that a file of COCO annotations lists."""
    rows: dict[str, dict[str, Any]] = {}
    for number, image in enumerate(expect(value.get("images", []), list, f"{path}, images"), 1):
        pair_id = _pair_id(image, "id", "id", f"{path} image {number}")
        extras = {key: image[key] for key in EXTRAS if key in image}
        rows[pair_id] = {"pair_id": pair_id, "references": [], **extras}
    return rows


def _pair_id(entry: Any, key: str, field: str, place: str) -> str:
    """Return the id of an entry as a string. Raises ValueError unless it is an object with a valid id and `field`."""
    names = " and ".join(f"'{name}'" for name in dict.fromkeys((key, field)))
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be a JSON object with {names}, got {_shown(entry)}; correct this line")
    missing = [name for name in dict.fromkeys((key, field)) if name not in entry]
    if missing:
        raise ValueError(f"{place}: must have {names}, but lacks {missing}; add what is missing")
    if not isinstance(entry[key], str | int) or isinstance(entry[key], bool):
        raise ValueError(f"{place}: '{key}' must be a string or a whole number, got {_shown(entry[key])}; write it in "
                         "quotes")
    return str(entry[key])


def _check_value(value: Any, field: str, place: str) -> None:
    if field == "references":
        check_texts(value, "'references'", place)
    elif not isinstance(value, str):
        raise ValueError(f"{place}: '{field}' must be a string, got {_shown(value)}; write the caption in quotes, or "
                         '"" for a pair without a caption')


def check_texts(texts: Any, name: str, place: str) -> None:
    """Raise ValueError, which names `place`, unless `texts` is a list of strings."""
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{place}: {name} must be a list of strings, got {_shown(texts)}; write a list such as "
                         '["a car has left"]')


def _shown(value: Any) -> str:
    """Return the first 60 characters of a value as JSON text, for a message."""
    return json.dumps(value, ensure_ascii=False)[:60]
