"""The DiffCap record (an image pair, its references and its origin), and reading and writing records in Parquet.

A data set is a folder of Parquet files, called shards, that contain the encoded images.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from onediff.inputs.formats import FORMATS, HEAD, format_of

Split = Literal["train", "val", "gate", "test"]
# The order of the splits must not change, because the position of a split is part of the seed of generated pairs.
# If two splits contain equal pairs, the pair in the split that comes first in this order is reported as leaked.
SPLITS: tuple[Split, ...] = get_args(Split)
GENERAL = "general"  # the change type of general instruction data, which has one image or none
ROW_GROUP = 64  # number of pairs in a Parquet row group, the unit that is read into memory at once


@dataclass(frozen=True)
class Record:
    """One image pair with its reference captions and its origin.

    `before` and `after` hold the bytes of image files. `group_id` identifies the base scene, photograph or video of the
    pair; pairs of one group stay in one split. A record of general instruction data has one image (`before`) or no
    image: then `num_images` is 1 or 0, and an absent image is stored as empty bytes.
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
        """Return the encoded images of the record: two for an image pair, otherwise one or none."""
        return (self.before, self.after)[: self.num_images]


_TEXTS = ("pair_id", "source", "split", "group_id", "instruction", "change_type")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXT_FEATURE = {"dtype": "string", "_type": "Value"}
_FEATURES = {"before": {"_type": "Image"}, "after": {"_type": "Image"},
             "references": {"feature": _TEXT_FEATURE, "_type": "List"},
             **dict.fromkeys((*_TEXTS, "provenance"), _TEXT_FEATURE),
             "num_images": {"dtype": "int64", "_type": "Value"}}
SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [("before", _IMAGE), ("after", _IMAGE), ("references", pa.list_(pa.string())), ("provenance", pa.string()),
       ("num_images", pa.int64())],
    # With this metadata, datasets.load_dataset decodes the image columns.
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def digest(content: bytes) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of the content."""
    return hashlib.sha256(content).hexdigest()[:32]


def write_shards(records: Iterable[Record], folder: Path, prefix: str, *, shard_pairs: int) -> int:
    """Write the records to <folder>/<prefix>-00000.parquet, <prefix>-00001.parquet and so on.

    Return the number of records. Each file holds at most `shard_pairs` records. Only one Parquet row group at a time is
    in memory. Writing the same records again gives the same bytes.
    """
    return write_tables(_tables(records), folder, prefix, shard_pairs=shard_pairs)


def _tables(records: Iterable[Record]) -> Iterator[pa.Table]:
    rest = iter(records)
    while group := list(itertools.islice(rest, ROW_GROUP)):
        yield pa.Table.from_pylist([_row(record) for record in group], schema=SCHEMA)


def _row(record: Record) -> dict[str, Any]:
    row = asdict(record) | {"provenance": json.dumps(record.provenance, sort_keys=True)}
    for number, side in enumerate(("before", "after")):
        ending = FORMATS[format_of(row[side][:HEAD]) or "PNG"][0]
        image = {"bytes": row[side], "path": f"{record.pair_id}_{side}{ending}"}
        row[side] = image if number < record.num_images else None
    return row


def write_tables(tables: Iterable[pa.Table], folder: Path, prefix: str, *, shard_pairs: int) -> int:
    """Write the rows of Arrow tables to shards, as `write_shards` does with records; return the number of rows.

    The tables must have the columns of SCHEMA, and may have any number of rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [min(ROW_GROUP, shard_pairs - start) for start in range(0, shard_pairs, ROW_GROUP)]
    groups, total = _in_sizes(tables, itertools.cycle(sizes)), 0
    for shard in itertools.count():
        first = next(groups, None)
        if first is None:
            return total
        with pq.ParquetWriter(folder / f"{prefix}-{shard:05d}.parquet", SCHEMA, compression="zstd") as writer:
            for group in itertools.chain([first], itertools.islice(groups, len(sizes) - 1)):
                writer.write_table(group)
                total += len(group)
    raise AssertionError("unreachable")


def _in_sizes(tables: Iterable[pa.Table], sizes: Iterator[int]) -> Iterator[pa.Table]:
    """Yield all rows of the tables as new tables with the given numbers of rows; the last table may be smaller."""
    rest, size = SCHEMA.empty_table(), next(sizes)
    for table in tables:
        rest = pa.concat_tables([rest, table])
        while len(rest) >= size:
            yield rest.slice(0, size).combine_chunks()
            rest, size = rest.slice(size), next(sizes)
    if len(rest):
        yield rest.combine_chunks()


def shards(folder: Path, pattern: str = "*.parquet") -> list[Path]:
    """Return the paths of the folder's Parquet files in order. Raises FileNotFoundError if there is none."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder}/{pattern} does not exist: create it with 'dvc repro', or see data/README.md")
    return paths


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard. Raises ValueError if the file is broken or does not have the columns of a record."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a complete Parquet file ({reason}); create it again with 'dvc repro'") from None
    kinds = [{field.name: field.type for field in schema} for schema in (SCHEMA, file.schema_arrow)]
    if kinds[0] != kinds[1]:
        rule, got = (", ".join(f"{name} ({kind})" for name, kind in columns.items()) for columns in kinds)
        raise ValueError(f"{path}: the columns must be {rule}; got {got}; create the file again with 'dvc repro'")
    return file


def read_row_group(path: Path, group: int, columns: list[str] | None = None) -> pa.Table:
    """Return a row group of a shard, with all or some columns; `group` is the number of the row group.

    Raises ValueError if the shard is broken or does not have the columns of a record.
    """
    return _row_group(open_shard(path), path, group, columns)


def _row_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    file = open_shard(path)
    return (_row_group(file, path, group, columns) for group in range(file.num_row_groups))


def _row_group(file: pq.ParquetFile, path: Path, group: int, columns: list[str] | None) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: row group {group} cannot be read ({reason}); create the file again with "
                         "'dvc repro'") from None


def read_records(folder: Path, pattern: str = "*.parquet") -> Iterator[Record]:
    """Yield every record of the folder's shards whose file name matches `pattern`, in order.

    Only one Parquet row group at a time is in memory.
    """
    for path in shards(folder, pattern):
        for table in _row_groups(path):
            for row in table.to_pylist():
                row |= {side: row[side]["bytes"] if row[side] else b"" for side in ("before", "after")}
                yield Record(**row | {"provenance": json.loads(row["provenance"])})


def read_table(folder: Path, pattern: str = "*.parquet") -> list[dict[str, Any]]:
    """Return every record of the folder's shards whose file name matches `pattern`, as a dict without the images."""
    columns = [name for name in SCHEMA.names if name not in ("before", "after")]
    return [row | {"provenance": json.loads(row["provenance"])} for path in shards(folder, pattern)
            for table in _row_groups(path, columns) for row in table.to_pylist()]
