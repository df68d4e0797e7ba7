"""The DiffCap record: one pair, its references and its origin; kept in Parquet shards with the image bytes inside."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 64  # pairs decoded together when streaming

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = {"before": {"_type": "Image"}, "after": {"_type": "Image"},
             "references": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}}


@dataclass(frozen=True)
class Record:
    """One pair. `before` and `after` are encoded image files; `group_id` names its base scene, photo or video.

    General instruction data has one image (`before`) or none: what is absent is empty, and `num_images` says so.
    """

    pair_id: str
    source: str
    split: str
    group_id: str
    before: bytes
    after: bytes
    references: list[str]
    instruction: str
    change_type: str
    provenance: dict[str, Any]
    num_images: int = 2

    @property
    def images(self) -> tuple[bytes, ...]:
        return (self.before, self.after)[: self.num_images]


_TEXT = [field.name for field in fields(Record)
         if field.name not in ("before", "after", "references", "provenance", "num_images")]
_FEATURES |= {name: {"dtype": "string", "_type": "Value"} for name in (*_TEXT, "provenance")}
_FEATURES |= {"num_images": {"dtype": "int64", "_type": "Value"}}
_ENDINGS = {b"\xff\xd8": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXT]
    + [("before", _IMAGE), ("after", _IMAGE), ("references", pa.list_(pa.string())), ("provenance", pa.string()),
       ("num_images", pa.int64())],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},  # datasets.load_dataset decodes the images
)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _row(record: Record) -> dict[str, Any]:
    row = asdict(record)
    for number, side in enumerate(("before", "after")):
        ending = next((ending for magic, ending in _ENDINGS.items() if row[side].startswith(magic)), "png")
        image = {"bytes": row[side], "path": f"{record.pair_id}_{side}.{ending}"}
        row[side] = image if number < record.num_images else None
    row["provenance"] = json.dumps(record.provenance, sort_keys=True)
    return row


def write_shards(records: Iterable[Record], folder: Path, prefix: str, *, shard_pairs: int) -> int:
    """Writes <folder>/<prefix>-00000.parquet and on, a row group in memory; returns the number of pairs.

    Same records, same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, total = iter(records), 0
    for shard in itertools.count():
        part = itertools.islice(rows, shard_pairs)
        group = list(itertools.islice(part, ROW_GROUP))
        if not group:
            return total
        with pq.ParquetWriter(folder / f"{prefix}-{shard:05d}.parquet", SCHEMA, compression="zstd") as writer:
            while group:
                writer.write_table(pa.Table.from_pylist([_row(record) for record in group], schema=SCHEMA))
                total += len(group)
                group = list(itertools.islice(part, ROW_GROUP))
    raise AssertionError("unreachable")


def shards(folder: Path, pattern: str = "*.parquet") -> list[Path]:
    """The shard files in order. Raises FileNotFoundError if there are none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder}/{pattern} not found: 'dvc repro' makes it, or see data/README.md")
    return found


def read_records(folder: Path, pattern: str = "*.parquet") -> Iterator[Record]:
    """Every record of the matching shards, in order, a row group in memory at a time."""
    for path in shards(folder, pattern):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=ROW_GROUP):
            for row in batch.to_pylist():
                row |= {side: row[side]["bytes"] if row[side] else b"" for side in ("before", "after")}
                row["provenance"] = json.loads(row["provenance"])
                yield Record(**row)


def read_table(folder: Path, pattern: str = "*.parquet") -> list[dict[str, Any]]:
    """Every row without its images: what scoring and reports need."""
    columns = [name for name in SCHEMA.names if name not in ("before", "after")]
    rows: list[dict[str, Any]] = []
    for path in shards(folder, pattern):
        rows += pq.read_table(path, columns=columns).to_pylist()
    for row in rows:
        row["provenance"] = json.loads(row["provenance"])
    return rows
