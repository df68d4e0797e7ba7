"""A collection: images with a caption each, in a folder of files or in Parquet.

Layouts: images beside captions.csv or captions.jsonl (columns image, caption); images beside annotations in COCO's
JSON ({"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}); Parquet files with a column of
images (bytes, or datasets' {"bytes", "path"}) and a column of captions (caption, captions or text). Of several captions
of an image the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onediff.data.sources.entries import identity, part, read_csv, read_json, read_lines

TABLES = ("captions.csv", "captions.jsonl")
CAPTIONS = ("caption", "captions", "text")
SHOWN = 3


@dataclass(frozen=True)
class CaptionedImage:
    """`content` is the encoded image file."""

    name: str
    content: bytes
    caption: str


@dataclass(frozen=True)
class Entry:
    """Where an image stands: a file, or a row of a row group of a Parquet file."""

    name: str
    caption: str
    path: Path
    group: int = -1
    row: int = -1


def read_collection(folder: Path) -> Iterator[CaptionedImage]:
    """Every image with a caption, in order; one in memory at a time.

    Raises FileNotFoundError for a missing folder or missing images, ValueError for a broken or captionless one.
    """
    return load(list_collection(folder))


def list_collection(folder: Path) -> list[Entry]:
    """What `read_collection` reads, without the images. Raises as it does; names are unique."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found: put images and captions.csv there, or Parquet files "
                                "(data/README.md, Collections)")
    entries = list(_entries(folder))
    if not entries:
        raise ValueError(f"{folder}: no image with a caption in it; {' or '.join(TABLES)}, COCO's JSON, or Parquet "
                         "files are needed (data/README.md, Collections)")
    missing = [entry.name for entry in entries if not entry.path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(entries)} images are not there (first: "
                                f"{', '.join(missing[:SHOWN])}); get them, or take them off the list")
    return entries


def load(entries: Iterable[Entry]) -> Iterator[CaptionedImage]:
    """The images of the entries, in order."""
    for (path, group), rows in groupby(entries, lambda entry: (entry.path, entry.group)):
        if group < 0:
            yield from (CaptionedImage(entry.name, path.read_bytes(), entry.caption) for entry in rows)
            continue
        with pq.ParquetFile(path) as file:
            images = file.read_row_group(group, columns=[_image_column(path, file.schema_arrow)]).column(0)
        for entry in rows:
            value = images[entry.row].as_py()
            content = value["bytes"] if isinstance(value, dict) else value
            yield CaptionedImage(entry.name, content or b"", entry.caption)


def _entries(folder: Path) -> Iterator[Entry]:
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    parquet = sorted(folder.rglob("*.parquet"))
    coco = [] if tables or parquet else sorted(folder.rglob("*.json"))
    if len(tables) + bool(parquet) > 1:
        raise ValueError(f"{folder}: {', '.join(path.name for path in (*tables, *parquet[:1]))}: which of them? "
                         "leave only one there")
    seen: dict[str, str] = {}
    for place, entry in _listed(folder, tables, parquet, coco):
        if entry.name not in seen and entry.caption:
            seen[entry.name] = place
            yield entry


def _listed(folder: Path, tables: list[Path], parquet: list[Path], coco: list[Path]) -> Iterator[tuple[str, Entry]]:
    for path in tables:
        yield from _of_table(folder, path)
    for path in parquet:
        yield from _of_parquet(folder, path)
    for path in coco:
        yield from _of_coco(folder, path)


def _of_table(folder: Path, path: Path) -> Iterator[tuple[str, Entry]]:
    for place, row in read_csv(path) if path.suffix == ".csv" else read_lines(path):
        name = part(row, "image", str, place).strip()
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{place}: image must be a path below the folder, such as 1.jpg, got '{name}'")
        yield place, Entry(name, _one_line(part(row, "caption", str, place)), folder / name)


def _of_coco(folder: Path, path: Path) -> Iterator[tuple[str, Entry]]:
    told = read_json(path, dict)
    if not {"images", "annotations"} <= told.keys() or not any("caption" in row for row in told["annotations"][:1]):
        return  # such as the boxes that COCO ships beside its captions
    names = {identity(image, "id", str(path)): part(image, "file_name", str, str(path)) for image in told["images"]}
    wanted = set(names.values())
    files = {file.name: file for file in folder.rglob("*") if file.name in wanted}
    for number, annotation in enumerate(told["annotations"], 1):
        place = f"{path} annotation {number}"
        name = names.get(identity(annotation, "image_id", place))
        if name is None:
            raise ValueError(f"{place}: image_id {annotation['image_id']} is none of the images; take the file as "
                             "published")
        caption = _one_line(part(annotation, "caption", str, place))
        yield place, Entry(name, caption, files.get(name, folder / name))


def _of_parquet(folder: Path, path: Path) -> Iterator[tuple[str, Entry]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())}); get it again") from None
    with file:
        _image_column(path, file.schema_arrow)
        column = next((name for name in CAPTIONS if name in file.schema_arrow.names), None)
        if column is None:
            raise ValueError(f"{path}: no column {', '.join(CAPTIONS)}; got {', '.join(file.schema_arrow.names)}")
        for group in range(file.num_row_groups):
            for row, value in enumerate(file.read_row_group(group, columns=[column]).column(0).to_pylist()):
                name = f"{path.relative_to(folder)}#{group}.{row}"
                yield name, Entry(name, _first(value), path, group, row)


def _image_column(path: Path, schema: pa.Schema) -> str:
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(field.name)
    raise ValueError(f"{path}: no column of images (bytes, or a struct with bytes); got {', '.join(schema.names)}")


def _first(value: Any) -> str:
    texts = value if isinstance(value, list) else [value]
    return next((_one_line(text) for text in texts if isinstance(text, str) and text.strip()), "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
