"""Write an HTML page that shows example pairs of a folder of shards, with filters, a search and pages of cards."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from onediff.data.quality.checks_page import thumbnail
from onediff.data.quality.probe import row_groups_with
from onediff.data.record import read_row_group, read_table
from onediff.files import new_file

THUMBNAIL_PX = 192
QUALITY = 85
MAX_CHARACTERS = 400  # largest number of characters of a caption that the page shows
PAGE_CARDS = 24  # number of cards that the browser shows at once
SPLIT_ORDER = ("train", "val", "test", "gate")


def browse(folder: Path, out: Path, *, per_group: int) -> Path:
    """Write out/index.html, a page with example records of the shards in `folder`, and return the path of the page.

    The page shows up to `per_group` records of each combination of source, split and change type, evenly spaced over
    the shards. The images are embedded in the page, so it needs no network.
    """
    rows = read_table(folder)
    chosen = choose([(row["source"], row["split"], row["change_type"]) for row in rows], per_group=per_group)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("browse.html.j2").read_text(encoding="utf-8"))
    filters = {name: sorted({row[name] for row in rows}) for name in ("source", "change_type")}
    filters["split"] = ordered_splits(row["split"] for row in rows)
    cards = sorted(_cards(folder, rows, chosen), key=lambda card: filters["split"].index(card["split"]))
    page = template.generate(folder=str(folder), num_rows=len(rows), filters=filters, cards=cards,
                             page_cards=PAGE_CARDS)
    with new_file(out / "index.html") as part, part.open("w", encoding="utf-8") as file:
        file.writelines(page)
    return out / "index.html"


def ordered_splits(splits: Iterable[str]) -> list[str]:
    """Return the distinct splits in the order train, val, test, gate; any other splits come last."""
    present = set(splits)
    return [split for split in (*SPLIT_ORDER, *sorted(present - set(SPLIT_ORDER))) if split in present]


def choose(groups: list[tuple[str, ...]], *, per_group: int) -> list[int]:
    """Return the sorted positions of up to `per_group` records of each group, evenly spaced over the group.

    `groups` contains, for each record, the group to which the record belongs.
    """
    members: dict[tuple[str, ...], list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    spaced = {group: np.linspace(0, len(positions) - 1, min(per_group, len(positions)))
              for group, positions in members.items()}
    return sorted(members[group][round(float(number))] for group, numbers in spaced.items() for number in numbers)


def _cards(folder: Path, rows: list[dict[str, Any]], chosen: list[int]) -> Iterator[dict[str, Any]]:
    """Yield a card for each chosen record in order: the record with thumbnails of its images and shortened captions.

    Only the Parquet row groups that contain a chosen record are read.
    """
    positions = np.array(chosen, dtype=np.int64)
    for path, group, numbers, part in row_groups_with([folder], positions):
        table = read_row_group(path, group, ["before", "after"]).take(numbers)
        for row, sides in zip((rows[position] for position in positions[part]), table.to_pylist(), strict=True):
            contents = [(sides[side] or {}).get("bytes") or b"" for side in ("before", "after")][: row["num_images"]]
            images = [thumbnail(content, THUMBNAIL_PX, quality=QUALITY, resample=Image.Resampling.LANCZOS,
                                absent="missing") for content in contents]
            texts = [" ".join(text.split()) for text in row["references"]]
            yield row | {"images": images,
                         "references": [text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."
                                        for text in texts]}
