from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from onediff.config import Config, load_params
from onediff.data.record import Record
from onediff.data.synthesis.edits.records import edit_records
from onediff.data.synthesis.phrases import DIRECTIONS, EDIT_TEMPLATES, SCENE_TEMPLATES, SYNONYMS
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.analysis.grammar import (
    UNREADABLE,
    Change,
    inverse,
    inverse_edit,
    parse,
    parse_edit,
    read_edit,
    read_scene,
    says_the_edit,
    says_the_truth,
    truth,
    undone,
    undone_edit,
)
from onediff.eval.floors import oracle


@pytest.fixture(scope="module")
def edits(micro: Config) -> list[Record]:
    return [record for index in range(60) for record in edit_records(micro, "test", index)]


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


def test_no_sentence_belongs_to_both_grammars() -> None:
    for text in itertools.chain(*SCENE_TEMPLATES.values()):
        for new in (*DIRECTIONS.values(), *COLORS, *MATERIALS):
            assert parse_edit(text.format(old="red cube", new=new)) == UNREADABLE, (text, new)
    for text in itertools.chain(*EDIT_TEMPLATES.values()):
        for new in ("left", "to the left", *COLORS):
            assert parse(text.format(old="red cube", new=new)) == UNREADABLE, (text, new)


def test_captions_in_the_words_of_edits_are_read_for_scenes() -> None:
    assert all(read_scene(text) == Change("none") for text in EDIT_TEMPLATES["none"])
    assert all(read_scene(text.format(old="red block", new="left")) == Change("add", color="red", shape="cube")
               for text in EDIT_TEMPLATES["paste"])
    assert all(read_scene(text.format(new="left")) == Change("drop") for text in EDIT_TEMPLATES["remove"])
    assert all(read_scene(text).change_type == "brighten" for text in EDIT_TEMPLATES["brighten"])
    assert read_scene("the red cube became blue") == parse("the red cube became blue")
    assert read_scene("cubes") == UNREADABLE


def test_captions_in_the_words_of_scenes_are_read_for_edits() -> None:
    assert all(read_edit(text) == Change("none") for text in SCENE_TEMPLATES["none"])
    assert all(read_edit(text.format(old="red block")) == Change("paste", color="red", shape="cube")
               for text in SCENE_TEMPLATES["add"])
    assert all(read_edit(text.format(old="red block")).change_type == "remove" for text in SCENE_TEMPLATES["drop"])
    assert all(read_edit(text.format(old="red cube", new="blue")).change_type == "color"
               for text in SCENE_TEMPLATES["color"])
    assert read_edit("rotate the image to the left") == Change("rotate", new="to the left")
    assert read_edit("cubes") == UNREADABLE


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


def test_the_inverse_of_a_scene_change_is_the_change_of_the_swapped_pair(micro: Config) -> None:
    records = [record for index in range(20) for record in scene_records(micro, "test", index)]
    by_id = {record.pair_id: vars(record) for record in records}
    swapped = [row for row in by_id.values() if row["provenance"]["swap_of"]]
    assert {row["change_type"] for row in swapped} == {"color", "texture", "add", "drop", "move"}
    for row in swapped:
        first, second = truth(by_id[row["provenance"]["swap_of"]]), truth(row)
        back = undone(first)
        assert back is not None and says_the_truth(second, back) and undone(back) == first
        assert inverse(first, second)
    assert undone(Change("none")) is None and undone(Change(None)) is None


def test_every_edit_has_a_way_back_and_the_way_back_of_the_way_back_is_the_edit(edits: list[Record]) -> None:
    edit_of = {record.change_type: truth(vars(record)) for record in edits}
    assert set(edit_of) == set(EDIT_TEMPLATES)
    assert [kind for kind, edit in edit_of.items() if undone_edit(edit) is None] == ["none"]
    for edit in edit_of.values():
        back = undone_edit(edit)
        if back is not None:
            assert back != edit and undone_edit(back) == edit
            assert inverse_edit(edit, back) and inverse_edit(back, edit) and not inverse_edit(edit, edit)


def test_the_true_edit_of_a_swapped_pair_is_the_way_back_of_the_pair(edits: list[Record]) -> None:
    truth_of = {record.pair_id: truth(vars(record)) for record in edits}
    swapped = [record for record in edits if record.provenance["swap_of"]]
    assert len({record.change_type for record in swapped}) > 10
    for record in swapped:
        assert undone_edit(truth_of[record.provenance["swap_of"]]) == truth_of[record.pair_id], record.pair_id


@pytest.mark.parametrize(("forth", "back"), [
    ("brighten", "darken"), ("more_contrast", "less_contrast"), ("black_and_white", "colorize"), ("blur", "sharpen"),
    ("crop", "zoom_out"), ("color_cast", "remove_cast"), ("remove", "restore")])
def test_the_way_back_names_the_opposite_operation_at_the_same_place(forth: str, back: str) -> None:
    edit = Change(forth, new="top")
    assert undone_edit(edit) == Change(back, new="top") and undone_edit(Change(back, new="top")) == edit
    assert inverse_edit(edit, Change(back, new="top")) and not inverse_edit(edit, Change(back, new="left"))


def test_what_was_removed_from_a_photograph_is_restored_and_a_drawn_object_is_pasted() -> None:
    assert undone_edit(Change("remove", new="left")) == Change("restore", new="left")
    back = undone_edit(Change("remove", color="red", shape="cube", new="left"))
    assert back == Change("paste", color="red", shape="cube", new="left")
    assert says_the_edit(parse_edit("put a small red block at the left"), back)
    assert not says_the_edit(parse_edit("put a red block at the right"), back)
    assert not says_the_edit(parse_edit("put a blue block at the left"), back)


@pytest.mark.parametrize(("a", "b", "undoes"), [
    ("brighten the image", "make the photo darker", True), ("brighten the image", "lighten the picture", False),
    ("reduce the contrast", "make the contrast stronger", True),
    ("make the image more red", "remove the red tint", True), ("make the image more red", "add a cyan tint", False),
    ("make the image more red", "undo the cyan tint of the picture", False),
    ("crop the photo to its left", "zoom out from the left", True),
    ("crop the photo to its left", "zoom out from the top", False),
    ("blur the image", "sharpen the image", True), ("remove all the colors", "make the colors come back", True),
    ("erase the thing at the top", "restore what was at the top", True),
    ("erase the thing at the top", "restore what was at the left", False),
    ("turn the photo to the left", "rotate the image to the right", True),
    ("turn the photo to the left", "rotate the image to the left", False),
    ("add a red cube at the top", "erase the thing at the top", True),
    ("add a red cube at the top", "erase the thing at the left", False),
    ("blur the image", "blur the image", False), ("nothing was edited", "nothing was edited", False),
    ("what", "what", False)])
def test_inverse_edits_are_recognized_in_both_orders(a: str, b: str, undoes: bool) -> None:
    assert inverse_edit(parse_edit(a), parse_edit(b)) is undoes
    assert inverse_edit(parse_edit(b), parse_edit(a)) is undoes


def test_references_of_edits_are_true(edits: list[Record]) -> None:
    for record in edits:
        for text in record.references:
            claim = parse_edit(text)
            if "{new}" not in max(EDIT_TEMPLATES[record.change_type], key=len) or claim.new:
                assert says_the_edit(claim, truth(vars(record))), text


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
