"""The registered model `onediff`: versions, and the aliases candidate, champion and previous.

A version is registered once per weights digest. It becomes champion only through mlflow/promotion.yaml, on the scores
of split `gate`. An alias has no history, so each change is also written as tags. With tracking.py the only file that
imports MLflow.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from onediff import tracking
from onediff.config import Section
from onediff.eval.evaluation import PAIR_METRICS
from onediff.eval.metrics import Scores
from onediff.eval.resample import compare
from onediff.model.digest import weights_digest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

NAME = "onediff"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
RULES = Path("mlflow/promotion.yaml")
SCORED = "scored"  # folder of a version: what each pair scored
CHAMPION_URI = f"models:/{NAME}@{CHAMPION}"
_CACHE = tracking.HOME / "models"  # versions fetched from a server
_MAIN = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "change_type_accuracy", "changed_object_accuracy", "false_alarm_rate",
         "swap_consistency", "operation_accuracy")
_HISTORY = ("promoted_at", "replaced", "reason", "replaced_at", "replaced_by", "rolled_back_at", "rolled_back_to",
            "refused_at", "refused_because")
Bound = Annotated[float, Field(strict=False, allow_inf_nan=False)]


def _of_pairs(path: str) -> str:
    if path.rpartition(".")[2] not in PAIR_METRICS:
        raise ValueError(f"only {' and '.join(PAIR_METRICS)} are kept for each pair, as in scenes.{PAIR_METRICS[0]}")
    return path


Loss = Annotated[float, Field(ge=0, strict=False, allow_inf_nan=False)]
PairMetric = Annotated[str, AfterValidator(_of_pairs)]


class Beats(Section):
    metric: PairMetric
    margin: Loss


class Rules(Section):
    """mlflow/promotion.yaml. Keys are paths into gate.json such as `scenes.CIDEr`.

    `not_worse_than_champion`: the loss that chance alone must not be able to explain away. Both comparisons are by
    paired bootstrap over the groups of split gate.
    """

    minima: dict[str, Bound]
    maxima: dict[str, Bound]
    better_than_champion: Beats | None
    not_worse_than_champion: dict[PairMetric, Loss] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.minima and not self.maxima:
            raise ValueError("minima and maxima are both empty: any model would become champion; set at least one")
        for path in self.minima.keys() & self.maxima.keys():
            if self.minima[path] > self.maxima[path]:
                raise ValueError(f"{path}: minimum {self.minima[path]} is above its maximum {self.maxima[path]}")
        return self


@dataclass(frozen=True)
class Verdict:
    """What `promote` decided. `reasons` holds every rule that a refused version breaks."""

    version: str
    promoted: bool
    replaced: str | None = None
    reasons: list[str] = field(default_factory=list)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """MLflow's failures as one line: ConnectionError if its server may answer the next time, else ValueError."""
    tracking.quiet()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = ConnectionError if error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE") else ValueError
        raise kind(f"MLflow at {tracking.uri()}: {' '.join(str(error).split())[:300]}") from None


def load_rules(path: Path = RULES) -> Rules:
    """Raises ValueError with one line per wrong value."""
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
    return f"{path}: {where}: {item['msg'].removeprefix('Value error, ')}, got {item['input']!r}"


@_plain_errors()
def register(model_dir: Path, scores_test: Path, scores_gate: Path, scored: Path, *, run_id: str | None = None,
             carried: Path | None = None) -> str:
    """Makes the model folder a version and `candidate`; returns the version's number. `scored`: the scores of each
    pair, test.json and gate.json.

    The same weights are the same version: it gets the new scores and no weight is copied. Does not load the model.
    Raises FileNotFoundError for what is not there, ValueError for scores that cannot be read.
    """
    digest = weights_digest(model_dir)
    _read_json(scored / "gate.json")
    scores = {"scores_test": _read_scores(scores_test), "scores_gate": _read_scores(scores_gate)}
    store = tracking.client()
    _make_registered_model()
    known = next((item for item in _versions() if item.tags.get("weights_digest") == digest), None)
    if known is None:
        tags = {"weights_digest": digest, "run_id": run_id or "none", **tracking.provenance(), **_score_tags(scores)}
        version = _create(model_dir, scored, tags, run_id, carried)
    else:
        version = str(known.version)
        _keep_scored(known, scored)
        if carried is not None:
            tracking.client().log_model_artifacts(_logged(known), str(carried))
        _tag(version, {key: value for key, value in _score_tags(scores).items() if known.tags.get(key) != value})
    store.set_registered_model_alias(NAME, CANDIDATE, version)
    return version


@_plain_errors()
def rescore(version: str, scores_test: Path, scores_gate: Path, scored: Path) -> None:
    """Writes new scores on a version, after `flows/evaluate.py` scored it again."""
    _keep_scored(_get(version), scored)
    _tag(version, _score_tags({"scores_test": _read_scores(scores_test), "scores_gate": _read_scores(scores_gate)}))


@_plain_errors()
def promote(version: str | None = None, *, rules: Path = RULES) -> Verdict:
    """Makes a version (default: the candidate) champion if it meets the rules on split `gate`.

    The champion itself is left as it is. A version that was rolled back comes back only if it is named.
    Raises ValueError if there is no such version.
    """
    demands = load_rules(rules)
    aliases = _aliases()
    wanted = version or _need(aliases, CANDIDATE, "register one first: 'make run', or 'dvc repro' and then register")
    candidate, old = _get(wanted), aliases.get(CHAMPION)
    if wanted == old:
        return Verdict(wanted, True, None, ["is the champion already"])
    champion = _get(old) if old else None
    reasons = judge(demands, _gate_scores(candidate))
    if champion:
        reasons += _not_better(demands, candidate, champion)
    if version is None and "rolled_back_at" in candidate.tags:
        reasons.append(f"it was rolled back on {candidate.tags['rolled_back_at']}; "
                       f"to take it all the same: onediff registry promote {wanted}")
    if reasons:
        _tag(wanted, {"refused_at": _now(), "refused_because": "; ".join(reasons)})
        return Verdict(wanted, False, None, reasons)
    beats = demands.better_than_champion is not None and old is not None
    _crown(wanted, old, f"meets {rules.name}" + (f", better than version {old}" if beats else ""))
    for key in ("refused_at", "refused_because", "rolled_back_at"):
        if key in candidate.tags:
            tracking.client().delete_model_version_tag(NAME, wanted, key)
    return Verdict(wanted, True, old)


def judge(rules: Rules, scores: Mapping[str, Any]) -> list[str]:
    """Why the flattened gate scores do not meet minima and maxima; an empty list: they do."""
    reasons = []
    for path, least in rules.minima.items():
        if not _number(scores, path) >= least:  # nan, a missing score, is refused too
            reasons.append(f"{path} is {_said(scores, path)}, must be at least {least:g}")
    for path, most in rules.maxima.items():
        if not _number(scores, path) <= most:
            reasons.append(f"{path} is {_said(scores, path)}, must be at most {most:g}")
    return reasons


@_plain_errors()
def rollback() -> str:
    """Makes `previous` the champion again; returns its version. `previous` then is the one it had replaced, if any.

    Raises ValueError if there is no champion or no previous one.
    """
    aliases = _aliases()
    left = _need(aliases, CHAMPION, "nothing to roll back; 'onediff registry promote' makes one")
    back = _need(aliases, PREVIOUS, f"version {left} is the first champion; nothing to roll back to")
    before = _get(back).tags.get("replaced")
    store = tracking.client()
    store.set_registered_model_alias(NAME, CHAMPION, back)
    if before and before != left:
        store.set_registered_model_alias(NAME, PREVIOUS, before)
    else:
        store.delete_registered_model_alias(NAME, PREVIOUS)
    _tag(left, {"rolled_back_at": _now(), "rolled_back_to": back})
    _tag(back, {"promoted_at": _now(), "reason": f"rolled back from version {left}"})
    return back


@_plain_errors()
def list_versions() -> list[dict[str, Any]]:
    """One dict per version, newest first: version, aliases, created, weights_digest, git_commit, run_id, scores (the
    main ones of split gate, by path) and history (what became of it, by tag).

    Raises ValueError if nothing is registered.
    """
    aliases = _aliases()
    rows = []
    for item in sorted(_versions(), key=lambda item: int(item.version), reverse=True):
        created = datetime.fromtimestamp(item.creation_timestamp / 1000, UTC)
        rows.append({"version": str(item.version),
                     "aliases": sorted(alias for alias, version in aliases.items() if version == str(item.version)),
                     "created": created.isoformat(timespec="seconds"),
                     **{key: item.tags.get(key, "none") for key in ("weights_digest", "git_commit", "run_id")},
                     "scores": _main_scores(_gate_scores(item)),
                     "history": {key: item.tags[key] for key in _HISTORY if key in item.tags}})
    return rows


@_plain_errors()
def model_folder(uri: str = CHAMPION_URI) -> Path:
    """The model folder of models:/onediff@ALIAS or models:/onediff/VERSION, for `Captioner.load`.

    A version on a server is fetched once, into .onediff/models. Raises ValueError if there is no such version.
    """
    found = _resolve(uri)
    try:
        folder = _fetch(found)
        described = YAML(typ="safe").load((folder / "MLmodel").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{uri}: its files are not where MLflow at {tracking.uri()} says ({error}); "
                         "bring them back, or train and register it again") from None
    return folder / described["flavors"]["python_function"]["data"]


@_plain_errors()
def version_files(uri: str = CHAMPION_URI) -> Path:
    """Everything that a version carries: its model, `scored`, `lineage`, README.md. Raises ValueError as above."""
    try:
        return _fetch(_resolve(uri))
    except OSError as error:
        raise ValueError(f"{uri}: its files are not where MLflow at {tracking.uri()} says ({error}); "
                         "bring them back, or train and register it again") from None


@_plain_errors()
def version_text(uri: str, name: str) -> str:
    """One text file that a version carries, such as lineage/lineage.json; its weights are not fetched for it.

    Raises ValueError if there is no such version, FileNotFoundError if it carries no such file.
    """
    version = _resolve(uri)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    where = tracking.client().get_logged_model(_logged(version)).artifact_location
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = download_artifacts(artifact_uri=f"{where}/{name}", dst_path=scratch, tracking_uri=tracking.uri())
            return Path(found).read_text(encoding="utf-8")
        except (MlflowException, OSError) as error:
            raise FileNotFoundError(f"{where}/{name} not found ({' '.join(str(error).split())[:200]})") from None


@_plain_errors()
def version_tags(uri: str = CHAMPION_URI) -> dict[str, str]:
    """What is noted of a version, its number too. Raises ValueError if there is no such version."""
    found = _resolve(uri)
    return {**found.tags, "version": str(found.version)}


def _create(model_dir: Path, scored: Path, tags: dict[str, str], run_id: str | None, carried: Path | None) -> str:
    """Copies the folder into a logged model and makes it a version, with all its tags in one step."""
    store, experiment = tracking.client(), tracking.experiment_id()
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    try:
        known_run = store.get_run(run_id).info.run_id if run_id else None
    except MlflowException:  # the phase ran elsewhere and came out of DVC's cache: its id stays as a tag
        known_run = None
    logged = store.create_logged_model(experiment, name=NAME, source_run_id=known_run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(folder, loader_module="onediff.serve.pyfunc", data_path=str(model_dir), signature=_signature(),
                   input_example=[{"before": "before.png", "after": "after.png"}], pip_requirements=[_requirement()],
                   mlflow_model=Model(artifact_path=logged.artifact_location, model_uuid=logged.model_id,
                                      run_id=known_run, model_id=logged.model_id))
        shutil.copytree(scored, folder / SCORED)
        if carried is not None:
            shutil.copytree(carried, folder, dirs_exist_ok=True)
        store.log_model_artifacts(logged.model_id, str(folder))
    store.finalize_logged_model(logged.model_id, "READY")
    source = f"models:/{logged.model_id}"
    return str(store.create_model_version(NAME, source, known_run, tags=tags, model_id=logged.model_id).version)


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    inputs = [ColSpec("string", "before"), ColSpec("string", "after"), ColSpec("string", "instruction", required=False)]
    return ModelSignature(Schema(inputs), Schema([ColSpec("string")]))


def _requirement() -> str:
    """Said, so that MLflow infers nothing. The code is not copied: a version loads where OneDiff is installed."""
    try:
        return f"onediff-idc[full]=={installed_version('onediff-idc')}"
    except PackageNotFoundError:  # run from a checkout
        return "onediff-idc[full]"


def _crown(version: str, old: str | None, reason: str) -> None:
    store = tracking.client()
    if old is not None:
        store.set_registered_model_alias(NAME, PREVIOUS, old)
        _tag(old, {"replaced_at": _now(), "replaced_by": version})
    store.set_registered_model_alias(NAME, CHAMPION, version)
    _tag(version, {"promoted_at": _now(), "replaced": old or "", "reason": reason})


def _not_better(rules: Rules, candidate: ModelVersion, champion: ModelVersion) -> list[str]:
    """Why the candidate may not replace the champion: each comparison that it does not stand."""
    demands = [(path, -loss) for path, loss in rules.not_worse_than_champion.items()]
    if rules.better_than_champion is not None:
        demands.insert(0, (rules.better_than_champion.metric, rules.better_than_champion.margin))
    ours, theirs = (_scored(version) for version in (candidate, champion)) if demands else ({}, {})
    return [reason for path, least in demands if (reason := _compared(path, least, ours, theirs, champion.version))]


def _compared(path: str, least: float, ours: Mapping[str, Any], theirs: Mapping[str, Any], champion: str) -> str | None:
    """Why the difference to the champion is not above `least`, or None: the whole 95 % interval of it is."""
    benchmark, _, metric = path.rpartition(".")
    if benchmark not in ours:
        return f"{path} is not in the gate scores of pairs"
    first, second = ours[benchmark], theirs.get(benchmark, {})
    if any(first[key] != second.get(key) for key in ("protocol", "references", "pair_id")):
        return (f"{path}: the champion was scored on other pairs, references or by another protocol: score it again: "
                f"python -m flows.evaluate models:/{NAME}/{champion}")
    both = [Scores({metric: sum(part[metric]) / len(part[metric])}, {metric: part[metric]}, {})
            for part in (first, second)]
    found = compare(both[0], both[1], first["group_id"])[metric]
    if found.low > least:
        return None
    return (f"{path} is {found.first:.4g}, the champion's {found.second:.4g}: the 95 % interval of the difference, "
            f"{found.low:+.3g} to {found.high:+.3g}, must be above {least:+g}")


def _keep_scored(version: ModelVersion, scored: Path) -> None:
    """The scores of each pair beside the version's weights; they replace older ones."""
    tracking.client().log_model_artifacts(_logged(version), str(scored), SCORED)


@_plain_errors()
def scored_pairs(uri: str, split: str = "test") -> dict[str, Any]:
    """benchmark -> what each pair of the split scored with models:/onediff@ALIAS or models:/onediff/VERSION.

    Raises ValueError if there is no such version or it was registered without.
    """
    found = _scored(_resolve(uri), split)
    if not found:
        raise ValueError(f"{uri} has no scores of single pairs: score it again: python -m flows.evaluate {uri}")
    return found


def _scored(version: ModelVersion, split: str = "gate") -> dict[str, Any]:
    """Empty if the version was registered without."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    where = tracking.client().get_logged_model(_logged(version)).artifact_location
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = download_artifacts(artifact_uri=f"{where}/{SCORED}/{split}.json", dst_path=scratch,
                                       tracking_uri=tracking.uri())
        except (MlflowException, OSError):
            return {}
        return _read_json(Path(found))


def _logged(version: ModelVersion) -> str:
    return str(version.source).removeprefix("models:/")


def _number(scores: Mapping[str, Any], path: str) -> float:
    value = scores.get(path)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _said(scores: Mapping[str, Any], path: str) -> str:
    return f"{_number(scores, path):.4g}" if path in scores else "not in the gate scores"


def _read_scores(path: Path) -> dict[str, Any]:
    """Flat, without lists: {"scenes.CIDEr": 3.1, ...}."""
    return {key: value for key, value in tracking.flatten(_read_json(path)).items() if not isinstance(value, list)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: 'dvc repro' makes it") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); 'dvc repro score' writes it again") from None
    if not isinstance(scores, dict):
        raise ValueError(f"{path}: must be a mapping of benchmarks, got {type(scores).__name__}")
    return scores


def _score_tags(scores: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """All scores as one JSON tag per split, and the main ones as a tag each, for the eye."""
    tags = {key: json.dumps(values, sort_keys=True) for key, values in scores.items()}
    for key, values in scores.items():
        split = key.removeprefix("scores_")
        tags |= {f"{split}.{path}": f"{value:.4g}" for path, value in _main_scores(values).items()}
    return tags


def _main_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    return {path: float(value) for path, value in scores.items()
            if path.count(".") == 1 and path.split(".")[1] in _MAIN and isinstance(value, (int, float))}


def _gate_scores(version: ModelVersion) -> dict[str, Any]:
    return json.loads(version.tags.get("scores_gate", "{}"))


def _make_registered_model() -> None:
    store = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        store.get_registered_model(NAME)
    except MlflowException:
        store.create_registered_model(NAME, description="Two images in, what changed in words out.")


def _versions() -> list[ModelVersion]:
    return list(tracking.client().search_model_versions(f"name = '{NAME}'", max_results=1000))


def _aliases() -> dict[str, str]:
    """Alias -> version. Raises ValueError if nothing is registered."""
    store = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        found = store.get_registered_model(NAME).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"no version of '{NAME}' at {tracking.uri()}: 'make run' trains and registers one") from None
    return {alias: str(version) for alias, version in found.items()}


def _get(version: str) -> ModelVersion:
    store = tracking.client()
    from mlflow.exceptions import MlflowException

    try:
        return store.get_model_version(NAME, version)
    except MlflowException:
        known = ", ".join(sorted((str(item.version) for item in _versions()), key=int)) or "none"
        raise ValueError(f"version {version} of '{NAME}' is not registered; there are: {known}") from None


def _need(aliases: Mapping[str, str], alias: str, cure: str) -> str:
    if alias not in aliases:
        raise ValueError(f"no version of '{NAME}' is {alias}: {cure}")
    return aliases[alias]


def _resolve(uri: str) -> ModelVersion:
    name, _, version = uri.removeprefix("models:/").partition("/")
    name, _, alias = name.partition("@")
    if not uri.startswith("models:/") or name != NAME or bool(alias) == bool(version):
        raise ValueError(f"'{uri}' names no version: write models:/{NAME}@{CHAMPION} or models:/{NAME}/1")
    return _get(version or _need(_aliases(), alias, "'onediff registry list' shows what there is"))


def _fetch(version: ModelVersion) -> Path:
    """The version's folder: where it is if it is on this machine, else a copy in the cache."""
    from mlflow.artifacts import download_artifacts

    store = tracking.client()
    source = store.get_model_version_download_uri(NAME, str(version.version))
    if source.startswith("models:/"):
        source = store.get_logged_model(source.removeprefix("models:/")).artifact_location
    if source.startswith("file:"):
        return Path(download_artifacts(artifact_uri=source))
    target = _CACHE / version.tags["weights_digest"]
    if not (target / "MLmodel").exists():
        with tempfile.TemporaryDirectory(dir=_made(_CACHE)) as scratch:
            download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=tracking.uri())
            next(Path(scratch).rglob("MLmodel")).parent.rename(target)
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tag(version: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        tracking.client().set_model_version_tag(NAME, version, key, value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
