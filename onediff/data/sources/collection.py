"""A collection: images with a caption each, in a folder of files or in Parquet.

Layouts: images beside captions.csv or captions.jsonl (columns image, caption); images beside annotations in COCO's
JSON ({"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}); Parquet files with a column of
images (bytes, or datasets' {"bytes", "path"}) and a column of captions (caption, captions or text). Of several captions
of an image the first counts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from onediff.data.sources.entries import identity, one_line, part, read_csv, read_json, read_lines

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


def list_collection(folder: Path) -> list[Entry]:
    """Where each image with a caption stands, in order; names are unique.

    Raises FileNotFoundError for a missing folder or missing images, ValueError for a broken or captionless one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found: put images and captions.csv there, or Parquet files "
                                "(data/README.md, Collections)")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    parquet = sorted(folder.rglob("*.parquet"))
    if len(tables) + bool(parquet) > 1:
        raise ValueError(f"{folder}: {', '.join(path.name for path in (*tables, *parquet[:1]))}: which of them? "
                         "leave only one there")
    read = _of_table if tables else _of_parquet if parquet else _of_coco
    entries: dict[str, Entry] = {}
    for path in tables or parquet or sorted(folder.rglob("*.json")):
        for entry in read(folder, path):
            if entry.caption:
                entries.setdefault(entry.name, entry)
    if not entries:
        raise ValueError(f"{folder}: no image with a caption in it; {' or '.join(TABLES)}, COCO's JSON, or Parquet "
                         "files are needed (data/README.md, Collections)")
    missing = [entry.name for entry in entries.values() if not entry.path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(entries)} images are not there (first: "
                                f"{', '.join(missing[:SHOWN])}); get them, or take them off the list")
    return list(entries.values())


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


def _of_table(folder: Path, path: Path) -> Iterator[Entry]:
    for place, row in read_csv(path) if path.suffix == ".csv" else read_lines(path):
        name = part(row, "image", str, place).strip()
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{place}: image must be a path below the folder, such as 1.jpg, got '{name}'")
        yield Entry(name, one_line(part(row, "caption", str, place)), folder / name)


def _of_coco(folder: Path, path: Path) -> Iterator[Entry]:
    content = read_json(path, dict)
    is_coco = {"images", "annotations"} <= content.keys()
    if not is_coco or not any("caption" in row for row in content["annotations"][:1]):
        return  # such as the boxes that COCO ships beside its captions
    names = {identity(image, "id", str(path)): part(image, "file_name", str, str(path)) for image in content["images"]}
    listed = set(names.values())
    files = {file.name: file for file in folder.rglob("*") if file.name in listed}
    for number, annotation in enumerate(content["annotations"], 1):
        place = f"{path} annotation {number}"
        name = names.get(identity(annotation, "image_id", place))
        if name is None:
            raise ValueError(f"{place}: image_id {annotation['image_id']} is none of the images; take the file as "
                             "published")
        yield Entry(name, one_line(part(annotation, "caption", str, place)), files.get(name, folder / name))


def _of_parquet(folder: Path, path: Path) -> Iterator[Entry]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({one_line(str(error))}); get it again") from None
    with file:
        _image_column(path, file.schema_arrow)
        column = next((name for name in CAPTIONS if name in file.schema_arrow.names), None)
        if column is None:
            raise ValueError(f"{path}: no column {', '.join(CAPTIONS)}; got {', '.join(file.schema_arrow.names)}")
        for group in range(file.num_row_groups):
            for row, value in enumerate(file.read_row_group(group, columns=[column]).column(0).to_pylist()):
                texts = value if isinstance(value, list) else [value]
                caption = next((text for text in texts if isinstance(text, str) and text.strip()), "")
                yield Entry(f"{path.relative_to(folder)}#{group}.{row}", one_line(caption), path, group, row)


def _image_column(path: Path, schema: pa.Schema) -> str:
    for field in schema:
        has_bytes = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if has_bytes or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            return str(field.name)
    raise ValueError(f"{path}: no column of images (bytes, or a struct with bytes); got {', '.join(schema.names)}")
