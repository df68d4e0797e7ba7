from __future__ import annotations

import time

import numpy as np
import pytest

from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.resample import compare, corpus_score, intervals, resampled, shares_of

THINGS = ("small red metal cube", "blue ball", "big gray rubber cylinder", "man's hat", "U.S. flag (torn)", "café")
TRUTHS = ("the {} was removed.", "the {} is gone", "someone took the {} away")
SAID = ("The {} disappeared!", "a {} was added", "the blue {} is gone , I think", "{}", "removing {}")


def captions(num: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Of all kinds: empty, perfect, in part right by word, stem, synonym and paraphrase."""
    said = {f"p{i}": SAID[i % 5].format(THINGS[(i // 2) % 6]) for i in range(num)}
    truth = {f"p{i}": [text.format(THINGS[i % 6]) for text in TRUTHS[: 1 + i % 3]] for i in range(num)}
    return said | {"p4": "", "p5": truth["p5"][0], "p6": truth["p6"][0]}, truth


@pytest.fixture(scope="module")
def scores() -> Scores:
    said, truth = captions(30)
    return score(said, truth)


def part(scores: Scores, places: list[int]) -> dict[str, np.ndarray]:
    return {name: shares_of(scores, name)[places].sum(0, keepdims=True) for name in METRICS if name != "CIDEr"}


@pytest.mark.parametrize("places", [list(range(30)), [4], [5], [5, 6], [3, 3, 8, 8, 8, 11, 29], list(range(0, 30, 2))])
def test_sums_of_statistics_give_the_corpus_score_of_those_pairs(scores: Scores,
                                                                 places: list[int]) -> None:
    said, truth = captions(30)
    names = [f"p{place}" for place in places]
    alone = score({f"{i}": said[name] for i, name in enumerate(names)},
                  {f"{i}": truth[name] for i, name in enumerate(names)})
    for name, sums in part(scores, places).items():
        assert corpus_score(name, sums)[0] == pytest.approx(alone.corpus[name], abs=1e-9)


def test_a_resample_is_the_score_of_the_drawn_pairs(scores: Scores) -> None:
    groups = [f"g{i // 3}" for i in range(30)]
    drawn, = resampled([scores], groups, resamples=5, seed=3)
    times = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), size=5)
    order = sorted(set(groups))
    for row in range(5):
        places = [i for i in range(30) for _ in range(times[row, order.index(groups[i])])]
        assert drawn["CIDEr"][row] == pytest.approx(np.mean([scores.items["CIDEr"][place] for place in places]))
        for name, sums in part(scores, places).items():
            assert drawn[name][row] == pytest.approx(corpus_score(name, sums)[0])


def test_intervals_hold_the_score_and_are_wider_where_pairs_depend_on_each_other(scores: Scores) -> None:
    apart = intervals(scores, [f"g{i}" for i in range(30)], resamples=2000)
    alike = Scores(scores.corpus, {name: [v for v in values[:10] for _ in range(3)] for name, values in
                                   scores.items.items()},
                   {name: np.repeat(rows[:10], 3, 0) for name, rows in scores.statistics.items()})
    as_one = intervals(alike, [f"g{i // 3}" for i in range(30)], resamples=2000)
    by_pair = intervals(alike, [f"g{i}" for i in range(30)], resamples=2000)
    for name in METRICS:
        assert apart[name][0] <= scores.corpus[name] <= apart[name][1]
        assert as_one[name][1] - as_one[name][0] > 1.3 * (by_pair[name][1] - by_pair[name][0])


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        values = rng.normal(0.5, 0.2, size=50)
        low, high = intervals(Scores({"ROUGE-L": values.mean()}, {"ROUGE-L": list(values)}, {}),
                              [str(i) for i in range(50)], resamples=500)["ROUGE-L"]
        held += low <= 0.5 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_a_system_does_not_differ_from_itself_and_a_better_one_does(scores: Scores) -> None:
    said, truth = captions(30)
    groups = list(said)
    same = compare(scores, scores, groups, resamples=500)
    best = compare(score({key: texts[0] for key, texts in truth.items()}, truth), scores, groups,
                   resamples=500)
    for name in METRICS:
        assert (same[name].low, same[name].high, same[name].p) == (0.0, 0.0, 1.0)
        assert 0 < best[name].low < best[name].high
        assert best[name].p < 0.01
        if name != "METEOR":  # one more chunk costs it most where there were none, so resamples lie lower
            assert best[name].low < best[name].first - best[name].second < best[name].high


def test_chance_alone_is_seldom_called_a_difference() -> None:
    rng = np.random.default_rng(1)
    low = 0
    for _ in range(200):
        first, second = (Scores({"CIDEr": 0.0}, {"CIDEr": list(rng.normal(size=60))}, {}) for _ in range(2))
        low += compare(first, second, [str(i) for i in range(60)], resamples=400)["CIDEr"].p < 0.05
    assert low / 200 < 0.1


def test_ten_thousand_paired_resamples_of_1270_pairs_take_seconds(scores: Scores) -> None:
    places = np.random.default_rng(0).integers(30, size=1270)
    many = Scores(scores.corpus, {name: list(np.array(values)[places]) for name, values in scores.items.items()},
                  {name: rows[places] for name, rows in scores.statistics.items()})
    start = time.process_time()
    compare(many, many, [str(i) for i in range(1270)])
    assert time.process_time() - start < 30  # about 4 where nothing else runs


def test_groups_must_be_those_of_the_pairs(scores: Scores) -> None:
    with pytest.raises(ValueError, match="one entry for each pair, got 2 entries for 30 pairs"):
        intervals(scores, ["a", "b"])
    with pytest.raises(ValueError, match="the same metrics"):
        compare(scores, Scores({"CIDEr": 0.0}, {"CIDEr": [0.0]}, {}), ["a"])
