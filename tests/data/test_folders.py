from __future__ import annotations

from pathlib import Path

from onediff.config import load_params
from onediff.data.folders import folder_of, sources_of

DATA = load_params(Path(__file__).parents[2] / "presets/paper.yaml").data


def test_sources_are_listed_in_the_order_generated_raw_retrieved_diffused() -> None:
    assert sources_of(DATA) == [*DATA.generated, *DATA.raw, *DATA.retrieved, *DATA.diffused]
    assert sources_of(DATA)[:2] == ["scenes", "edits"]


def test_the_folder_of_a_source_depends_on_the_kind_of_the_source() -> None:
    assert {name: str(folder_of(DATA, name)) for name in ("scenes", "clevr_change", "coco")} == {
        "scenes": "data/synthetic/scenes", "clevr_change": "data/pairs/clevr_change", "coco": "data/written/coco"}
