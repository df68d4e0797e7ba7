from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onediff.config import load_params
from onediff.data.synthesis.phrases import DIRECTIONS, EDIT_TEMPLATES, SCENE_TEMPLATES, SYNONYMS
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.analysis.behaviour import (
    UNREADABLE,
    Change,
    edit_behaviour,
    interval,
    inverse,
    parse,
    parse_edit,
    says_the_truth,
    scene_behaviour,
    truth,
)
from onediff.eval.floors import oracle

NEAR = ("", " left of the blue sphere", " right of the red block", " in front of the small cyan ball",
        " behind the gray cylinder")


def synonyms(word: str) -> tuple[str, ...]:
    return SYNONYMS.get(word, (word,))


def noun_phrases() -> list[tuple[str, dict[str, str]]]:
    """Return all noun phrases for a few objects, with and without size, material and neighbour, and the attributes."""
    made = []
    for k, (shape, color, size, material) in enumerate(itertools.product(SHAPES, COLORS, SIZES, MATERIALS)):
        words = itertools.product((*synonyms(size), ""), (*synonyms(material), ""), synonyms(shape))
        for j, (size_word, material_word, shape_word) in enumerate(words):
            phrase = " ".join(word for word in (size_word, color, material_word, shape_word) if word)
            named = {"shape": shape, "color": color}
            named |= {"size": size} if size_word else {}
            named |= {"material": material} if material_word else {}
            made.append((phrase + NEAR[(j + k) % len(NEAR)], named))
    return made


def test_the_grammar_reads_every_scene_sentence() -> None:
    results = {"color": [("new", c, c) for c in COLORS],
               "texture": [("new", m, word) for m in MATERIALS for word in synonyms(m)],
               "move": [("direction", d, words) for d, words in DIRECTIONS.items()],
               "add": [(None, "", "")], "drop": [(None, "", "")]}
    for k, (phrase, named) in enumerate(noun_phrases()):
        for change_type, outcomes in results.items():
            for j, template in enumerate(SCENE_TEMPLATES[change_type]):
                field, value, words = outcomes[(j + k) % len(outcomes)]
                caption = template.format(old=phrase, new=words)
                assert parse(caption) == Change(change_type, **named, **({field: value} if field else {})), caption
    assert all(parse(text) == Change("none") for text in SCENE_TEMPLATES["none"])


def test_the_grammar_reads_every_edit_sentence() -> None:
    places = ("left", "right", "top", "bottom", "center", "to the left", "to the right", *COLORS)
    for operation, templates in EDIT_TEMPLATES.items():
        for template, new in itertools.product(templates, places):
            assert parse_edit(template.format(old="small red cube", new=new)).change_type == operation, (template, new)


def test_case_punctuation_and_articles_do_not_matter() -> None:
    assert parse(" The Red\u2028cube was removed. ") == Change("drop", color="red", shape="cube")
    assert parse("an red cube was added!") == Change("add", color="red", shape="cube")
    assert parse_edit("Brighten the image.").change_type == "brighten"


@pytest.mark.parametrize("caption", [
    "", "...", "the cube", "the red was removed", "the red red cube was removed", "the cube red was removed",
    "the pink cube was removed", "the red cube moved", "the red cube moved to the moon", "the red cube became heavy",
    "the color of the red cube changed to shiny", "the red cube left of the was removed",
    "the red cube was removed and the blue ball was removed", "the color of the red cube became blue",
])
def test_captions_that_the_grammar_does_not_match_are_unreadable(caption: str) -> None:
    assert parse(caption) == UNREADABLE
    assert parse_edit(caption).change_type is None


@pytest.mark.parametrize(("a", "b", "undoes"), [
    ("a red cube was added", "the red block is gone", True),
    ("a red cube was added", "the red ball is gone", False),
    ("a red cube was added", "a red cube was added", False),
    ("the red cube became blue", "the blue cube became red", True),
    ("the red cube became blue", "the blue ball became red", False),
    ("the red cube became blue", "the blue cube became green", False),
    ("the red cube became shiny", "the red cube became rubber", True),
    ("the red cube became shiny", "the red cube became metal", False),
    ("the red cube became shiny", "the red cube became blue", False),
    ("the red cube moved to the left", "the red cube moved to the right", True),
    ("the red cube moved to the left", "the red cube moved to the back", False),
    ("nothing has changed", "nothing has changed", False),
    ("what", "what", False),
    ("the cube is gone", "a cube was added", False),
])
def test_inverse_changes_are_recognized_in_both_orders(a: str, b: str, undoes: bool) -> None:
    assert inverse(parse(a), parse(b)) is undoes
    assert inverse(parse(b), parse(a)) is undoes


def row(pair_id: str, change_type: str, *, color: str = "red", new: str | None = None, swap_of: str | None = None,
        group: str = "g") -> dict[str, Any]:
    cube = None if change_type == "none" else {"shape": "cube", "color": color, "size": "big", "material": "matte"}
    return {"pair_id": pair_id, "group_id": group, "change_type": change_type,
            "provenance": {"object": cube, "new": new, "swap_of": swap_of}}


def test_scene_figures_equal_those_computed_by_hand() -> None:
    rows = [row("a", "add"), row("b", "drop", swap_of="a"), row("c", "color", new="blue"), row("d", "move", new="left"),
            row("e", "none"), row("f", "none"), row("g", "none"), row("h", "texture", new="shiny"),
            row("i", "color", color="blue", new="red", swap_of="c")]
    predictions = {"a": "a red cube was added", "b": "the red cube is gone", "c": "the red ball became blue",
                   "d": "nothing has changed", "e": "nothing has changed", "f": "the red cube is gone",
                   "g": "gibberish", "h": "gibberish", "i": "the blue cube turned green"}
    got = scene_behaviour(predictions, rows)
    assert got["change_found_rate"] == pytest.approx(4 / 6)
    assert got["change_type_accuracy"] == pytest.approx(4 / 6)
    assert got["changed_object_accuracy"] == pytest.approx(3 / 6)
    assert got["change_accuracy"] == pytest.approx(2 / 6)
    assert got["false_alarm_rate"] == pytest.approx(2 / 3)
    assert got["swap_consistency"] == pytest.approx(1 / 2)
    assert got["change_type_accuracy_by_type"] == {"add": 1, "color": 1, "drop": 1, "move": 0, "texture": 0}
    assert got["intervals"]["false_alarm_rate"] == [pytest.approx(2 / 3)] * 2  # All pairs belong to one group.


def test_edit_figures_equal_those_computed_by_hand() -> None:
    rows = [row("a", "blur"), row("b", "blur", group="h"), row("c", "none")]
    got = edit_behaviour({"a": "blur the image", "b": "brighten the image", "c": "nothing was edited"}, rows)
    assert got["operation_accuracy"] == pytest.approx(2 / 3)
    assert got["operation_accuracy_by_operation"] == {"blur": 0.5, "none": 1.0}


def test_the_bootstrap_interval_draws_complete_groups() -> None:
    single = interval([(str(i), i % 2 == 0) for i in range(400)])
    clustered = interval([(str(i // 40), i // 40 % 2 == 0) for i in range(400)])
    assert single[0] < 0.5 < single[1]
    assert single[1] - single[0] == pytest.approx(4 * 0.5 / np.sqrt(400), rel=0.1)
    assert clustered[1] - clustered[0] > 4 * (single[1] - single[0])
    assert interval([("a", True), ("b", True)]) == [1.0, 1.0]


def test_references_and_oracle_captions_of_scenes_are_true() -> None:
    config = load_params(Path("presets/tiny.yaml"))
    num_new_templates = 0
    for index in range(10):
        for record in scene_records(config, "test", index):
            case = vars(record)
            for text in (*record.references, oracle(case)):
                assert says_the_truth(parse(text), truth(case)), text
            assert oracle(case) == oracle(case)
            num_new_templates += oracle(case) not in record.references
    assert num_new_templates == 40
