"""Reads a collection: a folder of single images with one caption each, as image files or in Parquet.

A collection has one of three layouts:
1. images and captions.csv or captions.jsonl (columns image, caption);
2. images and annotations in the JSON format of COCO
   ({"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]});
3. Parquet files with an image column (bytes, or the {"bytes", "path"} of Hugging Face datasets) and a caption column
   (caption, captions or text).
If an image has several captions, only the first is used.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from onediff.data.sources.entries import identity, is_address, one_line, part
from onediff.files import find_file, nfc
from onediff.text_files import read_json, read_lines, read_table

TABLES = ("captions.csv", "captions.jsonl")
CAPTIONS = ("caption", "captions", "text")
SHOWN = 3


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a collection with its caption; `content` holds the bytes of the image file."""

    name: str
    content: bytes
    caption: str


@dataclass(frozen=True)
class Entry:
    """One captioned image of a collection, and where it is stored: in an image file, or in a row of a Parquet file.

    `group` is the number of the Parquet row group and `row` the number of the row in it; for an image file, both are
    -1.
    """

    name: str
    caption: str
    path: Path
    group: int = -1
    row: int = -1


def list_collection(folder: Path) -> list[Entry]:
    """List the captioned images of the collection in `folder`, in the order of its caption files, each image once.

    Raises FileNotFoundError if the folder or an image does not exist. Raises ValueError if a file is broken, if there
    are several kinds of caption files, or if no image has a caption.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: put images and captions.csv, or Parquet files, into this "
                                "folder (data/README.md, Collections)")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    parquet = sorted(folder.rglob("*.parquet"))
    if len(tables) + bool(parquet) > 1:
        raise ValueError(f"{folder}: must contain one kind of caption file, got "
                         f"{', '.join(path.name for path in (*tables, *parquet[:1]))}; keep only one of them")
    read = _of_table if tables else _of_parquet if parquet else _of_coco
    entries: dict[str, Entry] = {}
    for path in tables or parquet or sorted(folder.rglob("*.json")):
        for entry in read(folder, path):
            if entry.caption:
                entries.setdefault(entry.name, entry)
    if not entries:
        raise ValueError(f"{folder}: contains no image with a caption; add {' or '.join(TABLES)}, a JSON file in the "
                         "format of COCO, or Parquet files (data/README.md, Collections)")
    found = {name: find_file(entry.path) for name, entry in entries.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(entries)} images do not exist (first: "
                                f"{', '.join(missing[:SHOWN])}); add them, or remove them from the caption file")
    return [replace(entries[name], path=path) for name, path in found.items() if path]


def load(entries: Iterable[Entry]) -> Iterator[CaptionedImage]:
    """Read the image of each entry and yield it with its caption, in the order of the entries."""
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
    for place, row in read_table(path) if path.suffix == ".csv" else read_lines(path):
        name = part(row, "image", str, place).strip()
        if is_address(name):
            raise ValueError(f"{place}: image must be an image file below the folder, got the address '{name[:200]}'; "
                             "download the image, and write the path of the file")
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{place}: image must be a path below the folder of the collection, such as 1.jpg, got "
                             f"'{name}'; correct the path")
        yield Entry(name, one_line(part(row, "caption", str, place)), folder / name)


def _of_coco(folder: Path, path: Path) -> Iterator[Entry]:
    content = read_json(path, dict)
    is_coco = {"images", "annotations"} <= content.keys()
    if not is_coco or not any("caption" in row for row in content["annotations"][:1]):
        return  # COCO also publishes JSON files without captions, for example with object boxes.
    names = {identity(image, "id", str(path)): part(image, "file_name", str, str(path)) for image in content["images"]}
    listed = set(map(nfc, names.values()))
    files = {nfc(file.name): file for file in folder.rglob("*") if nfc(file.name) in listed}
    for number, annotation in enumerate(content["annotations"], 1):
        place = f"{path} annotation {number}"
        name = names.get(identity(annotation, "image_id", place))
        if name is None:
            raise ValueError(f"{place}: image_id {annotation['image_id']} is not in the file's list of images; "
                             "download the published file again")
        yield Entry(name, one_line(part(annotation, "caption", str, place)), files.get(nfc(name), folder / name))


def _of_parquet(folder: Path, path: Path) -> Iterator[Entry]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a complete Parquet file ({one_line(str(error))}); download it again") from None
    with file:
        _image_column(path, file.schema_arrow)
        column = next((name for name in CAPTIONS if name in file.schema_arrow.names), None)
        if column is None:
            raise ValueError(f"{path}: must have a column of captions called {', '.join(CAPTIONS[:-1])} or "
                             f"{CAPTIONS[-1]}, got {', '.join(file.schema_arrow.names)}; rename a column")
        for group in range(file.num_row_groups):
            for row, value in enumerate(file.read_row_group(group, columns=[column]).column(0).to_pylist()):
                texts = value if isinstance(value, list) else [value]
                caption = next((text for text in texts if isinstance(text, str) and text.strip()), "")
                yield Entry(f"{path.relative_to(folder)}#{group}.{row}", one_line(caption), path, group, row)


def _image_column(path: Path, schema: pa.Schema) -> str:
    """Return the name of a Parquet file's first column of images. Raises ValueError if no column contains images."""
    for field in schema:
        has_bytes = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if has_bytes or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            return str(field.name)
    raise ValueError(f"{path}: must have a column of images (bytes, or a struct with a field 'bytes'), got only the "
                     f"columns {', '.join(schema.names)}; write the images into the file")
