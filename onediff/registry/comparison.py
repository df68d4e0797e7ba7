"""Is the candidate better than the champion by more than chance? On what each pair of split gate scored; no MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onediff.eval.metrics.compute import Scores
from onediff.eval.resample import compare
from onediff.registry.rules import Rules

PairScores = Mapping[str, Any]  # benchmark -> protocol, references, pair_id, group_id and a list for each metric
_SAME = ("protocol", "references", "pair_id")


def demands(rules: Rules) -> dict[str, float]:
    """Path -> what the whole interval of the difference must lie above."""
    asked = {path: -loss for path, loss in rules.not_worse_than_champion.items()}
    best = rules.better_than_champion
    return ({best.metric: best.margin} if best else {}) | {path: least for path, least in asked.items()
                                                           if not best or path != best.metric}


def not_better(rules: Rules, ours: PairScores, theirs: PairScores, *, again: str) -> list[str]:
    """Why the candidate may not replace the champion: each comparison that it does not stand. `again`: the command that
    scores the champion again.
    """
    return [reason for path, least in demands(rules).items()
            if (reason := _compared(path, least, ours, theirs, again))]


def too_few_groups(rules: Rules, ours: PairScores) -> list[str]:
    """One line for each benchmark in the rules whose gate pairs are all of one group. A bootstrap over one group is
    meaningless.
    """
    benchmarks = dict.fromkeys(path.partition(".")[0] for _, path in rules.paths())
    return [f"{name}: the pairs of split gate must be of at least 2 groups (scenes or photographs), got "
            f"{len(set(ours[name]['group_id']))}: give split gate more of them, then 'dvc repro'"
            for name in benchmarks if name in ours and len(set(ours[name]["group_id"])) < 2]


def incomparable(rules: Rules, ours: PairScores, theirs: PairScores) -> list[str]:
    """The benchmarks to be compared that the two did not see alike: other pairs, references or protocol."""
    benchmarks = dict.fromkeys(path.rpartition(".")[0] for path in demands(rules))
    return [name for name in benchmarks if name in ours and not _alike(ours[name], theirs.get(name, {}))]


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first[key] == second.get(key) for key in _SAME)


def _compared(path: str, least: float, ours: PairScores, theirs: PairScores, again: str) -> str | None:
    """Why the difference to the champion is not above `least`, or None: the whole 95 % interval of it is."""
    benchmark, _, metric = path.rpartition(".")
    if benchmark not in ours:
        return f"{path} is not in the gate scores of pairs"
    first, second = ours[benchmark], theirs.get(benchmark, {})
    if not _alike(first, second):
        return (f"{path}: the champion was scored on other pairs, references or by another protocol: score it again: "
                f"{again}")
    both = [Scores({metric: sum(part[metric]) / len(part[metric])}, {metric: part[metric]}, {})
            for part in (first, second)]
    found = compare(both[0], both[1], first["group_id"])[metric]
    if found.low > least:
        return None
    return (f"{path} is {found.first:.4g}, the champion's {found.second:.4g}: the 95 % interval of the difference, "
            f"{found.low:+.3g} to {found.high:+.3g}, must be above {least:+g}")
