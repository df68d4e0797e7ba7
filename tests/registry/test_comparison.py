from __future__ import annotations

import re
from pathlib import Path

from registered import BENCHMARK, pairs_of, write_rules

from onediff.registry import load_rules
from onediff.registry.comparison import incomparable, not_better


def pairs(cider: float, *, edits: float = 1.0, references: str = "r1", noise: float = 0) -> dict[str, object]:
    return pairs_of({name: {**BENCHMARK, "references": references, "CIDEr": score}
                     for name, score in (("scenes", cider), ("edits", edits))}, noise=noise)


def reasons(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    return not_better(load_rules(write_rules(Path("rules.yaml"))), ours, theirs, again="again")


def test_a_gain_that_chance_explains_is_no_gain() -> None:
    reason, = reasons(pairs(3.1, noise=2.0), pairs(3.0))
    assert re.search(r"scenes.CIDEr is 3.1, the champion's 3: .* -0.\d+ to \+0.\d+, must be above \+0", reason)
    assert reasons(pairs(3.1, noise=0.1), pairs(3.0)) == []


def test_a_gain_may_not_be_paid_for_on_another_benchmark() -> None:
    assert reasons(pairs(4.0, edits=0.4), pairs(3.0)) == [
        "edits.CIDEr is 0.4, the champion's 1: the 95 % interval of the difference, -0.6 to -0.6, must be above -0.5"]
    assert reasons(pairs(4.0, edits=0.6), pairs(3.0)) == []


def test_other_references_pairs_or_none_are_not_compared() -> None:
    rules = load_rules(write_rules(Path("rules.yaml")))
    assert incomparable(rules, pairs(4.0), pairs(3.0)) == []
    for theirs in (pairs(3.0, references="r2"), {}):
        assert incomparable(rules, pairs(4.0), theirs) == ["scenes", "edits"]
        assert reasons(pairs(4.0), theirs)[0].endswith("score it again: again")
    assert reasons({}, pairs(3.0))[0] == "scenes.CIDEr is not in the gate scores of pairs"
