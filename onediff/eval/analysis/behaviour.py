"""Behaviour figures: compare the change that a caption claims with the true change of a generated pair.

BLEU and CIDEr give a high score to "the red cube was removed" if the blue cube was removed; these figures count such a
caption as wrong.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onediff.eval.analysis.grammar import (
    Change,
    inverse,
    inverse_edit,
    read_edit,
    read_scene,
    same_object,
    says_the_edit,
    says_the_truth,
    truth,
    undone,
    undone_edit,
)
from onediff.eval.metrics.words import Predictions
from onediff.eval.protocols import PairRow

RESAMPLES = 2000
Outcomes = Sequence[tuple[str, float]]  # for each pair: (group_id, outcome from 0 = wrong to 1 = right)


def scene_checks(prediction: str, row: PairRow) -> dict[str, bool]:
    """Return which parts of a scene caption are correct, as {part: whether it is correct}.

    The parts are "type" (of the change), "object" (color and shape) and "outcome" (new color, material or direction, if
    the change has one). For an unchanged pair, the only part is "no change". The caption is correct if all parts are
    correct.
    """
    claim, true = read_scene(prediction), truth(row)
    if true.change_type == "none":
        return {"no change": claim.change_type == "none"}
    checks = {"type": claim.change_type == true.change_type, "object": same_object(claim, true)}
    if true.new or true.direction:
        checks["outcome"] = checks["type"] and (claim.new, claim.direction) == (true.new, true.direction)
    return checks


def edit_checks(prediction: str, row: PairRow) -> dict[str, bool]:
    """Return {"operation": whether the caption names the right edit}. Object and position are not checked."""
    return {"operation": read_edit(prediction).change_type == row["change_type"]}


def scene_behaviour(predictions: Predictions, rows: Iterable[PairRow]) -> dict[str, Any]:
    """Return the behaviour figures of scene captions: shares from 0 to 1, and 95 % intervals under "intervals".

    Shares of changed pairs: change_found_rate (the caption claims a change), change_type_accuracy,
    changed_object_accuracy (color and shape are right), change_accuracy (type, object and result are right). Shares of
    unchanged pairs: no_change_accuracy (the caption says that nothing changed) and false_alarm_rate (it claims a
    change). Share of the pairs whose swapped pair is also in `rows`: swap_consistency (the captions of the pair and of
    the swapped pair describe inverse changes, even if both captions are wrong). Share of all pairs: unreadable_rate.

    An unreadable caption is right in no figure: it finds no change, has no right type or object, is not consistent, and
    does not say that nothing changed. It is no false alarm either, because it claims no change; so the sum of
    no_change_accuracy and false_alarm_rate is below 1 if captions of unchanged pairs are unreadable. A figure without
    pairs is left out.
    """
    table = [(row, read_scene(predictions[row["pair_id"]]), truth(row)) for row in rows]
    claims = {row["pair_id"]: claim for row, claim, _ in table}
    changed = [(row["group_id"], claim, true) for row, claim, true in table if true.change_type != "none"]
    right_types = [(group, claim.change_type == true.change_type) for group, claim, true in changed]
    result = rates({
        "change_found_rate": [(group, claims_change(claim)) for group, claim, _ in changed],
        "change_type_accuracy": right_types,
        "changed_object_accuracy": [(group, same_object(claim, true)) for group, claim, true in changed],
        "change_accuracy": [(group, says_the_truth(claim, true)) for group, claim, true in changed],
        **_unchanged_and_unreadable([(row, claim) for row, claim, _ in table]),
        "swap_consistency": [(row["group_id"], inverse(claims[row["provenance"]["swap_of"]], claim))
                             for row, claim, _ in table if row["provenance"].get("swap_of") in claims],
    })
    changed_rows = [row for row, _, true in table if true.change_type != "none"]
    return result | {"change_type_accuracy_by_type": _by_type(changed_rows, right_types)}


def edit_behaviour(predictions: Predictions, rows: Iterable[PairRow]) -> dict[str, Any]:
    """Return the behaviour figures of captions of edits: shares from 0 to 1, and 95 % intervals under "intervals".

    Shares of all pairs: operation_accuracy (the caption names the right operation) and unreadable_rate. Shares of
    unchanged pairs: no_change_accuracy and false_alarm_rate, as for scenes. Share of the pairs that are another pair
    with its images swapped: swapped_accuracy (the caption names the operation that leads back, and everything that its
    sentence can say: place, turn, tint, object). An unreadable caption is not right and is no false alarm.

    operation_accuracy_by_operation has the share of right operations for each operation. by_picture has the number of
    pairs and operation_accuracy for each kind of picture: photographs of packages, generated pictures and canvases.
    swapped_accuracy_by_operation has the number of swapped pairs and swapped_accuracy for each operation that leads
    back. A figure without pairs is left out.
    """
    table = [(row, read_edit(predictions[row["pair_id"]])) for row in rows]
    outcomes = [(row["group_id"], claim.change_type == row["change_type"]) for row, claim in table]
    swapped = [(row, says_the_edit(claim, truth(row))) for row, claim in table if row["provenance"].get("swap_of")]
    ways_back = [(row["group_id"], right) for row, right in swapped]
    result = rates({"operation_accuracy": outcomes, **_unchanged_and_unreadable(table), "swapped_accuracy": ways_back})
    all_rows, swapped_rows = [row for row, _ in table], [row for row, _ in swapped]
    pictured = [(row["provenance"]["kind"], outcome) for row, outcome in zip(all_rows, outcomes, strict=True)
                if "kind" in row["provenance"]]
    return {**result, "operation_accuracy_by_operation": _by_type(all_rows, outcomes),
            "by_picture": rates_by([kind for kind, _ in pictured],
                                   {"operation_accuracy": [outcome for _, outcome in pictured]}),
            "swapped_accuracy_by_operation": rates_by([row["change_type"] for row in swapped_rows],
                                                      {"swapped_accuracy": ways_back})}


def claims_change(claim: Change) -> bool:
    """Return whether a caption claims a change. An unreadable caption claims nothing."""
    return claim.change_type not in (None, "none")


def _unchanged_and_unreadable(table: Sequence[tuple[PairRow, Change]]) -> dict[str, Outcomes]:
    """Return the outcomes of no_change_accuracy and false_alarm_rate (unchanged pairs) and unreadable_rate (all pairs).

    `table` has the row and the claimed change of each pair.
    """
    unchanged = [(row["group_id"], claim) for row, claim in table if row["change_type"] == "none"]
    return {"no_change_accuracy": [(group, claim.change_type == "none") for group, claim in unchanged],
            "false_alarm_rate": [(group, claims_change(claim)) for group, claim in unchanged],
            "unreadable_rate": [(row["group_id"], claim.change_type is None) for row, claim in table]}


def by_change_type(rows: Sequence[PairRow]) -> dict[str, list[int]]:
    """Return {change type: positions of the rows with this change type}, sorted by change type."""
    return {kind: [place for place, row in enumerate(rows) if row["change_type"] == kind]
            for kind in sorted({row["change_type"] for row in rows})}


def _by_type(rows: Sequence[PairRow], outcomes: Outcomes) -> dict[str, float]:
    return {kind: sum(outcomes[place][1] for place in places) / len(places)
            for kind, places in by_change_type(rows).items()}


def rates(outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """Return {name: mean of the outcomes under this name}, and the 95 % intervals of these means under "intervals".

    A name without outcomes is left out.
    """
    known = {name: values for name, values in outcomes.items() if values}
    return {**{name: sum(ok for _, ok in values) / len(values) for name, values in known.items()},
            "intervals": {name: interval(values) for name, values in known.items()}}


def rates_by(labels: Sequence[str], outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """Return, for each label in alphabetical order, the number of pairs with this label, and their `rates`.

    `labels` has one label for each pair, for example the change type, in the order of the outcomes.
    """
    places = {label: [place for place, other in enumerate(labels) if other == label] for label in sorted({*labels})}
    return {label: {"num_pairs": len(chosen),
                    **rates({name: [each[place] for place in chosen] for name, each in outcomes.items()})}
            for label, chosen in places.items()}


def interval(outcomes: Outcomes) -> list[float]:
    """Return the 95 % bootstrap interval [low, high] of the mean outcome.

    The bootstrap draws groups instead of pairs, because pairs from one scene or photograph are not independent.
    """
    groups = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in outcomes))}
    numbers = [groups[group] for group, _ in outcomes]
    right, count = np.bincount(numbers, [ok for _, ok in outcomes]), np.bincount(numbers)
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    shares = right[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    return [float(bound) for bound in np.percentile(shares, [2.5, 97.5])]


@dataclass(frozen=True)
class Grammar:
    """The functions that read and judge the captions of a generated source.

    `read`: read a caption with both grammars, in the terms of this source. `undone`: return the change that undoes a
    change, which is the true change of the swapped pair; None if nothing changed. `says`: return whether a claimed
    change is the true change. `inverse`: return whether the second claimed change is the inverse of the first, even if
    both are wrong. `checks`: return which parts of a caption are correct. `behaviour`: return the behaviour figures of
    a set of captions.
    """

    read: Callable[[str], Change]
    undone: Callable[[Change], Change | None]
    says: Callable[[Change, Change], bool]
    inverse: Callable[[Change, Change], bool]
    checks: Callable[[str, PairRow], dict[str, bool]]
    behaviour: Callable[[Predictions, Iterable[PairRow]], dict[str, Any]]


# The keys are the values of Protocol.grammar. If a protocol has no grammar, captions are not read.
GRAMMARS: dict[str | None, Grammar] = {
    "scenes": Grammar(read_scene, undone, says_the_truth, inverse, scene_checks, scene_behaviour),
    "edits": Grammar(read_edit, undone_edit, says_the_edit, inverse_edit, edit_checks, edit_behaviour)}
