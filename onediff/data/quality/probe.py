"""One row per pair, good or bad: what its images and captions are. Judging them is the business of checks.py."""

from __future__ import annotations

import functools
import io
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
from onediff.data.record import Record, digest, shards
from onediff.files import new_file
from onediff.inputs.images import FORMATS, open_image

if TYPE_CHECKING:
    from onediff.data.embedding import Embedder

SIDES = ("before", "after")
_NAMES = ("pair_id", "source", "split", "group_id", "change_type")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_NAMES, "listed_as", "official_split", "name_before", "name_after")]
    + [("num_images", pa.int64()), ("decodes", pa.bool_()), ("num_missing_images", pa.int64()), ("error", pa.string())]
    + [(name, pa.int64()) for name in ("width_before", "height_before", "width_after", "height_after")]
    + [(name, pa.string()) for name in ("mode", "hash_before", "hash_after")]
    + [("phash_before", pa.uint64()), ("phash_after", pa.uint64())]
    + [("distance", pa.float64()), ("clip_distance", pa.float64())]
    + [(name, pa.int64()) for name in ("num_references", "min_words", "max_words", "num_empty_references")]
    + [("has_bad_text", pa.bool_()), ("language", pa.string()), ("language_score", pa.float64())])
# Control characters, half characters, line and paragraph separators (Unicode's Cc, Cs, Zl, Zp), and what was no UTF-8.
_BAD_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\ufffd]")
_LINES = str.maketrans("\n\t", "  ")
MIN_LANGUAGE_WORDS = 12  # of fewer words py3langid guesses
_MISSING = " is missing"
_ROWS = 4096  # rows that are written together
_EMBEDDED = 16  # pairs whose images are embedded together
# Texts are read as bytes, because pyarrow would stop at text that is not UTF-8.
_AS_BYTES = {field.name: pa.binary() for field in RECORD_SCHEMA if field.type == pa.string()} \
    | {"references": pa.list_(pa.binary())}

Images = dict[str, Image.Image]


def probe_record(record: Record, *, max_megapixels: float, listed_as: str = "") -> dict[str, Any]:
    """The pair's row: sizes in pixels (0 if one cannot be read or is not there), hashes of decoded pixels, `distance`
    in grey levels (None unless there are two images), the language of its captions.

    `listed_as` is what params.yaml calls the source: scenes_far, for one, comes with scenes.
    """
    return _row(record, *_open_images(record, max_megapixels), listed_as)


def probe_folders(folders: Mapping[str, Path], *, max_megapixels: float, clip: str | None,
                  runtime: Runtime) -> Iterator[pa.Table]:
    """The rows of every pair in the folders' shards, in order, a row group at a time; sources by their listed name.

    Raises FileNotFoundError if a folder has no shards, ValueError for a shard that is broken or no record's.
    """
    parts = [(source, path, group) for source, folder in folders.items()
             for path in shards(folder) for group in range(_open(path).num_row_groups)]
    make = functools.partial(_Prober, max_megapixels=max_megapixels, clip=clip, device=runtime.device)
    yield from spread(make, parts, runtime, chunk=4, num_gpus=0.25 if clip else 0)


def count_pairs(folder: Path) -> int:
    return sum(_open(path).metadata.num_rows for path in shards(folder))


def write_table(tables: Iterable[pa.Table], path: Path) -> None:
    """The probe table as one Parquet file, a few thousand rows in memory at a time."""
    waiting = SCHEMA.empty_table()
    with new_file(path) as part, pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer:
        for table in tables:
            waiting = pa.concat_tables([waiting, table])
            while len(waiting) >= _ROWS:
                writer.write_table(waiting.slice(0, _ROWS))
                waiting = waiting.slice(_ROWS)
        writer.write_table(waiting)


class _Prober:
    """What a process needs to probe row groups of shards: a CLIP model, where one is named."""

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
        """Adds to the rows how far apart their images are for CLIP: 0 the same, 1 unrelated, 2 opposite."""
        if self.embedder is None or not waiting:
            return
        vectors = self.embedder.images([images[side] for _, images in waiting for side in SIDES])
        for (row, _), before, after in zip(waiting, vectors[::2], vectors[1::2], strict=True):
            row["clip_distance"] = round(1 - float(before @ after), 5)


# --- reading, whatever the bytes --------------------------------------------------------------------------------------


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())}); make it again") from None
    kinds = [{field.name: field.type for field in schema} for schema in (RECORD_SCHEMA, file.schema_arrow)]
    if kinds[0] != kinds[1]:
        rule, got = (", ".join(f"{name} ({kind})" for name, kind in columns.items()) for columns in kinds)
        raise ValueError(f"{path}: its columns must be {rule}; got {got}; make it again with 'dvc repro'")
    return file


def row_groups(folders: Iterable[Path]) -> Iterator[tuple[Path, int, int, int]]:
    """(shard, row group, place of its first record, of its last + 1), counted over all the folders' shards in order.

    Places are those of the probe table's rows. Raises ValueError for a shard that is broken or no record's.
    """
    start = 0
    for path in itertools.chain.from_iterable(map(shards, folders)):
        metadata = _open(path).metadata
        for group in range(metadata.num_row_groups):
            end = start + metadata.row_group(group).num_rows
            yield path, group, start, end
            start = end


def row_groups_with(folders: Iterable[Path],
                    places: NDArray[np.int64]) -> Iterator[tuple[Path, int, NDArray[np.int64], slice]]:
    """(shard, row group, rows of it, part of `places` that these rows are) where a row group has any of the places.

    `places` are those of `row_groups`, sorted.
    """
    for path, group, start, end in row_groups(folders):
        low, high = np.searchsorted(places, [start, end])
        if low < high:
            yield path, group, places[low:high] - start, slice(low, high)


def read_group(path: Path, group: int) -> Iterator[Record]:
    """The records of a shard's row group, like read_records, but bytes that are not UTF-8 become U+FFFD.

    Raises ValueError for a shard that is broken or no record's.
    """
    file = _open(path)
    try:
        table = file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: row group {group} is broken ({reason}); make it again with 'dvc repro'") from None
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


# --- facts ------------------------------------------------------------------------------------------------------------


def _row(record: Record, images: Images, errors: list[str], listed_as: str) -> dict[str, Any]:
    before, after, *_ = [*_texts(record.provenance.get("names")), "", ""]
    row: dict[str, Any] = {name: getattr(record, name) for name in _NAMES}
    row |= {"listed_as": listed_as, "official_split": str(record.provenance.get("official_split") or ""),
            "name_before": before, "name_after": after,
            "num_images": record.num_images, "decodes": not errors, "error": "; ".join(errors),
            "num_missing_images": sum(error.endswith(_MISSING) for error in errors)}
    modes = {Image.open(io.BytesIO(getattr(record, side)), formats=FORMATS).mode for side in images}
    row["mode"] = "|".join(sorted(modes))
    greys = {side: image.convert("L") for side, image in images.items()}
    for side in SIDES:
        row |= {f"width_{side}": 0, f"height_{side}": 0, f"hash_{side}": "", f"phash_{side}": 0}
    for side, image in images.items():
        size = f"{image.width}x{image.height}:".encode()
        row |= {f"width_{side}": image.width, f"height_{side}": image.height,
                f"hash_{side}": digest(size + image.tobytes()), f"phash_{side}": difference_hash(greys[side])}
    cells = [_cells(grey, 32, 32) for grey in greys.values()]
    row["distance"] = float(np.abs(cells[0] - cells[1]).mean()) if len(cells) == 2 else None
    return row | {"clip_distance": None} | _text_facts(record)


def _open_images(record: Record, max_megapixels: float) -> tuple[Images, list[str]]:
    """The images that can be read, and what is wrong with the others."""
    images, errors = {}, []
    missing, names = (_texts(record.provenance.get(key)) for key in ("missing", "names"))
    for number, side in enumerate(SIDES[: record.num_images]):
        content = getattr(record, side)
        if not content and missing:
            named = number < len(names) and names[number] in missing
            errors.append(f"{side}: {names[number] if named else ' or '.join(missing)}{_MISSING}")
            continue
        try:
            images[side] = open_image(content, max_megapixels=max_megapixels)
        except ValueError as error:
            errors.append(f"{side} {error}")
    return images, errors


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each cell of a grid is darker than its right neighbour. Near pictures differ in few bits."""
    cells = _cells(image.convert("L"), 9, 8)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def _cells(grey: Image.Image, width: int, height: int) -> NDArray[np.int16]:
    return np.asarray(grey.resize((width, height), Image.Resampling.BOX)).astype(np.int16)


def _text_facts(record: Record) -> dict[str, Any]:
    words = [len(reference.split()) for reference in record.references]
    texts = [*record.references, record.instruction]
    if record.num_images < 2:  # general instruction data is written in lines and is never scored
        texts = [text.translate(_LINES) for text in texts]
    texts += [getattr(record, name) for name in _NAMES]
    # A published test pair whose every sentence is empty: papers score it, so it is no fault of the record.
    as_published = record.references == [""] and record.provenance.get("empty_references", 0) > 0
    language, score = _language(" ".join(record.references)) if sum(words) >= MIN_LANGUAGE_WORDS else ("", None)
    return {"num_references": len(words), "min_words": min(words, default=0), "max_words": max(words, default=0),
            "num_empty_references": 0 if as_published else words.count(0),
            "has_bad_text": any(map(is_bad_text, texts)), "language": language, "language_score": score}


def is_bad_text(text: str) -> bool:
    """Whether it holds U+FFFD, a control character, or a line separator (PTB would shift all later captions)."""
    return _BAD_TEXT.search(text) is not None


@functools.lru_cache(maxsize=4096)
def _language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and probability, by py3langid; the score is rounded, since processors add in different orders."""
    code, score = _identifier().classify(text[:4096])
    return str(code), round(float(score), 3)


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
