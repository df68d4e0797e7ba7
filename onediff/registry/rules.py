"""The promotion rules of mlflow/promotion.yaml, and functions that check a version against them. Imports no MLflow."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from onediff.config import Section
from onediff.config.reading import did_you_mean
from onediff.eval.metrics.catalog import FIGURE_RANGES, PAIR_METRICS
from onediff.eval.metrics.compute import Scores
from onediff.eval.resample import compare
from onediff.git import head, is_committed
from onediff.registry.evidence import in_range
from onediff.registry.facts import NO_GIT, YES

RULES = Path("mlflow/promotion.yaml")
# FIGURES has the names of all scores. The rules for a benchmark without scores may contain only these names.
FIGURES = {*FIGURE_RANGES, "num_pairs", "oracle_ratio"}
NOT_COMMITTED = "not committed"
Bound = Annotated[float, Field(allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# PairScores maps each benchmark to a dict with its protocol, references, pair_id, group_id and a list per metric.
PairScores = Mapping[str, Any]


def _of_pairs(path: str) -> str:
    if path.rpartition(".")[2] not in PAIR_METRICS:
        raise ValueError(f"must end with {' or '.join(PAIR_METRICS)}, the metrics with a score for each image pair, as "
                         f"in scenes.{PAIR_METRICS[0]}")
    return path


PairMetric = Annotated[str, AfterValidator(_of_pairs)]


class Improvement(Section):
    """The rule `better_than_champion`: on the metric `metric`, a candidate exceeds the champion by over `margin`."""

    metric: PairMetric
    margin: Loss


class Rules(Section):
    """The promotion rules in mlflow/promotion.yaml, which a registered version must meet to become champion.

    `minima` and `maxima` map scores in gate.json, such as `scenes.CIDEr`, to bounds. `better_than_champion` and
    `not_worse_than_champion` compare a version with the champion by a paired bootstrap over groups of image pairs;
    `not_worse_than_champion` maps each metric to the largest accepted loss. `max_caption_ms` (milliseconds per image
    pair) and `max_size_mib` are None for no limit. `require` lists facts about data and code that must be true.
    `approval_h` is the number of hours in which a person must approve a promotion, or None if nobody has to approve.
    """

    minima: dict[str, Bound]
    maxima: dict[str, Bound]
    better_than_champion: Improvement | None
    not_worse_than_champion: dict[PairMetric, Loss] = Field(default_factory=dict)
    max_caption_ms: Limit | None = None
    max_size_mib: Limit | None = None
    require: list[Literal["data_validated", "leak_audit", "clean_lineage"]] = Field(default_factory=list)
    approval_h: Limit | None = None

    @model_validator(mode="after")
    def _has_bounds(self) -> Self:
        if not self.minima and not self.maxima:
            raise ValueError("minima and maxima must have at least one entry together, but both are empty, so that any "
                             "model could become champion")
        for path in self.minima.keys() & self.maxima.keys():
            if self.minima[path] > self.maxima[path]:
                raise ValueError(f"{path}: the minimum must not be above the maximum {self.maxima[path]}, got "
                                 f"{self.minima[path]}")
        return self

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield pairs: a key of promotion.yaml that names a metric, and the metric's path, such as scenes.CIDEr."""
        for key in ("minima", "maxima", "not_worse_than_champion"):
            yield from ((f"{key}.{path}", path) for path in getattr(self, key))
        if self.better_than_champion is not None:
            yield "better_than_champion.metric", self.better_than_champion.metric


@dataclass(frozen=True)
class PromotionCase:
    """The inputs of the decision about one promotion, which a person may have to approve.

    `version` is the number of the version to promote, `model` the digest of its model folder, and `scores` the digest
    of its scores. `champion` is the number of the present champion, or None. `rules` is the SHA-256 of promotion.yaml,
    and `commit` the git commit that contains this file, "not committed" or "no git".
    """

    version: str
    model: str
    scores: str
    champion: str | None
    rules: str
    commit: str = field(compare=False)

    def __str__(self) -> str:
        against = f"version {self.champion} is champion" if self.champion else "there is no champion"
        return (f"version {self.version} (model {self.model[:12]}, scores {self.scores[:12]}, {against}, "
                f"rules {self.rules[:12]})")


@dataclass(frozen=True)
class Verdict:
    """The result of checking a registered version against the promotion rules.

    `promoted` is True if the version may become champion. `reasons` has one sentence for each broken rule. `replaced`
    is the number of the champion that the version replaces, or None. `figures` are the values that were compared with
    the rules: scores of the `gate` split such as scenes.CIDEr, caption_ms and size_mib.
    """

    version: str
    promoted: bool
    replaced: str | None = None
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    case: PromotionCase | None = field(default=None, compare=False)


def load_rules(path: Path = RULES) -> Rules:
    """Read the promotion rules from a YAML file. Raises ValueError with one line for each wrong value."""
    try:
        return Rules.model_validate(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} with the promotion rules does not exist: restore the file from git, or write "
                                "it as mlflow/README.md describes") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be valid YAML, got: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ValueError("\n".join(_explain(path, item) for item in error.errors())) from None


def _explain(path: Path, item: Any) -> str:
    where = ".".join(map(str, item["loc"])) or "the whole file"
    problem = (f"unknown key{_nearest(where, list(Rules.model_fields))}" if item["type"] == "extra_forbidden" else
               f"{item['msg'].removeprefix('Value error, ')}, got {item['input']!r}")
    return f"{path}: {where}: {problem}"


def _nearest(name: str, known: list[str]) -> str:
    return f"; {did_you_mean(name, known, 'possible are ' + ', '.join(known))}"


def commit_of_rules(path: Path = RULES) -> str:
    """Return the id of the checked-out git commit if the promotion rules in `path` equal the file in this commit.

    Otherwise return NOT_COMMITTED, or NO_GIT if there is no git repository. Raises ValueError if git refuses to read
    the repository.
    """
    if is_committed(path):
        return str(head())
    return NOT_COMMITTED if head() or Path(".git").exists() else NO_GIT


def uncommitted(commit: str, *, first: bool, file: Path) -> Iterator[str]:
    """Yield one reason if the promotion rules in `file` must not be used, because they are not in a git commit.

    `commit` is the result of `commit_of_rules`. `first` is True if there is no champion yet; the rules need no git
    repository then.
    """
    if commit == NOT_COMMITTED:
        yield (f"{file}: must equal the file in the git commit, but it was changed, staged or never added: run "
               f"'git add {file}' and 'git commit', or 'git checkout HEAD {file}'")
    elif commit == NO_GIT and not first:
        yield (f"{file}: must be in a git repository as soon as there is a champion, but there is no repository: run "
               "'git init', 'git add -A' and 'git commit'")


def check_metrics(rules: Rules, scores: Mapping[str, Any], *, file: Path = RULES) -> None:
    """Check that each metric in the promotion rules exists in the scores of its benchmark on the `gate` split.

    `scores` maps names such as scenes.CIDEr to values. Raises ValueError, with the most similar name, for an unknown
    metric. A benchmark without scores on this split is no error here, because `broken_rules` reports it.
    """
    wrong = []
    for key, path in rules.paths():
        benchmark, _, name = path.partition(".")
        known = [other.partition(".")[2] for other, value in scores.items()
                 if other.startswith(f"{benchmark}.") and not isinstance(value, str)]
        if known and name not in known:
            wrong.append(f"{file}: {key}: the gate scores of '{benchmark}' have no '{name}'{_nearest(name, known)}")
        elif not known and (last := path.rpartition(".")[2]) not in FIGURES:
            wrong.append(f"{file}: {key}: no metric is called '{last}'{_nearest(last, sorted(FIGURES))}")
    if wrong:
        raise ValueError("\n".join(wrong))


def broken_rules(rules: Rules, scores: Mapping[str, Any], facts: Mapping[str, str], *,
                 without_git: bool = False) -> Iterator[str]:
    """Yield one reason for each promotion rule that a version breaks, except rules that compare it with the champion.

    `scores` maps names such as scenes.CIDEr to scores on the `gate` split, and `facts` are the MLflow tags of the
    version. If `without_git` is True, the version may have been registered outside a git repository.
    """
    for path, least in rules.minima.items():
        if not number(scores, path) >= least:  # `not nan >= least` is True, so nan, a missing score, is refused too.
            yield f"{path} is {_value(scores, path)}, must be at least {least:g}"
    for path, most in rules.maxima.items():
        if not number(scores, path) <= most:
            yield f"{path} is {_value(scores, path)}, must be at most {most:g}"
    # Later candidates are compared with the first champion on these benchmarks, so it must have scores on them too.
    benchmarks = sorted({path.partition(".")[0] for path in scores})
    yield from (f"{key}: the gate scores have no benchmark '{name}'{_nearest(name, benchmarks)}"
                for key, path in rules.paths() if not key.startswith(("minima.", "maxima."))
                and (name := path.partition(".")[0]) not in benchmarks)
    for name, limit, unit in (("caption_ms", rules.max_caption_ms, "ms a pair"),
                              ("size_mib", rules.max_size_mib, "MiB")):
        if limit is not None and name not in facts:
            yield f"{name} was not measured, must be at most {limit:g} {unit}: register the version again"
        elif limit is not None and not 0 < float(facts[name]) <= limit:
            yield f"{name} is {float(facts[name]):.4g}, must be at most {limit:g} {unit}"
    for name in rules.require:
        if facts.get(name) == NO_GIT and not without_git:
            yield f"{name}: {NO_GIT}: run 'git init' and 'git commit', then register the version again"
        elif facts.get(name) not in (YES, NO_GIT):
            yield f"{name}: {facts.get(name, 'not known: register the version again')}"


def figures_of(rules: Rules, scores: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, float]:
    """Return a dict with those values of a version that the promotion rules use, without missing or invalid values.

    The keys are names such as scenes.CIDEr, caption_ms and size_mib.
    """
    figures = {path: number(scores, path) for _, path in rules.paths()}
    figures |= {name: float(facts[name]) for name in ("caption_ms", "size_mib") if name in facts}
    return {path: value for path, value in figures.items() if not math.isnan(value)}


def number(scores: Mapping[str, Any], path: str) -> float:
    """Return the score with the name `path`, such as scenes.CIDEr, or nan if it is missing or outside its range."""
    value = scores.get(path)
    return float(value) if in_range(path.rpartition(".")[2], value) else math.nan  # type: ignore[arg-type]


def _value(scores: Mapping[str, Any], path: str) -> str:
    if path not in scores:
        return "not in the gate scores"
    value = number(scores, path)
    return f"{scores[path]!r}, which is outside the range of this score" if math.isnan(value) else f"{value:.4g}"


def too_few_groups(rules: Rules, ours: PairScores) -> list[str]:
    """Return one reason for each benchmark in the promotion rules with only one group of image pairs in split `gate`.

    The comparison with the champion draws groups at random (bootstrap), which is meaningless for a single group.
    `ours` has the scores of each image pair of the candidate.
    """
    num_groups = {name: len(set(ours[name]["group_id"]))
                  for name in dict.fromkeys(path.partition(".")[0] for _, path in rules.paths()) if name in ours}
    return [f"{name}: the pairs of split gate must be of at least 2 groups (scenes or photographs), got {num}: add "
            "groups to split gate, then run 'dvc repro'" for name, num in num_groups.items() if num < 2]


def least_differences(rules: Rules) -> dict[str, float]:
    """Return a dict from each compared metric, such as scenes.CIDEr, to the bound for candidate minus champion.

    The complete 95 % confidence interval of this difference of scores must be above the bound.
    """
    best = rules.better_than_champion
    losses = {path: -loss for path, loss in rules.not_worse_than_champion.items()}
    return {best.metric: best.margin} | {**losses, best.metric: best.margin} if best else losses


def failed_comparisons(rules: Rules, ours: PairScores, theirs: PairScores, *, again: str) -> Iterator[str]:
    """Yield one reason for each compared metric on which the candidate is not good enough to replace the champion.

    `ours` and `theirs` are the scores of each image pair of the candidate and of the champion. The complete 95 %
    confidence interval of their difference must be above the bound from `least_differences`. `again` is the command
    that scores the champion again.
    """
    for path, least in least_differences(rules).items():
        benchmark, _, metric = path.rpartition(".")
        first, second = ours.get(benchmark), theirs.get(benchmark, {})
        if first is None:
            yield f"{path} is not in the scores of the pairs of split gate"
        elif not _scored_alike(first, second):
            yield (f"{path}: the champion was scored on other pairs, references or by another protocol: score it "
                   f"again: {again}")
        else:
            both = [Scores({metric: sum(table[metric]) / len(table[metric])}, {metric: table[metric]}, {})
                    for table in (first, second)]
            compared = compare(both[0], both[1], first["group_id"])[metric]
            if not compared.low > least:
                yield (f"{path} is {compared.first:.4g}, the champion's {compared.second:.4g}: the 95 % interval of "
                       f"the difference, {compared.low:+.3g} to {compared.high:+.3g}, must be above {least:+g}")


def incomparable(rules: Rules, ours: PairScores, theirs: PairScores) -> list[str]:
    """Return the benchmarks on which the promotion rules compare two versions although their scores are incomparable.

    The scores are incomparable if the versions were scored on different image pairs, with different reference captions
    or by different scoring protocols. `ours` and `theirs` are the scores of each image pair of the two versions.
    """
    benchmarks = dict.fromkeys(path.rpartition(".")[0] for path in least_differences(rules))
    return [name for name in benchmarks if name in ours and not _scored_alike(ours[name], theirs.get(name, {}))]


def _scored_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first[key] == second.get(key) for key in ("protocol", "references", "pair_id"))
