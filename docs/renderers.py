"""docs/renderers.png: `python docs/renderers.py` where bpy is installed. Above our ray caster, below Cycles; the first
four test scenes, none picked."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from onediff.config import Config, load_params
from onediff.data.synthesis.scenes.records import scene_records

SIDE, COLUMNS, GAP = 224, 4, 4


def before(config: Config, renderer: str, index: int) -> Image.Image:
    scenes = config.data.scenes.model_copy(update={"renderer": renderer})
    data = config.data.model_copy(update={"scenes": scenes, "image_px": SIDE})
    record = scene_records(config.model_copy(update={"data": data}), "test", index)[0]
    return Image.open(io.BytesIO(record.before))


def main() -> None:
    config = load_params(Path("presets/tiny.yaml"))
    page = Image.new("RGB", (COLUMNS * (SIDE + GAP) - GAP, 2 * SIDE + GAP), "white")
    for row, renderer in enumerate(("raytracer", "blender")):
        for column in range(COLUMNS):
            page.paste(before(config, renderer, column), (column * (SIDE + GAP), row * (SIDE + GAP)))
    page.save("docs/renderers.png", optimize=True)


if __name__ == "__main__":
    main()
