"""Versions of the registered model: each weights digest is registered once; new scores replace older ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from configparser import RawConfigParser
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff import tracking
from onediff.config import load_runtime
from onediff.model.digest import weights_digest
from onediff.registry import store
from onediff.registry.artifacts import REFERENCE, SCORED, keep
from onediff.registry.facts import YES, facts, locked_md5, size_mib
from onediff.registry.promotion import REFUSED, champion_moves, gate_scores, propose
from onediff.registry.store import CHAMPION, NAME
from onediff.registry.writers import may_write, shared, writing

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_MAIN = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "change_type_accuracy", "changed_object_accuracy", "false_alarm_rate",
         "swap_consistency", "operation_accuracy")
_FACTS = ("data_validated", "leak_audit", "clean_lineage")
_TOLD = "told"  # tag: digest of scores and of what each pair scored


@store.plain_errors()
def register(model_dir: Path, scores_test: Path, scores_gate: Path, scored: Path, *, run_id: str | None = None,
             carried: Path | None = None, measured: Mapping[str, float] | None = None, by: str | None = None) -> str:
    """Makes the model folder a version and the candidate; returns the version's number. On a shared registry it becomes
    the candidate only inside `sole_writer`.

    `scored`: the scores of each pair, test.json and gate.json. `carried`: a folder whose content is kept beside them.
    `measured`: figures such as caption_ms. The same weights are the same version: it gets new scores, with all that was
    found out now, and no weight is copied. Does not load the model. Raises FileNotFoundError for what is not there,
    ValueError for scores that cannot be read.
    """
    digest = weights_digest(model_dir)
    _read_json(scored / "gate.json")
    scores = {"scores_test": _read_scores(scores_test), "scores_gate": _read_scores(scores_gate)}
    if shared():
        version = _registered(model_dir, scored, digest, scores, run_id=run_id, carried=carried, measured=measured)
    else:
        with writing():  # or two processes make the same weights two versions
            version = _registered(model_dir, scored, digest, scores, run_id=run_id, carried=carried, measured=measured)
    if may_write():
        propose(version, by=by)
    return version


@store.plain_errors()
def version_with(model_dir: Path) -> str | None:
    """The version that has a model folder's weights, if it was registered."""
    found = _first_with(weights_digest(model_dir))
    return str(found.version) if found else None


@store.plain_errors()
def rescore(version: str, scores_test: Path, scores_gate: Path, scored: Path) -> None:
    """Writes new scores on a version, after `flows/evaluate.py` scored it again."""
    scores = {"scores_test": _read_scores(scores_test), "scores_gate": _read_scores(scores_gate)}
    keep(store.get(version), scored, SCORED)
    store.tag(NAME, version, _score_tags(scores) | {_TOLD: _digest(scores, scored)})


@store.plain_errors()
def list_versions() -> list[dict[str, Any]]:
    """One dict per version, newest first: version, aliases, created, weights_digest, git_commit, run_id, scores (the
    main ones of split gate, by path), refused (when and why, or nothing) and changes (of the champion that it took part
    in, in words).

    Raises ValueError if nothing is registered.
    """
    now, moves = store.aliases(), champion_moves()
    rows = []
    for item in reversed(store.all_of(NAME)):
        number = str(item.version)
        rows.append({"version": number, "aliases": sorted(alias for alias, version in now.items() if version == number),
                     "created": store.when(item.creation_timestamp),
                     **{key: item.tags.get(key, "none") for key in ("weights_digest", "git_commit", "run_id")},
                     "scores": _main_scores(gate_scores(item)),
                     "refused": ": ".join(item.tags[key] for key in REFUSED if key in item.tags),
                     "changes": [str(one) for one in moves
                                 if number in (one.old.get(CHAMPION), one.new.get(CHAMPION))]})
    return rows


def _registered(model_dir: Path, scored: Path, digest: str, scores: Mapping[str, dict[str, Any]], *,
                run_id: str | None, carried: Path | None, measured: Mapping[str, float] | None) -> str:
    store.make_model(NAME, "Two images in, what changed in words out.")
    told = _digest(scores, scored)
    known = _first_with(digest)
    if known and known.tags.get(_TOLD) == told and all(known.tags.get(name) == YES for name in _FACTS) \
            and not set(measured or {}) - set(known.tags):
        return str(known.version)  # nothing new is known; that it came of a clean commit stays written
    tags = {"weights_digest": digest, "run_id": run_id or "none", **tracking.provenance(), **_score_tags(scores),
            **facts(model_dir), "size_mib": f"{size_mib(model_dir):.6g}",
            **{key: f"{value:.6g}" for key, value in (measured or {}).items()}}
    if known is None:
        made = _create(model_dir, scored, carried, tags | {_TOLD: told}, run_id)
        first = _first_with(digest)
        if first is None or first.version == made.version:
            return str(made.version)
        tracking.client().delete_model_version(NAME, str(made.version))  # another process was first
        known = first
    keep(known, scored, SCORED)
    if carried:
        keep(known, carried)
    tags["run_id"] = run_id or known.tags.get("run_id", "none")
    changed = {key: value for key, value in tags.items() if known.tags.get(key) != value}
    store.tag(NAME, str(known.version), changed | {_TOLD: told})  # the last: a process that dies before does all again
    return str(known.version)


def _first_with(digest: str) -> ModelVersion | None:
    return next((item for item in store.all_of(NAME) if item.tags.get("weights_digest") == digest), None)


def _create(model_dir: Path, scored: Path, carried: Path | None, tags: dict[str, str],
            run_id: str | None) -> ModelVersion:
    """Copies the folder into a logged model and makes it a version, with all its tags in one step."""
    opened, experiment = tracking.client(), tracking.experiment_id()
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    try:
        known_run = opened.get_run(run_id).info.run_id if run_id else None
    except MlflowException:  # the phase ran elsewhere and came out of DVC's cache: its id stays as a tag
        known_run = None
    logged = opened.create_logged_model(experiment, name=NAME, source_run_id=known_run)
    with tempfile.TemporaryDirectory() as scratch:
        folder, (data, reference) = Path(scratch) / "model", _to_copy(model_dir, tags["weights_digest"], Path(scratch))
        save_model(folder, loader_module="onediff.serve.pyfunc", data_path=str(data), signature=_signature(),
                   input_example=[{"before": "before.png", "after": "after.png"}], pip_requirements=[_requirement()],
                   mlflow_model=Model(artifact_path=logged.artifact_location, model_uuid=logged.model_id,
                                      run_id=known_run, model_id=logged.model_id))
        shutil.copytree(scored, folder / SCORED)
        if carried:
            shutil.copytree(carried, folder, dirs_exist_ok=True)
        if reference:
            (folder / REFERENCE).write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
        opened.log_model_artifacts(logged.model_id, str(folder))
    opened.finalize_logged_model(logged.model_id, "READY")
    source = f"models:/{logged.model_id}"
    return opened.create_model_version(NAME, source, known_run, tags=tags, model_id=logged.model_id)


def _to_copy(model_dir: Path, digest: str, scratch: Path) -> tuple[Path, dict[str, str | None]]:
    """The folder to copy, and where its weights are if they are not in it. Raises ValueError for a folder that is too
    large to copy and that DVC does not keep.
    """
    limit = load_runtime().register_by_reference_gb
    if size_mib(model_dir) * 2**20 <= limit * 1e9:
        return model_dir, {}
    from onediff.versioned import md5_of

    md5 = locked_md5(model_dir)
    if md5 is None or md5_of(model_dir) != md5:
        raise ValueError(f"{model_dir} is above register_by_reference_gb {limit:g} of runtime.yaml: DVC must keep it, "
                         "but it is not what dvc.lock says: 'dvc repro', or raise the limit")
    slim = scratch / model_dir.name
    shutil.copytree(model_dir, slim, ignore=shutil.ignore_patterns("*.safetensors"))
    return slim, {"path": model_dir.as_posix(), "md5": md5, "weights_digest": digest, "remote": _default_remote()}


def _default_remote() -> str | None:
    """The name of DVC's default remote, or None."""
    config = RawConfigParser(strict=False)
    config.read([Path(".dvc/config"), Path(".dvc/config.local")])
    return config.get("core", "remote", fallback=None)


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


def _digest(scores: Mapping[str, dict[str, Any]], scored: Path) -> str:
    found = hashlib.sha256(json.dumps(scores, sort_keys=True).encode())
    for path in sorted(scored.glob("*.json")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


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
