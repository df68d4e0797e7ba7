"""The example pairs of the page of `onediff serve`: run `python docs/page_examples.py` to write them again.

Our generator renders them from test scenes, so no model was trained on them. Like everything that the generator
renders, they are free of copyright (CC0).
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from onediff.config import load_params
from onediff.data.synthesis.scenes.records import scene_records

FOLDER = Path(__file__).resolve().parent.parent / "onediff/serve/http/page/examples"
SIDE = 480  # width and height in pixels
PAIRS = {"added": "scenes-test-000007c", "recoloured": "scenes-test-000005c", "unchanged": "scenes-test-000004n"}


def example(pair_id: str) -> tuple[Image.Image, Image.Image]:
    """Render the images before and after of a test pair of the source `scenes`."""
    config = load_params(Path("presets/tiny.yaml"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"image_px": SIDE})})
    records = scene_records(config, "test", int(pair_id[-7:-1]))
    record = next(record for record in records if record.pair_id == pair_id)
    return Image.open(io.BytesIO(record.before)), Image.open(io.BytesIO(record.after))


def main() -> None:
    for name, pair_id in PAIRS.items():
        for side, image in zip(("before", "after"), example(pair_id), strict=True):
            image.save(FOLDER / f"{name}_{side}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
