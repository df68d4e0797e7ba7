from __future__ import annotations

from onediff.data.synthesis.edits.operations import CASTS, TURNS
from onediff.data.synthesis.edits.pictures import PLACES
from onediff.data.synthesis.phrases import DIRECTIONS, EDIT_TEMPLATES, SCENE_TEMPLATES
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES
from onediff.inputs.attributes import CLASSES


def test_the_classes_cover_everything_that_the_generators_record() -> None:
    turns = {turn.removeprefix("to the ") for turn in TURNS}
    recorded = {"color": COLORS, "shape": SHAPES, "size": SIZES, "material": MATERIALS,
                "result": {*COLORS, *MATERIALS, *CASTS, *DIRECTIONS, *PLACES, *turns},
                "change_type": {*SCENE_TEMPLATES, *EDIT_TEMPLATES}}
    assert recorded.keys() == CLASSES.keys()
    for name, values in recorded.items():
        assert set(values) <= set(CLASSES[name]), name


def test_each_class_occurs_once() -> None:
    assert all(len(set(options)) == len(options) for options in CLASSES.values())
