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
    """Return pairs with short sentences of few words, so that n-grams repeat; some sentences are empty."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices([*"abcdefghijklm"[:vocabulary], "1\xa01/2"], k=rng.choice((0, 1, 2, 3, 4, 6, 9))))

    return [(sentence(), [sentence() for _ in range(rng.randint(1, 5))]) for _ in range(num)]


CASES = [pairs(0, 97), pairs(1, 97, vocabulary=2), pairs(2, 3), pairs(3, 1), [("", ["a"])], [("", ["", "a b"])],
         [("a", ["a"]), ("", [""])], [("a " * 2000, ["a " * 1500, "b a"]), ("c", ["a"])],
         [("x y z w", ["w z y x"])] * 2]


@pytest.mark.parametrize("case", CASES)
def test_bleu_equals_that_of_pycocoevalcap(case: list[Pair]) -> None:
    scorer = BleuScorer(n=4)
    for prediction, references in case:
        scorer += (prediction, references)
    corpus, items = scorer.compute_score(option="closest")
    counts = ngrams.bleu_counts(ngrams.read(case))
    assert counts.tolist() == [[row["testlen"], scorer._single_reflen(row["reflen"], "closest", row["testlen"]),
                                *row["guess"], *row["correct"]] for row in scorer.ctest]
    for order in range(1, 5):
        assert ngrams.bleu(counts, order) == pytest.approx(items[order - 1], abs=1e-12)
        assert ngrams.bleu(counts.sum(0, keepdims=True), order)[0] == pytest.approx(corpus[order - 1], abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rouge_equals_that_of_pycocoevalcap(case: list[Pair]) -> None:
    # The texts are cut at 200 characters, because pycocoevalcap needs very long for the longest case.
    case = [(prediction[:200], [text[:200] for text in references]) for prediction, references in case]
    _, items = Rouge().compute_score({i: refs for i, (_, refs) in enumerate(case)},
                                     {i: [prediction] for i, (prediction, _) in enumerate(case)})
    assert ngrams.rouge(case) == pytest.approx(items, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_cider_equals_that_of_pycocoevalcap(case: list[Pair]) -> None:
    _, items = Cider().compute_score({i: refs for i, (_, refs) in enumerate(case)},
                                     {i: [prediction] for i, (prediction, _) in enumerate(case)})
    assert ngrams.cider(ngrams.read(case)) == pytest.approx(items, abs=1e-12)


def test_cider_is_refused_if_no_reference_has_a_word() -> None:
    with pytest.raises(ValueError, match="needs at least one reference with a word"):
        ngrams.cider(ngrams.read([("a", [""]), ("", ["", ""])]))


def test_the_score_of_a_pair_does_not_depend_on_the_order_of_the_pairs() -> None:
    case = pairs(4, 50)
    order = np.random.default_rng(0).permutation(50)
    assert ngrams.cider(ngrams.read([case[i] for i in order])) == pytest.approx(ngrams.cider(ngrams.read(case))[order])
