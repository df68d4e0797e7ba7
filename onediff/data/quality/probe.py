"""Writes the probe table: one row for every pair, good or bad, with facts about the images and captions.

The probe does not judge the pairs; checks.py applies the validation rules to this table.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Runtime
from onediff.data.parallel import spread
from onediff.data.record import SCHEMA as RECORD_SCHEMA
from onediff.data.record import Record, digest, open_shard, read_row_group, shards
from onediff.files import new_file
from onediff.inputs.images import Decoded, decode

if TYPE_CHECKING:
    from onediff.data.embedding import Embedder

SIDES = ("before", "after")
_NAMES = ("pair_id", "source", "split", "group_id", "change_type")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_NAMES, "listed_as", "official_split", "name_before", "name_after")]
    + [("num_images", pa.int64()), ("decodes", pa.bool_()), ("num_missing_images", pa.int64()), ("error", pa.string())]
    + [(name, pa.int64()) for name in ("width_before", "height_before", "width_after", "height_after")]
    + [(name, pa.string()) for name in ("mode", "notes", "hash_before", "hash_after")]
    + [("phash_before", pa.uint64()), ("phash_after", pa.uint64())]
    + [("distance", pa.float64()), ("clip_distance", pa.float64())]
    + [(name, pa.int64()) for name in ("num_references", "min_words", "max_words", "num_empty_references")]
    + [("has_bad_text", pa.bool_()), ("control_words", pa.string())]
    + [("language", pa.string()), ("language_score", pa.float64())])
# Text is bad if it contains control characters, lone surrogates, line separators or paragraph separators.
# Text is also bad if it contains U+FFFD, the character that replaces bytes which are not UTF-8.
_BAD_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\ufffd]")
# Words that look like the control tokens of a language model, such as <image>, </s>, <|endoftext|> and [INST].
_CONTROL_WORD = re.compile(r"<[^<>\s]+>|\[/?[A-Z]{3,}\]")
_LINES = str.maketrans("\n\t", "  ")
# fewest words of a text whose language is checked, because py3langid only guesses for short texts
MIN_LANGUAGE_WORDS = 12
_MISSING = " is missing"
_ROWS = 4096  # number of rows of the probe table that are written at once
_EMBEDDED = 16  # number of pairs whose images CLIP embeds in one batch
# Texts are read as bytes, because pyarrow raises an error for text that is not UTF-8.
_AS_BYTES = {field.name: pa.binary() for field in RECORD_SCHEMA if field.type == pa.string()} \
    | {"references": pa.list_(pa.binary())}

Images = dict[str, Decoded]


def probe_record(record: Record, *, max_megapixels: float, listed_as: str = "") -> dict[str, Any]:
    """Return the row of the probe table for one record.

    Image sizes are in pixels and 0 for images that are missing or cannot be decoded; `distance` is in grey levels and
    None unless there are two images; `notes` says which metadata of the images could not be used, for example an
    orientation. `listed_as` is the name of the source in params.yaml, which may differ from record.source: for example,
    records with the source `scenes_far` are generated for the listed source `scenes`.
    """
    return _row(record, *_open_images(record, max_megapixels), listed_as)


def probe_folders(folders: Mapping[str, Path], *, max_megapixels: float, clip: str | None,
                  runtime: Runtime) -> Iterator[pa.Table]:
    """Yield the probe table in parts: for each row group of the shards, a table with one row per pair.

    `folders` maps the name of each source in params.yaml to its folder. `clip` is a CLIP model for `clip_distance`, or
    None. Raises FileNotFoundError if a folder has no shards, and ValueError if a shard is broken or has wrong columns.
    """
    parts = [(source, path, group) for source, folder in folders.items()
             for path in shards(folder) for group in range(open_shard(path).num_row_groups)]
    make = functools.partial(_Prober, max_megapixels=max_megapixels, clip=clip, device=runtime.device)
    yield from spread(make, parts, runtime, chunk=4, num_gpus=0.25 if clip else 0)


def count_pairs(folder: Path) -> int:
    """Return the number of pairs in all shards of the folder."""
    return sum(open_shard(path).metadata.num_rows for path in shards(folder))


def write_table(tables: Iterable[pa.Table], path: Path) -> None:
    """Write the parts of the probe table to one Parquet file, with a few thousand rows in memory at a time."""
    waiting = SCHEMA.empty_table()
    with new_file(path) as part, pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer:
        for table in tables:
            waiting = pa.concat_tables([waiting, table])
            while len(waiting) >= _ROWS:
                writer.write_table(waiting.slice(0, _ROWS))
                waiting = waiting.slice(_ROWS)
        writer.write_table(waiting)


class _Prober:
    """A worker that returns the rows of the probe table for one row group of a shard at a time.

    If `clip` is given, the worker loads this CLIP model and also computes `clip_distance`.
    """

    def __init__(self, *, max_megapixels: float, clip: str | None, device: str) -> None:
        self.max_megapixels = max_megapixels
        self.embedder: Embedder | None = None
        if clip is not None:
            from onediff.data.embedding import Embedder

            self.embedder = Embedder(clip, device)

    def __call__(self, part: tuple[str, Path, int]) -> pa.Table:
        listed_as, path, group = part
        rows: list[dict[str, Any]] = []
        waiting: list[tuple[dict[str, Any], Images]] = []
        for record in read_group(path, group):
            images, errors = _open_images(record, self.max_megapixels)
            rows.append(_row(record, images, errors, listed_as))
            if self.embedder is not None and len(images) == 2:
                waiting.append((rows[-1], images))
            if len(waiting) == _EMBEDDED:
                self._embed(waiting)
                waiting = []
        self._embed(waiting)
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _embed(self, waiting: list[tuple[dict[str, Any], Images]]) -> None:
        """Add `clip_distance` to the given rows: 1 - cosine of the two image embeddings (0: equal, 2: opposite)."""
        if self.embedder is None or not waiting:
            return
        vectors = self.embedder.images([images[side].image for _, images in waiting for side in SIDES])
        for (row, _), before, after in zip(waiting, vectors[::2], vectors[1::2], strict=True):
            row["clip_distance"] = round(1 - float(before @ after), 5)


def row_groups(folders: Iterable[Path]) -> Iterator[tuple[Path, int, int, int]]:
    """Yield (path of the shard, number of the row group, start, end) for every row group in the folders, in order.

    The records of the row group have the positions start to end - 1, counted over all shards of all folders. Row i of
    the probe table is about the record at position i. Raises ValueError if a shard is broken or has wrong columns.
    """
    start = 0
    for path in itertools.chain.from_iterable(map(shards, folders)):
        metadata = open_shard(path).metadata
        for group in range(metadata.num_row_groups):
            end = start + metadata.row_group(group).num_rows
            yield path, group, start, end
            start = end


def row_groups_with(folders: Iterable[Path],
                    places: NDArray[np.int64]) -> Iterator[tuple[Path, int, NDArray[np.int64], slice]]:
    """Yield (path of the shard, number of the row group, rows, part) for every row group with a requested record.

    `places` holds the sorted positions of the requested records, counted over all shards of all folders. `rows` holds
    the row numbers of the requested records inside the row group, and `places[part]` holds their positions.
    """
    for path, group, start, end in row_groups(folders):
        low, high = np.searchsorted(places, [start, end])
        if low < high:
            yield path, group, places[low:high] - start, slice(low, high)


def read_group(path: Path, group: int) -> Iterator[Record]:
    """Yield the records of one row group of a shard, where `group` is the number of the row group.

    Unlike `read_records`, this function accepts text that is not UTF-8 and replaces the wrong bytes by U+FFFD. Raises
    ValueError if the shard is broken or has wrong columns.
    """
    table = read_row_group(path, group)
    columns = {name: table[name].cast(_AS_BYTES.get(name, table[name].type)) for name in table.column_names}
    for row in pa.table(columns).to_pylist():
        values: dict[str, Any] = {name: _text(row[name]) for name in _AS_BYTES if name != "references"}
        values |= {side: (row[side] or {}).get("bytes") or b"" for side in SIDES}
        values["references"] = [_text(reference) for reference in row["references"] or []]
        values["provenance"] = _provenance(values["provenance"])
        yield Record(**values, num_images=2 if row["num_images"] is None else row["num_images"])


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")


def _provenance(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}



def _row(record: Record, images: Images, errors: list[str], listed_as: str) -> dict[str, Any]:
    before, after, *_ = [*_texts(record.provenance.get("names")), "", ""]
    row: dict[str, Any] = {name: getattr(record, name) for name in _NAMES}
    row |= {"listed_as": listed_as, "official_split": str(record.provenance.get("official_split") or ""),
            "name_before": before, "name_after": after,
            "num_images": record.num_images, "decodes": not errors, "error": "; ".join(errors),
            "num_missing_images": sum(error.endswith(_MISSING) for error in errors)}
    row["mode"] = "|".join(sorted({decoded.mode for decoded in images.values()}))
    row["notes"] = "; ".join(f"{side}: {note}" for side, decoded in images.items() for note in decoded.notes)
    greys = {side: decoded.image.convert("L") for side, decoded in images.items()}
    for side in SIDES:
        row |= {f"width_{side}": 0, f"height_{side}": 0, f"hash_{side}": "", f"phash_{side}": 0}
    for side, decoded in images.items():
        image = decoded.image
        size = f"{image.width}x{image.height}:".encode()
        row |= {f"width_{side}": image.width, f"height_{side}": image.height,
                f"hash_{side}": digest(size + image.tobytes()), f"phash_{side}": difference_hash(greys[side])}
    cells = [_cells(grey, 32, 32) for grey in greys.values()]
    row["distance"] = float(np.abs(cells[0] - cells[1]).mean()) if len(cells) == 2 else None
    return row | {"clip_distance": None} | _text_facts(record)


def _open_images(record: Record, max_megapixels: float) -> tuple[Images, list[str]]:
    """Return the decoded images of the record, and an error message for each image that cannot be decoded."""
    images, errors = {}, []
    missing, names = (_texts(record.provenance.get(key)) for key in ("missing", "names"))
    for number, side in enumerate(SIDES[: record.num_images]):
        content = getattr(record, side)
        if not content and missing:
            named = number < len(names) and names[number] in missing
            errors.append(f"{side}: {names[number] if named else ' or '.join(missing)}{_MISSING}")
            continue
        try:
            images[side] = decode(content, max_megapixels=max_megapixels)
        except ValueError as error:
            errors.append(f"{side} {error}")
    return images, errors


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def difference_hash(image: Image.Image) -> int:
    """Return a perceptual hash of 64 bits, in which similar images differ in only a few bits.

    Each bit is 1 if a cell of a coarse grid is darker than the cell to the right of it.
    """
    cells = _cells(image.convert("L"), 9, 8)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def _cells(grey: Image.Image, width: int, height: int) -> NDArray[np.int16]:
    return np.asarray(grey.resize((width, height), Image.Resampling.BOX)).astype(np.int16)


def _text_facts(record: Record) -> dict[str, Any]:
    words = [len(reference.split()) for reference in record.references]
    texts = [*record.references, record.instruction]
    if record.num_images < 2:
        # General instruction data may contain line breaks and tabs, because these texts are never scored.
        texts = [text.translate(_LINES) for text in texts]
    control_words = dict.fromkeys(word for text in texts for word in _CONTROL_WORD.findall(text))
    texts += [getattr(record, name) for name in _NAMES]
    # A published test pair with only empty sentences is not an error, because papers score such pairs too.
    as_published = record.references == [""] and record.provenance.get("empty_references", 0) > 0
    language, score = _language(" ".join(record.references)) if sum(words) >= MIN_LANGUAGE_WORDS else ("", None)
    return {"num_references": len(words), "min_words": min(words, default=0), "max_words": max(words, default=0),
            "num_empty_references": 0 if as_published else words.count(0),
            "has_bad_text": any(map(is_bad_text, texts)), "control_words": " ".join(control_words),
            "language": language, "language_score": score}


def is_bad_text(text: str) -> bool:
    """Return whether the text contains U+FFFD, a control character, or a line separator.

    A line separator would make the PTB tokenizer split a caption, so that all later captions would be misaligned.
    """
    return _BAD_TEXT.search(text) is not None


@functools.lru_cache(maxsize=4096)
def _language(text: str) -> tuple[str, float]:
    """Return the language of the text as ISO 639-1 code, and its probability, both estimated by py3langid.

    The probability is rounded, because different processors add floating-point numbers in different orders.
    """
    code, score = _identifier().classify(text[:4096])
    return str(code), round(float(score), 3)


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
