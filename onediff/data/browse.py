"""Shards -> one page to look at: some pairs of each source, split and kind of change, with filters and a search."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from PIL import Image

from onediff.data.record import read_table, shards
from onediff.inputs.images import open_image

THUMBNAIL_PX = 192
QUALITY = 85
MAX_CHARACTERS = 400  # of a caption


@dataclass(frozen=True)
class Card:
    """One record of the page; `images` are data URIs, or what is wrong with an image."""

    pair_id: str
    source: str
    split: str
    change_type: str
    images: tuple[str, ...]
    references: tuple[str, ...]


def browse(folder: Path, out: Path, *, per_group: int) -> Path:
    """Writes out/index.html, which needs no network, about the folder's shards; returns its path.

    Of each source, split and kind of change up to `per_group` records, evenly spaced.
    """
    rows = read_table(folder)
    chosen = choose([(row["source"], row["split"], row["change_type"]) for row in rows], per_group=per_group)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("browse.html.j2").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    path, part = out / "index.html", out / "index.part"
    keys = {name: sorted({row[name] for row in rows}) for name in ("source", "split", "change_type")}
    with part.open("w", encoding="utf-8") as file:
        file.writelines(template.generate(folder=str(folder), num_rows=len(rows), num_chosen=len(chosen), keys=keys,
                                          cards=_cards(folder, rows, chosen)))
    part.rename(path)
    return path


def choose(groups: list[tuple[str, ...]], *, per_group: int) -> list[int]:
    """Places of up to `per_group` members of each group, evenly spaced over them, in order."""
    members: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    chosen: list[int] = []
    for places in members.values():
        spaced = np.linspace(0, len(places) - 1, min(per_group, len(places)))
        chosen += [places[round(float(where))] for where in spaced]
    return sorted(chosen)


def _cards(folder: Path, rows: list[dict[str, object]], chosen: list[int]) -> Iterator[Card]:
    """The chosen records in order; only the row groups that hold them are read."""
    start, wanted = 0, np.array(chosen, dtype=np.int64)
    for path in shards(folder):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            low, high = np.searchsorted(wanted, [start, end])
            if low < high:
                table = file.read_row_group(group, columns=["before", "after"]).take(wanted[low:high] - start)
                for place, images in zip(wanted[low:high], table.to_pylist(), strict=True):
                    yield _card(rows[int(place)], [images["before"], images["after"]])
            start = end


def _card(row: dict[str, object], images: list[dict[str, bytes] | None]) -> Card:
    shown = images[: int(str(row["num_images"]))]
    texts = [" ".join(str(text).split()) for text in row["references"]]  # type: ignore[attr-defined]
    cut = tuple(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..." for text in texts)
    return Card(str(row["pair_id"]), str(row["source"]), str(row["split"]), str(row["change_type"]),
                tuple(_thumbnail((image or {}).get("bytes") or b"") for image in shown), cut)


def _thumbnail(content: bytes) -> str:
    if not content:
        return "missing"
    try:
        image = open_image(content)
    except ValueError as error:
        return str(error)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
