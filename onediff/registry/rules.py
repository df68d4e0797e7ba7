"""mlflow/promotion.yaml: what a candidate must reach to become champion, and whether it does. Imports no MLflow."""

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
FIGURES = {*FIGURE_RANGES, "num_pairs", "oracle_ratio"}  # what the rules may ask of a benchmark that was not scored
NOT_COMMITTED = "not committed"
Bound = Annotated[float, Field(allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PairScores = Mapping[str, Any]  # benchmark -> protocol, references, pair_id, group_id and a list for each metric


def _of_pairs(path: str) -> str:
    if path.rpartition(".")[2] not in PAIR_METRICS:
        raise ValueError(f"only {' and '.join(PAIR_METRICS)} are kept for each pair, as in scenes.{PAIR_METRICS[0]}")
    return path


PairMetric = Annotated[str, AfterValidator(_of_pairs)]


class Improvement(Section):
    metric: PairMetric
    margin: Loss


class Rules(Section):
    """Keys of `minima` and `maxima` are paths into gate.json such as `scenes.CIDEr`.

    `not_worse_than_champion`: the loss that chance alone must not be able to explain away. Both comparisons are by
    paired bootstrap over the groups of split gate. `max_caption_ms`, `max_size_mib`: None for no limit. `require`: what
    must be known of data and code. `approval_h`: hours in which a person must agree; None: nobody is asked.
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
            raise ValueError("minima and maxima are both empty: any model would become champion; set at least one")
        for path in self.minima.keys() & self.maxima.keys():
            if self.minima[path] > self.maxima[path]:
                raise ValueError(f"{path}: minimum {self.minima[path]} is above its maximum {self.maxima[path]}")
        return self

    def paths(self) -> Iterator[tuple[str, str]]:
        """Each key of the file that names a metric, and the metric's path."""
        for key in ("minima", "maxima", "not_worse_than_champion"):
            yield from ((f"{key}.{path}", path) for path in getattr(self, key))
        if self.better_than_champion is not None:
            yield "better_than_champion.metric", self.better_than_champion.metric


@dataclass(frozen=True)
class PromotionCase:
    """What a verdict decides about, and what a person approves. `model`: the digest of the version's folder; `scores`:
    the digest of its scores; `champion`: the version that it was compared with, if any; `rules`: the SHA-256 of
    promotion.yaml; `commit`: the commit that contains these rules, or "no git".
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
    """Whether the rules let a version become champion. `reasons`: every rule that a refused version breaks. `replaced`:
    the champion before it, if any. `figures`: gate scores by path, caption_ms and size_mib, as compared with the rules.
    """

    version: str
    promoted: bool
    replaced: str | None = None
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    case: PromotionCase | None = field(default=None, compare=False)


# --- the file --------------------------------------------------------------------------------------------------------


def load_rules(path: Path = RULES) -> Rules:
    """Reads the rules. Raises ValueError with one line per wrong value."""
    try:
        return Rules.model_validate(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: it says what a champion must reach; see mlflow/README.md") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ValueError("\n".join(_explain(path, item) for item in error.errors())) from None


def _explain(path: Path, item: Any) -> str:
    where = ".".join(map(str, item["loc"])) or "the whole file"
    problem = (f"unknown key{_nearest(where, list(Rules.model_fields))}" if item["type"] == "extra_forbidden" else
               f"{item['msg'].removeprefix('Value error, ')}, got {item['input']!r}")
    return f"{path}: {where}: {problem}"


def _nearest(name: str, known: list[str]) -> str:
    return f"; {did_you_mean(name, known, 'there are ' + ', '.join(known))}"


def commit_of_rules(path: Path = RULES) -> str:
    """The commit that contains the file with these bytes, NO_GIT, or NOT_COMMITTED.

    Raises ValueError for a repository that git does not read.
    """
    if is_committed(path):
        return str(head())
    return NOT_COMMITTED if head() or Path(".git").exists() else NO_GIT


def uncommitted(commit: str, *, first: bool, file: Path) -> Iterator[str]:
    """Why these rules may not be used. `commit`: see `commit_of_rules`; `first`: there is no champion yet."""
    if commit == NOT_COMMITTED:
        yield (f"{file}: must be the file that git has committed, got one that was changed, staged or never added: "
               f"'git add {file}' and 'git commit', or 'git checkout HEAD {file}'")
    elif commit == NO_GIT and not first:
        yield (f"{file}: must be in a git repository once there is a champion, got none: 'git init', 'git add -A' and "
               "'git commit'")


def check_metrics(rules: Rules, scores: Mapping[str, Any], *, file: Path = RULES) -> None:
    """Raises ValueError, naming the nearest one, for a figure that the gate scores of its benchmark do not have. A
    benchmark without gate scores is no error of the file: the candidate is refused for it.
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


# --- the candidate by itself -----------------------------------------------------------------------------------------


def broken_rules(rules: Rules, scores: Mapping[str, Any], facts: Mapping[str, str], *,
                 without_git: bool = False) -> Iterator[str]:
    """Why flattened gate scores and the facts in a version's tags do not meet the rules; nothing if they do.
    `without_git`: a version that was registered without git is not refused for that.
    """
    for path, least in rules.minima.items():
        if not number(scores, path) >= least:  # nan, a missing score, is refused too
            yield f"{path} is {_value(scores, path)}, must be at least {least:g}"
    for path, most in rules.maxima.items():
        if not number(scores, path) <= most:
            yield f"{path} is {_value(scores, path)}, must be at most {most:g}"
    # The first champion needs the benchmarks of the comparisons, too.
    benchmarks = sorted({path.partition(".")[0] for path in scores})
    yield from (f"{key}: the gate scores have no benchmark '{name}'{_nearest(name, benchmarks)}"
                for key, path in rules.paths() if not key.startswith(("minima.", "maxima."))
                and (name := path.partition(".")[0]) not in benchmarks)
    for name, limit, unit in (("caption_ms", rules.max_caption_ms, "ms a pair"),
                              ("size_mib", rules.max_size_mib, "MiB")):
        if limit is not None and name not in facts:
            yield f"{name} was not measured, must be at most {limit:g} {unit}: register it again"
        elif limit is not None and not 0 < float(facts[name]) <= limit:
            yield f"{name} is {float(facts[name]):.4g}, must be at most {limit:g} {unit}"
    for name in rules.require:
        if facts.get(name) == NO_GIT and not without_git:
            yield f"{name}: {NO_GIT}: 'git init' and 'git commit', then register again"
        elif facts.get(name) not in (YES, NO_GIT):
            yield f"{name}: {facts.get(name, 'not known: register it again')}"


def figures_of(rules: Rules, scores: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, float]:
    """The figures that the rules name, where they are known."""
    figures = {path: number(scores, path) for _, path in rules.paths()}
    figures |= {name: float(facts[name]) for name in ("caption_ms", "size_mib") if name in facts}
    return {path: value for path, value in figures.items() if not math.isnan(value)}


def number(scores: Mapping[str, Any], path: str) -> float:
    """The score, or nan if it is missing or outside its range."""
    value = scores.get(path)
    return float(value) if in_range(path.rpartition(".")[2], value) else math.nan  # type: ignore[arg-type]


def _value(scores: Mapping[str, Any], path: str) -> str:
    if path not in scores:
        return "not in the gate scores"
    value = number(scores, path)
    return f"{scores[path]!r}, which is outside the range of this score" if math.isnan(value) else f"{value:.4g}"


def too_few_groups(rules: Rules, ours: PairScores) -> list[str]:
    """One line for each benchmark in the rules whose gate pairs are all of one group. A bootstrap over one group is
    meaningless.
    """
    num_groups = {name: len(set(ours[name]["group_id"]))
                  for name in dict.fromkeys(path.partition(".")[0] for _, path in rules.paths()) if name in ours}
    return [f"{name}: the pairs of split gate must be of at least 2 groups (scenes or photographs), got {num}: give "
            "split gate more of them, then 'dvc repro'" for name, num in num_groups.items() if num < 2]


# --- the candidate against the champion: is the difference more than chance? -----------------------------------------


def least_differences(rules: Rules) -> dict[str, float]:
    """Path of a metric -> the value that the whole interval of the difference must lie above."""
    best = rules.better_than_champion
    losses = {path: -loss for path, loss in rules.not_worse_than_champion.items()}
    return {best.metric: best.margin} | {**losses, best.metric: best.margin} if best else losses


def failed_comparisons(rules: Rules, ours: PairScores, theirs: PairScores, *, again: str) -> Iterator[str]:
    """Why the candidate may not replace the champion: each metric for which the whole 95 % interval of the difference
    is not above its least value. `again`: the command that scores the champion again.
    """
    for path, least in least_differences(rules).items():
        benchmark, _, metric = path.rpartition(".")
        first, second = ours.get(benchmark), theirs.get(benchmark, {})
        if first is None:
            yield f"{path} is not in the gate scores of pairs"
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
    """The benchmarks to compare on which the two were scored on other pairs or references, or by another protocol."""
    benchmarks = dict.fromkeys(path.rpartition(".")[0] for path in least_differences(rules))
    return [name for name in benchmarks if name in ours and not _scored_alike(ours[name], theirs.get(name, {}))]


def _scored_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first[key] == second.get(key) for key in ("protocol", "references", "pair_id"))
