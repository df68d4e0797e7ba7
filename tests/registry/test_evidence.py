"""Tests of the check of score files before a model is registered with these scores."""

from __future__ import annotations

import json

import pytest
from registered import GOOD, REPO, pairs_of

from onediff.registry.evidence import in_range, read_pair_scores, read_scores


@pytest.mark.parametrize("name", ["metrics.json", "gate.json"])
def test_the_committed_score_files_are_accepted(name: str) -> None:
    content = (REPO / "data" / name).read_bytes()
    assert read_scores(name, content) == json.loads(content)


def test_scores_of_pairs_whose_means_are_the_corpus_scores_are_accepted() -> None:
    read_pair_scores("pairs", json.dumps(pairs_of({"scenes": GOOD}, noise=0.05)).encode(), {"scenes": GOOD})


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("METEOR", 1, True), ("METEOR", 1.01, False), ("CIDEr", 10, True), ("CIDEr", -0.1, False), ("words", 17, True),
    ("words", float("inf"), False), ("words", True, False), ("words", "17", False), ("words", None, False)])
def test_a_score_must_be_a_number_in_the_range_of_its_metric(name: str, value: object, expected: bool) -> None:
    assert in_range(name, value) is expected


def test_each_fault_of_a_score_file_is_one_line_with_its_path_and_the_cure() -> None:
    wrong = {"scenes": {**GOOD, "METEOR": -1, "floor": {"constant": {"CIDEr": 11}}, "num_pairs": 1.5}, "edits": []}
    with pytest.raises(ValueError, match="METEOR") as refused:
        read_scores("gate.json", json.dumps(wrong).encode())
    lines = str(refused.value).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["scenes.METEOR", "scenes.num_pairs",
                                                             "scenes.floor.constant.CIDEr", "edits"]
    assert all("'dvc repro' scores again" in line for line in lines)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[1]", b"1"])
def test_a_file_that_is_no_score_table_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^gate\.json: [^\n]*'dvc repro'[^\n]*$"):
        read_scores("gate.json", content)
