from __future__ import annotations

import os
import random
from contextlib import closing

import numpy as np
import pytest

from onediff.eval.metrics import java
from onediff.eval.metrics.compute import _meteor
from onediff.eval.metrics.meteor import LINES_PER_COPY, Meteor, meteor, sums

WORDS = ("the", "a", "cat", "dog", "big", "large", "small", "red", "removed", "removing", "gone", "was", "is", "ball",
         "balls", "of", "in", "")


def pairs(seed: int, num: int) -> list[tuple[str, list[str]]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.choice((0, 1, 2, 3, 5, 9)))).replace("  ", " ")

    return [(sentence(), [sentence() for _ in range(rng.randint(1, 4))]) for _ in range(num)]


def test_scores_equal_those_that_the_java_program_computes_from_the_counts() -> None:
    corpus, items, counts = _meteor.score(pairs(0, 500))
    copy = _meteor.program._copies[0]
    copy.put(None, "EVAL ||| " + " ||| ".join(" ".join(map(str, row)) for row in counts))
    copy.pending.extend(range(500))  # METEOR answers with one line for each pair and one line for the corpus.
    theirs: list[float] = []
    while len(theirs) < 501:
        readable, writable = java._wait([copy], 60)
        for each in writable:
            each.send()
        for each in readable:
            theirs += [float(line) for _, line in each.receive()]
    assert items == pytest.approx(theirs[:-1], abs=1e-12)
    assert corpus == pytest.approx(theirs[-1], abs=1e-12)


def test_pairs_without_a_common_word_score_0_and_equal_captions_score_1() -> None:
    no_counts = np.zeros((1, 23))
    assert meteor(sums(no_counts)).tolist() == [0.0]
    _, items, _ = _meteor.score([("", ["a"]), ("a", [""]), ("", [""]), ("cat", ["rain"]), ("a cat", ["a cat"])])
    assert items == [0, 0, 0, 0, 1]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core, METEOR runs in one process only")
def test_many_lines_start_a_second_java_process_and_scores_stay_equal() -> None:
    driver = Meteor()
    with closing(driver.program) as program:
        first = driver.score(pairs(1, 400))
        assert len(program._copies) == 1
        for seed in range(2 * LINES_PER_COPY // 400 + 5):
            driver.score(pairs(2 + seed, 400))
        assert len(program._copies) == 2
        while not all(copy.ready for copy in program._copies):
            driver.score(pairs(99, 50))
        again = driver.score(pairs(1, 400))
        assert (again[0], again[1]) == (first[0], first[1])
        assert (again[2] == first[2]).all()
