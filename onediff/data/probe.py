"""One row per pair, good or bad: what its images and captions are. Judging them is the business of checks.py."""

from __future__ import annotations

import functools
import io
import json
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from onediff.data.record import SCHEMA as RECORD_SCHEMA
from onediff.data.record import Record, digest, shards
from onediff.inputs.images import open_image

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("pair_id", "source", "split", "group_id", "change_type")]
    + [("decodes", pa.bool_()), ("error", pa.string())]
    + [(name, pa.int64()) for name in ("width_before", "height_before", "width_after", "height_after")]
    + [(name, pa.string()) for name in ("mode", "hash_before", "hash_after")]
    + [("phash_before", pa.uint64()), ("phash_after", pa.uint64()), ("distance", pa.float64())]
    + [(name, pa.int64()) for name in ("num_references", "min_words", "max_words", "num_empty_references")]
    + [("has_bad_text", pa.bool_())])
_BAD_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # control characters, half characters, line and paragraph separators


def probe_record(record: Record, *, max_megapixels: float) -> dict[str, Any]:
    """The pair's row: sizes in pixels, hashes of decoded pixels, `distance` in grey levels; 0 if one cannot be read."""
    row = {name: getattr(record, name) for name in ("pair_id", "source", "split", "group_id", "change_type")}
    images, errors = {}, []
    for side in ("before", "after"):
        try:
            images[side] = open_image(getattr(record, side), max_megapixels=max_megapixels)
        except ValueError as error:
            errors.append(f"{side} {error}")
    row |= {"decodes": not errors, "error": "; ".join(errors)}
    row["mode"] = "|".join(sorted({_mode(getattr(record, side)) for side in images}))
    for side in ("before", "after"):
        row |= {f"{name}_{side}": value for name, value in _image_facts(images.get(side)).items()}
    row["distance"] = 0.0 if errors else _distance(images["before"], images["after"])
    return row | _text_facts(record)


def probe_folder(folder: Path, *, max_megapixels: float, workers: int) -> Iterator[dict[str, Any]]:
    """A row for every pair of the folder's shards, in order; each process reads one row group at a time.

    Raises FileNotFoundError if there are no shards, ValueError for a shard that is no Parquet file.
    """
    parts = [(path, group) for path in shards(folder) for group in range(_open(path).num_row_groups)]
    with ProcessPoolExecutor(workers) as pool:
        for rows in pool.map(functools.partial(_probe_part, max_megapixels=max_megapixels), parts):
            yield from rows


def count_pairs(folder: Path) -> int:
    return sum(_open(path).metadata.num_rows for path in shards(folder))


def read_raw(folder: Path) -> Iterator[Record]:
    """Every record of the folder's shards, like read_records, but bytes that are not UTF-8 become U+FFFD."""
    for path in shards(folder):
        for group in range(_open(path).num_row_groups):
            yield from _read_part(path, group)


def write_rows(rows: Iterator[dict[str, Any]], path: Path) -> int:
    """The probe table as one Parquet file, a few thousand rows in memory at a time; returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    total, part = 0, []
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for row in rows:
            part.append(row)
            if len(part) == 4096:
                writer.write_table(pa.Table.from_pylist(part, schema=SCHEMA))
                total, part = total + len(part), []
        writer.write_table(pa.Table.from_pylist(part, schema=SCHEMA))
    return total + len(part)


# --- reading, whatever the bytes ---


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())}); make it again") from None
    if sorted(file.schema_arrow.names) != sorted(RECORD_SCHEMA.names):
        raise ValueError(
            f"{path}: its columns must be {', '.join(RECORD_SCHEMA.names)}; got {', '.join(file.schema_arrow.names)}"
        )
    return file


def _read_part(path: Path, group: int) -> Iterator[Record]:
    table = _open(path).read_row_group(group)
    # As bytes, because pyarrow would stop at text that is not UTF-8.
    columns = [column.cast(_as_bytes(column.type)) for column in table.columns]
    for row in pa.table(columns, names=table.column_names).to_pylist():
        values: dict[str, Any] = {side: (row.pop(side) or {}).get("bytes") or b"" for side in ("before", "after")}
        values["references"] = [_text(reference) for reference in row.pop("references") or []]
        values["provenance"] = _provenance(_text(row.pop("provenance")))
        values |= {name: _text(value) for name, value in row.items()}
        yield Record(**values)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    return pa.binary() if pa.types.is_string(kind) or pa.types.is_large_string(kind) else kind


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")


def _provenance(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _probe_part(part: tuple[Path, int], *, max_megapixels: float) -> list[dict[str, Any]]:
    return [probe_record(record, max_megapixels=max_megapixels) for record in _read_part(*part)]


# --- facts ---


def _image_facts(image: Image.Image | None) -> dict[str, Any]:
    if image is None:
        return {"width": 0, "height": 0, "hash": "", "phash": 0}
    size = f"{image.width}x{image.height}:".encode()
    return {
        "width": image.width,
        "height": image.height,
        "hash": digest(size + image.tobytes()),
        "phash": difference_hash(image),
    }


def _mode(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        return image.mode


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each cell of a grid is darker than its right neighbour. Near pictures differ in few bits."""
    grey = _grey(image, 9, 8)
    return int.from_bytes(np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes(), "big")


def _distance(before: Image.Image, after: Image.Image) -> float:
    return float(np.abs(_grey(before, 32, 32) - _grey(after, 32, 32)).mean())


def _grey(image: Image.Image, width: int, height: int) -> NDArray[np.int16]:
    return np.asarray(image.convert("L").resize((width, height), Image.Resampling.BOX)).astype(np.int16)


def _text_facts(record: Record) -> dict[str, Any]:
    words = [len(reference.split()) for reference in record.references]
    texts = [*record.references, record.instruction, record.pair_id, record.group_id]
    texts += [record.source, record.split, record.change_type]
    return {"num_references": len(words), "min_words": min(words, default=0), "max_words": max(words, default=0),
            "num_empty_references": words.count(0), "has_bad_text": any(is_bad_text(text) for text in texts)}


def is_bad_text(text: str) -> bool:
    """Whether it holds U+FFFD, a control character, or a line separator (PTB would shift all later captions)."""
    return any(char == "\ufffd" or unicodedata.category(char) in _BAD_CATEGORIES for char in text)
