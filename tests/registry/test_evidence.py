from __future__ import annotations

import json

import pytest
from registered import GOOD, REPO, pairs_of

from onediff.registry.evidence import in_range, read_pair_scores, read_scores


@pytest.mark.parametrize("name", ["metrics.json", "gate.json"])
def test_what_the_stage_score_wrote_is_accepted(name: str) -> None:
    content = (REPO / "data" / name).read_bytes()
    assert read_scores(name, content) == json.loads(content)


def test_pairs_that_fit_their_table_are_accepted() -> None:
    read_pair_scores("pairs", json.dumps(pairs_of({"scenes": GOOD}, noise=0.05)).encode(), {"scenes": GOOD})


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("METEOR", 1, True), ("METEOR", 1.01, False), ("CIDEr", 10, True), ("CIDEr", -0.1, False), ("words", 17, True),
    ("words", float("inf"), False), ("words", True, False), ("words", "17", False), ("words", None, False)])
def test_a_figure_must_be_a_number_in_its_range(name: str, value: object, expected: bool) -> None:
    assert in_range(name, value) is expected


def test_every_fault_is_a_line_with_the_place_and_the_cure() -> None:
    wrong = {"scenes": {**GOOD, "METEOR": -1, "floor": {"constant": {"CIDEr": 11}}, "num_pairs": 1.5}, "edits": []}
    with pytest.raises(ValueError, match="METEOR") as refused:
        read_scores("gate.json", json.dumps(wrong).encode())
    lines = str(refused.value).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["scenes.METEOR", "scenes.num_pairs",
                                                             "scenes.floor.constant.CIDEr", "edits"]
    assert all("'dvc repro' scores again" in line for line in lines)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[1]", b"1"])
def test_what_is_no_table_of_scores_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^gate\.json: [^\n]*'dvc repro'[^\n]*$"):
        read_scores("gate.json", content)
