from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onediff.eval.analysis.behaviour import edit_behaviour, interval, scene_behaviour


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
    assert got["false_alarm_rate"] == got["no_change_accuracy"] == pytest.approx(1 / 3)
    assert got["unreadable_rate"] == pytest.approx(2 / 9)
    assert got["swap_consistency"] == pytest.approx(1 / 2)
    assert got["change_type_accuracy_by_type"] == {"add": 1, "color": 1, "drop": 1, "move": 0, "texture": 0}
    assert got["intervals"]["false_alarm_rate"] == [pytest.approx(1 / 3)] * 2  # All pairs belong to one group.


def test_captions_of_scenes_in_the_words_of_edits_are_judged() -> None:
    rows = [row("a", "add"), row("b", "drop"), row("c", "none"), row("d", "none"), row("e", "drop")]
    got = scene_behaviour({"a": "paste a red cube at the left", "b": "erase the thing at the top",
                           "c": "nothing was edited", "d": "brighten the image", "e": "rotate the image to the left"},
                          rows)
    assert got["change_found_rate"] == 1 and got["unreadable_rate"] == 0
    assert got["change_type_accuracy"] == pytest.approx(2 / 3)
    assert got["changed_object_accuracy"] == got["change_accuracy"] == pytest.approx(1 / 3)
    assert got["false_alarm_rate"] == got["no_change_accuracy"] == 1 / 2


def test_edit_figures_equal_those_computed_by_hand() -> None:
    rows = [row("a", "blur"), row("b", "blur"), row("c", "none"), row("d", "none"), row("e", "paste", new="left")]
    for case, kind in zip(rows, ("photograph", "canvas", "canvas", "photograph", "photograph"), strict=True):
        case["provenance"]["kind"] = kind
    got = edit_behaviour({"a": "blur the image", "b": "brighten the image", "c": "nothing has changed",
                          "d": "gibberish", "e": "a red cube was added"}, rows)
    assert got["operation_accuracy"] == pytest.approx(3 / 5)
    assert got["operation_accuracy_by_operation"] == {"blur": 0.5, "none": 0.5, "paste": 1.0}
    assert (got["no_change_accuracy"], got["false_alarm_rate"], got["unreadable_rate"]) == (0.5, 0, 1 / 5)
    pictures = {kind: (part["num_pairs"], part["operation_accuracy"]) for kind, part in got["by_picture"].items()}
    assert pictures == {"canvas": (2, 0.5), "photograph": (3, pytest.approx(2 / 3))}
    assert "swapped_accuracy" not in got and got["swapped_accuracy_by_operation"] == {}


def test_a_swapped_edit_needs_the_operation_that_leads_back_and_all_that_its_sentence_can_say() -> None:
    rows = [row("a", "paste", new="left"), row("b", "remove", new="left", swap_of="a"),
            row("c", "remove", new="top", swap_of="x"), row("d", "paste", new="top", swap_of="x"),
            row("e", "paste", new="top", swap_of="x"), row("f", "darken", swap_of="x"),
            row("g", "color_cast", new="red", swap_of="x"), row("h", "rotate", new="to the left", swap_of="x")]
    captions = {"a": "gibberish", "b": "erase the thing at the left", "c": "erase the thing at the left",
                "d": "put a red block at the top", "e": "put a blue block at the top", "f": "darken the image",
                "g": "make the image more cyan", "h": "turn the photo to the right"}
    got = edit_behaviour(captions, rows)
    assert got["swapped_accuracy"] == pytest.approx(3 / 7)
    by_operation = {name: (part["num_pairs"], part["swapped_accuracy"])
                    for name, part in got["swapped_accuracy_by_operation"].items()}
    assert by_operation == {"remove": (2, 0.5), "paste": (2, 0.5), "darken": (1, 1), "color_cast": (1, 0),
                            "rotate": (1, 0)}


def test_the_bootstrap_interval_draws_complete_groups() -> None:
    single = interval([(str(i), i % 2 == 0) for i in range(400)])
    clustered = interval([(str(i // 40), i // 40 % 2 == 0) for i in range(400)])
    assert single[0] < 0.5 < single[1]
    assert single[1] - single[0] == pytest.approx(4 * 0.5 / np.sqrt(400), rel=0.1)
    assert clustered[1] - clustered[0] > 4 * (single[1] - single[0])
    assert interval([("a", True), ("b", True)]) == [1.0, 1.0]
