"""Shards -> one page to look at: some pairs of each source, split and kind of change, with filters and a search."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from PIL import Image

from onediff.data.quality.checks_page import thumbnail
from onediff.data.quality.probe import row_groups_with
from onediff.data.record import read_table
from onediff.files import new_file

THUMBNAIL_PX = 192
QUALITY = 85
MAX_CHARACTERS = 400  # of a caption


def browse(folder: Path, out: Path, *, per_group: int) -> Path:
    """Writes out/index.html, which needs no network, about the folder's shards; returns its path.

    Of each source, split and kind of change up to `per_group` records, evenly spaced.
    """
    rows = read_table(folder)
    chosen = choose([(row["source"], row["split"], row["change_type"]) for row in rows], per_group=per_group)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("browse.html.j2").read_text(encoding="utf-8"))
    keys = {name: sorted({row[name] for row in rows}) for name in ("source", "split", "change_type")}
    page = template.generate(folder=str(folder), num_rows=len(rows), num_chosen=len(chosen), keys=keys,
                             cards=_cards(folder, rows, chosen))
    with new_file(out / "index.html") as part, part.open("w", encoding="utf-8") as file:
        file.writelines(page)
    return out / "index.html"


def choose(groups: list[tuple[str, ...]], *, per_group: int) -> list[int]:
    """Places of up to `per_group` members of each group, evenly spaced over them, in order."""
    members: dict[tuple[str, ...], list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    spaced = {group: np.linspace(0, len(places) - 1, min(per_group, len(places))) for group, places in members.items()}
    return sorted(members[group][round(float(number))] for group, numbers in spaced.items() for number in numbers)


def _cards(folder: Path, rows: list[dict[str, Any]], chosen: list[int]) -> Iterator[dict[str, Any]]:
    """The chosen rows in order with small images; only the row groups that hold them are read."""
    places = np.array(chosen, dtype=np.int64)
    for path, group, numbers, part in row_groups_with([folder], places):
        table = pq.ParquetFile(path).read_row_group(group, columns=["before", "after"]).take(numbers)
        for row, sides in zip((rows[place] for place in places[part]), table.to_pylist(), strict=True):
            contents = [(sides[side] or {}).get("bytes") or b"" for side in ("before", "after")][: row["num_images"]]
            images = [thumbnail(content, THUMBNAIL_PX, quality=QUALITY, resample=Image.Resampling.LANCZOS,
                                absent="missing") for content in contents]
            texts = [" ".join(text.split()) for text in row["references"]]
            yield row | {"images": images,
                         "references": [text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."
                                        for text in texts]}
