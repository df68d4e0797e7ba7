"""The figures by which OneDiff and the baselines are compared, as outcomes of single pairs, and their paired bootstrap.

Shapes:  R resamples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onediff.eval.analysis.behaviour import claims_change, edit_checks, scene_checks
from onediff.eval.analysis.grammar import inverse, read_scene
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import PairRow

Outcomes = Sequence[tuple[str, float]]  # for each pair: (group_id, outcome, 0 or 1)
Captions = Mapping[str, Predictions]  # {TEST or the name of a trial of the stress test: captions}
TEST = "test"
# {figure: the trial of the stress test whose false alarms on scenes are counted}
WORN = {"false alarms, noise 20": "noise/20", "false alarms, JPEG 20": "jpeg_quality/20"}
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A difference between two systems, its 95 % interval and its two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def outcomes(captions: Captions, rows: Iterable[PairRow]) -> dict[str, Outcomes]:
    """Return the outcomes of each figure; a figure without pairs is left out.

    `rows` are the test pairs of the sources `scenes` and `edits`. An unreadable caption is never right, and claims no
    change. Figures: type and object of the change (changed scenes), false alarms (unchanged scenes), swap (a scene and
    its swapped scene get inverse captions), operation (all edits), unseen photographs (operation on edited photographs,
    none of which is in the training data), and false alarms when both images are noisy or compressed.
    """
    table = list(rows)
    plain, scenes = captions[TEST], [row for row in table if row["source"] == "scenes"]
    claims = {row["pair_id"]: read_scene(plain[row["pair_id"]]) for row in scenes}
    checks = [(row, scene_checks(plain[row["pair_id"]], row)) for row in scenes if row["change_type"] != "none"]
    edits = [(row, edit_checks(plain[row["pair_id"]], row)["operation"]) for row in table if row["source"] == "edits"]
    result: dict[str, Outcomes] = {
        "type": [(row["group_id"], check["type"]) for row, check in checks],
        "object": [(row["group_id"], check["object"]) for row, check in checks],
        "false alarms": false_alarms(plain, scenes),
        "swap": [(row["group_id"], inverse(claims[row["provenance"]["swap_of"]], claims[row["pair_id"]]))
                 for row in scenes if row["provenance"].get("swap_of") in claims],
        "operation": [(row["group_id"], right) for row, right in edits],
        "unseen photographs": [(row["group_id"], right) for row, right in edits
                               if row["provenance"].get("kind") == "photograph"],
        **{figure: false_alarms(captions[trial], scenes) for figure, trial in WORN.items()}}
    return {figure: values for figure, values in result.items() if values}


def false_alarms(predictions: Predictions, rows: Iterable[PairRow]) -> Outcomes:
    """Return for each unchanged pair with a caption whether the caption claims a change."""
    return [(row["group_id"], claims_change(read_scene(predictions[row["pair_id"]]))) for row in rows
            if row["change_type"] == "none" and row["pair_id"] in predictions]


def mean_of(seeds: Sequence[Outcomes]) -> float:
    """Return the mean over seeds of the mean outcome."""
    return float(np.mean([np.mean([value for _, value in each]) for each in seeds]))


def resampled(systems: Mapping[str, Sequence[Outcomes]], *,
              resamples: int = RESAMPLES) -> dict[str, NDArray[np.float64]]:
    """Return {system: mean outcomes (R,)} on bootstrap resamples, which are the same for all systems.

    `systems` has the outcomes of each seed. A resample draws as many seeds as there are, with replacement, and for each
    drawn seed as many groups as it has. Raises ValueError if the systems have other pairs.
    """
    num_seeds = len(next(iter(systems.values())))
    groups = [[group for group, _ in seed] for seed in next(iter(systems.values()))]
    for name, seeds in systems.items():
        if [[group for group, _ in seed] for seed in seeds] != groups:
            raise ValueError(f"{name}: all systems must have outcomes of the same pairs and seeds, but have not; "
                             "caption the test pairs again with every system")
    places = [np.unique(np.asarray(each), return_inverse=True)[1] for each in groups]
    counts = [np.bincount(place) for place in places]
    right = {name: [np.bincount(place, [value for _, value in seed]) for place, seed in zip(places, seeds, strict=True)]
             for name, seeds in systems.items()}
    totals, rng = {name: np.zeros(resamples) for name in systems}, np.random.default_rng(0)
    for _ in range(num_seeds):
        drawn = rng.integers(num_seeds, size=resamples)
        for seed, count in enumerate(counts):
            rows = np.flatnonzero(drawn == seed)
            times = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), size=len(rows)).astype(float)
            for name, total in totals.items():
                total[rows] += (times @ right[name][seed]) / (times @ count)
    return {name: total / num_seeds for name, total in totals.items()}


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def difference(value: float, first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """Test a difference whose value on all pairs is `value`, given the resamples of both systems, (R,) each."""
    differences = first - second
    # The observed pairs count as one more resample. Therefore we add 1, and p is never 0.
    tail = 1 + min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return Difference(value, *interval(differences), min(1.0, 2 * tail / (len(differences) + 1)))
