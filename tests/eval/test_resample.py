from __future__ import annotations

import time

import numpy as np
import pytest

from onediff.eval.metrics.catalog import METRICS
from onediff.eval.metrics.compute import Scores, score
from onediff.eval.resample import compare, corpus_score, intervals, resampled, shares_of

OBJECTS = ("small red metal cube", "blue ball", "big gray rubber cylinder", "man's hat", "U.S. flag (torn)", "café")
REFERENCE_TEMPLATES = ("the {} was removed.", "the {} is gone", "someone took the {} away")
PREDICTION_TEMPLATES = ("The {} disappeared!", "a {} was added", "the blue {} is gone , I think", "{}", "removing {}")


def captions(num: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return predictions and references; predictions are empty, perfect or share words, stems or synonyms."""
    predictions = {f"p{i}": PREDICTION_TEMPLATES[i % 5].format(OBJECTS[(i // 2) % 6]) for i in range(num)}
    references = {f"p{i}": [text.format(OBJECTS[i % 6]) for text in REFERENCE_TEMPLATES[: 1 + i % 3]]
                  for i in range(num)}
    return predictions | {"p4": "", "p5": references["p5"][0], "p6": references["p6"][0]}, references


@pytest.fixture(scope="module")
def scores() -> Scores:
    predictions, references = captions(30)
    return score(predictions, references)


def part(scores: Scores, positions: list[int]) -> dict[str, np.ndarray]:
    return {name: shares_of(scores, name)[positions].sum(0, keepdims=True) for name in METRICS if name != "CIDEr"}


@pytest.mark.parametrize("positions", [list(range(30)), [4], [5], [5, 6], [3, 3, 8, 8, 8, 11, 29],
                                       list(range(0, 30, 2))])
def test_summed_statistics_give_the_corpus_score_of_the_chosen_pairs(scores: Scores, positions: list[int]) -> None:
    predictions, references = captions(30)
    names = [f"p{position}" for position in positions]
    alone = score({f"{i}": predictions[name] for i, name in enumerate(names)},
                  {f"{i}": references[name] for i, name in enumerate(names)})
    for name, sums in part(scores, positions).items():
        assert corpus_score(name, sums)[0] == pytest.approx(alone.corpus[name], abs=1e-9)


def test_a_resample_is_the_score_of_the_drawn_pairs(scores: Scores) -> None:
    groups = [f"g{i // 3}" for i in range(30)]
    drawn, = resampled([scores], groups, resamples=5, seed=3)
    times = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), size=5)
    order = sorted(set(groups))
    for row in range(5):
        positions = [i for i in range(30) for _ in range(times[row, order.index(groups[i])])]
        assert drawn["CIDEr"][row] == pytest.approx(np.mean([scores.items["CIDEr"][index] for index in positions]))
        for name, sums in part(scores, positions).items():
            assert drawn[name][row] == pytest.approx(corpus_score(name, sums)[0])


def test_intervals_contain_the_score_and_are_wider_for_groups_of_equal_pairs(scores: Scores) -> None:
    single = intervals(scores, [f"g{i}" for i in range(30)], resamples=2000)
    triples = Scores(scores.corpus, {name: [v for v in values[:10] for _ in range(3)] for name, values in
                                     scores.items.items()},
                     {name: np.repeat(rows[:10], 3, 0) for name, rows in scores.statistics.items()})
    by_group = intervals(triples, [f"g{i // 3}" for i in range(30)], resamples=2000)
    by_pair = intervals(triples, [f"g{i}" for i in range(30)], resamples=2000)
    for name in METRICS:
        assert single[name][0] <= scores.corpus[name] <= single[name][1]
        assert by_group[name][1] - by_group[name][0] > 1.3 * (by_pair[name][1] - by_pair[name][0])


def test_95_percent_intervals_contain_the_true_mean_in_about_95_percent_of_cases() -> None:
    rng = np.random.default_rng(0)
    num_covered = 0
    for _ in range(300):
        values = rng.normal(0.5, 0.2, size=50)
        low, high = intervals(Scores({"ROUGE-L": values.mean()}, {"ROUGE-L": list(values)}, {}),
                              [str(i) for i in range(50)], resamples=500)["ROUGE-L"]
        num_covered += low <= 0.5 <= high
    assert 0.90 <= num_covered / 300 <= 0.98


def test_a_system_does_not_differ_from_itself_and_a_better_one_does(scores: Scores) -> None:
    predictions, references = captions(30)
    groups = list(predictions)
    itself = compare(scores, scores, groups, resamples=500)
    best = compare(score({key: texts[0] for key, texts in references.items()}, references), scores, groups,
                   resamples=500)
    for name in METRICS:
        assert (itself[name].low, itself[name].high, itself[name].p) == (0.0, 0.0, 1.0)
        assert 0 < best[name].low < best[name].high
        assert best[name].p < 0.01
        if name != "METEOR":  # The chunk penalty of METEOR is not linear, so its resamples have a lower mean.
            assert best[name].low < best[name].first - best[name].second < best[name].high


def test_two_systems_that_differ_by_chance_rarely_differ_significantly() -> None:
    rng = np.random.default_rng(1)
    num_significant = 0
    for _ in range(200):
        first, second = (Scores({"CIDEr": 0.0}, {"CIDEr": list(rng.normal(size=60))}, {}) for _ in range(2))
        num_significant += compare(first, second, [str(i) for i in range(60)], resamples=400)["CIDEr"].p < 0.05
    assert num_significant / 200 < 0.1


def test_ten_thousand_paired_resamples_of_1270_pairs_take_less_than_30_seconds(scores: Scores) -> None:
    positions = np.random.default_rng(0).integers(30, size=1270)
    many = Scores(scores.corpus, {name: list(np.array(values)[positions]) for name, values in scores.items.items()},
                  {name: rows[positions] for name, rows in scores.statistics.items()})
    start = time.process_time()
    compare(many, many, [str(i) for i in range(1270)])
    assert time.process_time() - start < 30  # It takes about 4 seconds if no other program runs.


def test_groups_must_have_one_entry_for_each_pair(scores: Scores) -> None:
    with pytest.raises(ValueError, match="one entry for each pair, got 2 entries for 30 pairs"):
        intervals(scores, ["a", "b"])
    with pytest.raises(ValueError, match="the same metrics"):
        compare(scores, Scores({"CIDEr": 0.0}, {"CIDEr": [0.0]}, {}), ["a"])
