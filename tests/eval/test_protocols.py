from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import score
from onediff.eval.protocols import PROTOCOLS, check_counts, protocols_of, read_benchmark, references_digest, score_files


def test_the_digest_of_references_ignores_the_order_of_pairs_but_not_of_references() -> None:
    one = references_digest({"a": ["x", "y"], "b": ["z"]})
    assert one == references_digest({"b": ["z"], "a": ["x", "y"]})
    assert one != references_digest({"a": ["y", "x"], "b": ["z"]})


def test_an_unknown_source_gets_one_protocol_with_baselines_from_the_same_source() -> None:
    protocol = protocols_of("street")["street"]
    assert (protocol.train_source, protocol.name) == ("street", "coco-caption/v1")
    assert list(protocols_of("spot_the_diff")) == ["spot_the_diff/single", "spot_the_diff/multi"]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A test.json with the counts of Spot-the-Diff: 1,404 entries, 1,270 pairs, 2,107 sentences and 7 empty ones."""
    sentences = [f"the {k} car is gone" for k in range(2107)]
    entries = [{"img_id": str(k), "sentences": [sentences.pop()] if k < 1263 else [" "]} for k in range(1270)]
    entries += [{"img_id": str(k), "sentences": [sentences.pop() for _ in range(6)]} for k in range(134)]
    entries[-1]["sentences"] += sentences
    path = tmp_path / "test.json"
    path.write_text(json.dumps(entries))
    return path


def test_published_annotations_are_read_as_references_and_entries_of_one_pair_are_merged(official: Path) -> None:
    rows = read_benchmark(official, PROTOCOLS["spot_the_diff/single"])
    assert len(rows) == 1270 and len(rows[0]["references"]) == 7 and rows[-1]["references"] == [""]


def test_both_protocols_of_spot_the_diff_score_the_published_annotations(official: Path, tmp_path: Path) -> None:
    predictions = jsonl(tmp_path / "predictions.jsonl",
                        [{"pair_id": str(k), "prediction": f"the {k} car"} for k in range(1270)])
    single, multi = (score_files([predictions], official, key=f"spot_the_diff/{kind}") for kind in ("single", "multi"))
    assert (single["protocol"], multi["protocol"]) == ("spot_the_diff/single/v1", "spot_the_diff/multi/v1")
    assert single["num_pairs"] == multi["num_pairs"] == 1270 and single["references"] != multi["references"]
    assert single["BLEU-1"] > multi["BLEU-1"]


def test_references_of_another_split_or_of_a_part_are_refused(official: Path, tmp_path: Path) -> None:
    entries = json.loads(official.read_text())
    official.write_text(json.dumps(entries[:900]))
    with pytest.raises(ValueError, match=r"spot_the_diff/single/v1 scores .* with 1,270 pairs, got 900"):
        read_benchmark(official, PROTOCOLS["spot_the_diff/single"])
    entries[5]["sentences"].append("one more")
    official.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="with 2,107 references, got 2,108"):
        read_benchmark(official, PROTOCOLS["spot_the_diff/single"])
    official.write_text(json.dumps([{"uid": "1", "sents": ["a"]}]))
    with pytest.raises(ValueError, match=r"test\.json entry 0: must have 'img_id' and 'sentences'"):
        read_benchmark(official, PROTOCOLS["spot_the_diff/single"])
    official.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a"}]}))
    with pytest.raises(ValueError, match=r"spot_the_diff/single/v1 scores .* with 1,270 pairs, got 1;"):
        read_benchmark(official, PROTOCOLS["spot_the_diff/single"])
    with pytest.raises(ValueError, match=r"--protocol spot_the_diff: must be one of scenes, .*/single"):
        score_files([official], official, key="spot_the_diff")


def test_a_published_entry_whose_sentences_are_no_list_is_refused(official: Path) -> None:
    entries = json.loads(official.read_text())
    entries[2]["sentences"] = "a car"
    official.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"test\.json entry 2: 'sentences' must be a list of strings, got .a car."):
        read_benchmark(official, PROTOCOLS["spot_the_diff/single"])


def test_the_protocol_of_one_half_of_clevr_change_needs_change_types(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"pair_id": str(k), "references": ["a"]} for k in range(7970)]
    with pytest.raises(ValueError, match=r"scores only changed pairs, .* but pair 0 has none"):
        check_counts(PROTOCOLS["clevr_change/semantic"], rows)
    for k, row in enumerate(rows):
        row["change_type"] = ("none", "move")[k % 2]
    check_counts(PROTOCOLS["clevr_change/semantic"], rows)
    check_counts(PROTOCOLS["clevr_change/distractor"], rows)


def test_without_a_protocol_all_pairs_are_scored_with_all_references(tmp_path: Path) -> None:
    references = {"a": ["the red cube is gone", "the cube left"], "b": ["nothing changed"]}
    predictions = {"a": "the red cube left", "b": "nothing"}
    lines = [{"pair_id": key, "prediction": text} for key, text in predictions.items()]
    got = score_files([jsonl(tmp_path / "p", lines)], jsonl(tmp_path / "r", [
        {"pair_id": key, "references": texts} for key, texts in references.items()]))
    assert {name: got[name] for name in METRICS} == score(predictions, references).corpus
    assert got["references"] == references_digest(references) and got["protocol"] == "coco-caption/v1"


def test_several_prediction_files_give_the_mean_and_the_spread_of_each_score(tmp_path: Path) -> None:
    references = jsonl(tmp_path / "r", [{"pair_id": key, "references": ["the red cube is gone"]} for key in "ab"])
    runs = [jsonl(tmp_path / f"p{k}", [{"pair_id": key, "prediction": text} for key in "ab"])
            for k, text in enumerate(["the red cube is gone", "the red", "the red cube is gone"])]
    single = [score_files([path], references) for path in runs]
    got = score_files(runs, references)
    assert (got["num_runs"], got["num_pairs"]) == (3, 2) and "intervals" not in got
    for name in METRICS:
        values = [scores[name] for scores in single]
        assert got[name] == pytest.approx(np.mean(values))
        assert got["spread"][name] == pytest.approx(np.std(values, ddof=1))
