"""docs/pairs.png: `python docs/pairs.py` after `make run`.

The first test pair of each change type and of six edits, none picked.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from onediff.data.record import Record, read_records

SIDE, TEXT, COLUMNS = 150, 64, 3
WANTED = ("color", "texture", "add", "drop", "move", "none",
          "darken", "color_cast", "crop", "rotate", "remove", "paste")


def tile(record: Record, prediction: str) -> Image.Image:
    page = Image.new("RGB", (2 * SIDE + 16, SIDE + TEXT), "white")
    for column, content in enumerate((record.before, record.after)):
        page.paste(ImageOps.contain(Image.open(io.BytesIO(content)), (SIDE, SIDE)), (column * (SIDE + 4), 0))
    draw = ImageDraw.Draw(page)
    draw.text((2, SIDE + 6), prediction, fill="black", font_size=15)
    draw.text((2, SIDE + 28), f"reference: {record.references[0]}", fill="gray", font_size=12)
    return page


def main() -> None:
    first: dict[str, Record] = {}
    for record in read_records(Path("data/diffcap"), "test-*.parquet"):
        if record.source in ("scenes", "edits"):
            first.setdefault(record.change_type, record)
    said = {row["pair_id"]: row["prediction"] for name in ("scenes", "edits")
            for row in map(json.loads, Path(f"data/captions/test/{name}.jsonl").read_text().splitlines())}
    tiles = [tile(first[kind], said[first[kind].pair_id]) for kind in WANTED]
    width, height = tiles[0].size
    page = Image.new("RGB", (COLUMNS * width, len(tiles) // COLUMNS * height), "white")
    for k, picture in enumerate(tiles):
        page.paste(picture, (k % COLUMNS * width, k // COLUMNS * height))
    page.save("docs/pairs.png", optimize=True)


if __name__ == "__main__":
    main()
