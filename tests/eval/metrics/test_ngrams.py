from __future__ import annotations

import random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from onediff.eval.metrics import ngrams
from onediff.eval.metrics.ngrams import Pair


def pairs(seed: int, num: int, vocabulary: int = 7) -> list[Pair]:
    """Short sentences of few words, so that most n-grams come more than once; some are empty or hold odd spaces."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices([*"abcdefghijklm"[:vocabulary], "1\xa01/2"], k=rng.choice((0, 1, 2, 3, 4, 6, 9))))

    return [(sentence(), [sentence() for _ in range(rng.randint(1, 5))]) for _ in range(num)]


CASES = [pairs(0, 97), pairs(1, 97, vocabulary=2), pairs(2, 3), pairs(3, 1), [("", ["a"])], [("", ["", "a b"])],
         [("a", ["a"]), ("", [""])], [("a " * 2000, ["a " * 1500, "b a"]), ("c", ["a"])],
         [("x y z w", ["w z y x"])] * 2]


@pytest.mark.parametrize("case", CASES)
def test_bleu_equals_pycocoevalcaps(case: list[Pair]) -> None:
    scorer = BleuScorer(n=4)
    for said, references in case:
        scorer += (said, references)
    corpus, items = scorer.compute_score(option="closest")
    counts = ngrams.bleu_counts(ngrams.read(case))
    assert counts.tolist() == [[said["testlen"], scorer._single_reflen(said["reflen"], "closest", said["testlen"]),
                                *said["guess"], *said["correct"]] for said in scorer.ctest]
    for order in range(1, 5):
        assert ngrams.bleu(counts, order) == pytest.approx(items[order - 1], abs=1e-12)
        assert ngrams.bleu(counts.sum(0, keepdims=True), order)[0] == pytest.approx(corpus[order - 1], abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rouge_equals_pycocoevalcaps(case: list[Pair]) -> None:
    case = [(said[:200], [text[:200] for text in references]) for said, references in case]  # theirs is slow
    _, items = Rouge().compute_score({i: refs for i, (_, refs) in enumerate(case)},
                                     {i: [said] for i, (said, _) in enumerate(case)})
    assert ngrams.rouge(case) == pytest.approx(items, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_cider_equals_pycocoevalcaps(case: list[Pair]) -> None:
    _, items = Cider().compute_score({i: refs for i, (_, refs) in enumerate(case)},
                                     {i: [said] for i, (said, _) in enumerate(case)})
    assert ngrams.cider(ngrams.read(case)) == pytest.approx(items, abs=1e-12)


def test_cider_without_a_word_in_any_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one reference with a word"):
        ngrams.cider(ngrams.read([("a", [""]), ("", ["", ""])]))


def test_a_pair_scores_the_same_wherever_it_stands() -> None:
    case = pairs(4, 50)
    order = np.random.default_rng(0).permutation(50)
    assert ngrams.cider(ngrams.read([case[i] for i in order])) == pytest.approx(ngrams.cider(ngrams.read(case))[order])
