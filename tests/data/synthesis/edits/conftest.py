"""Settings and pictures that the tests of the source `edits` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from onediff.config import Config
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis.edits.pictures import Picture
from onediff.data.synthesis.edits.records import edit_records

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="session")
def edits_config() -> Callable[..., Config]:
    """Return a function that loads the tiny preset with other values in the section data.edits."""

    def load(**changes: object) -> Config:
        values = YAML(typ="safe").load((ROOT / "presets/tiny.yaml").read_text())
        values["data"]["edits"] |= changes
        return Config.model_validate(values)

    return load


@pytest.fixture(scope="session")
def smooth() -> Callable[..., Picture]:
    """Return a function that draws a picture of smooth random colors, in which every operation is visible."""

    def draw(seed: int = 3, size: tuple[int, int] = (97, 71)) -> Picture:
        coarse = Image.fromarray(np.random.default_rng(seed).integers(30, 220, (13, 13, 3)).astype(np.uint8))
        return Picture("random", np.array(coarse.resize(size, Image.Resampling.BICUBIC)))

    return draw


@pytest.fixture(scope="session")
def some(edits_config: Callable[..., Config]) -> list[Record]:
    """Return about 200 records of all splits, in which every operation occurs."""
    return [record for split in SPLITS for index in range(36) for record in edit_records(edits_config(), split, index)]
