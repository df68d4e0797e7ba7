"""Versions of the registered model: each model folder is registered once; new scores replace older ones."""

from __future__ import annotations

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
from onediff.eval.metrics.catalog import HEADLINES
from onediff.model.digest import DIGEST_FILE, model_digests
from onediff.registry import store
from onediff.registry.artifacts import MODEL_DIGEST, REFERENCE, SCORED, SCORES_DIGEST, keep
from onediff.registry.evidence import Evidence
from onediff.registry.facts import FACTS, OF_DATA, YES, facts, facts_again, locked_md5, size_mib
from onediff.registry.promotion import REFUSED, champion_moves, gate_scores, propose
from onediff.registry.store import CHAMPION, NAME
from onediff.registry.writer_lock import may_write, shared, writing

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@store.plain_errors()
def register(model_dir: Path, evidence: Evidence, *, run_id: str | None = None, carried: Path | None = None,
             measured: Mapping[str, float] | None = None, by: str | None = None) -> str:
    """Makes the model folder a version and the candidate; returns the version's number. On a shared registry it becomes
    the candidate only inside `sole_writer`.

    `evidence`: `pipeline_evidence(model_dir)`. `carried`: a folder whose content is kept beside the scores.
    `measured`: figures such as caption_ms. A folder with the same bytes is the same version: it gets new scores and
    facts, and nothing of the model is copied. Does not load the model. Raises FileNotFoundError for what is missing,
    ValueError for scores that no scoring can give.
    """
    scores = _flat(evidence)
    if shared():
        version = _registered(model_dir, evidence, scores, run_id=run_id, carried=carried, measured=measured)
    else:
        with writing():  # or two processes make the same model two versions
            version = _registered(model_dir, evidence, scores, run_id=run_id, carried=carried, measured=measured)
    if may_write():
        propose(version, by=by)
    return version


@store.plain_errors()
def version_with(model_digest: str) -> str | None:
    """The version that has the model folder of this digest, if it was registered."""
    known = _first_with(model_digest)
    return str(known.version) if known else None


@store.plain_errors()
def rescore(version: str, evidence: Evidence, *, root: Path = Path()) -> None:
    """Writes new scores on a version, after `flows/evaluate.py` scored it again, and all facts as they are in `root`
    now.

    Raises ValueError unless the scores are those of the version's model folder.
    """
    item = store.get(version)
    registered = item.tags.get(MODEL_DIGEST)
    got, wanted = ((evidence.model.folder, registered) if registered
                   else (evidence.model.weights, item.tags["weights_digest"]))
    if got != wanted:
        raise ValueError(f"version {version}: its new scores must be those of its model, digest {wanted[:12]}, got "
                         f"those of {got[:12]}: score it again: python -m flows.evaluate models:/{NAME}/{version}")
    scores = _flat(evidence)
    keep(item, evidence.scored, SCORED)
    scored_by = {f"scored_{key}": value for key, value in tracking.provenance(root).items()}
    store.tag(NAME, version, {MODEL_DIGEST: evidence.model.folder, **_score_tags(scores), **scored_by,
                              **facts_again(item.tags, root=root), SCORES_DIGEST: evidence.as_tag()})


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


def _registered(model_dir: Path, evidence: Evidence, scores: Mapping[str, dict[str, Any]], *, run_id: str | None,
                carried: Path | None, measured: Mapping[str, float] | None) -> str:
    store.make_model(NAME, "Two images in, what changed in words out.")
    known = _first_with(evidence.model.folder)
    found = facts(model_dir, root=evidence.root)
    if known and known.tags.get(SCORES_DIGEST) == evidence.as_tag() and all(
            known.tags.get(name) == YES for name in FACTS) and all(
            found[name] == YES for name in OF_DATA) and not set(measured or {}) - set(known.tags):
        return str(known.version)  # nothing new is known; that it came of a clean commit stays written
    made_from = tracking.provenance(evidence.root)
    tags = {MODEL_DIGEST: evidence.model.folder, "weights_digest": evidence.model.weights, "run_id": run_id or "none",
            **made_from, **{f"scored_{key}": value for key, value in made_from.items()}, **_score_tags(scores),
            **found, "size_mib": f"{size_mib(model_dir):.6g}",
            **{key: f"{value:.6g}" for key, value in (measured or {}).items()}}
    if known is None:
        made = _create(model_dir, evidence, carried, tags | {SCORES_DIGEST: evidence.as_tag()}, run_id)
        first = _first_with(evidence.model.folder)
        if first is None or first.version == made.version:
            return str(made.version)
        tracking.client().delete_model_version(NAME, str(made.version))  # another process was first
        known = first
    keep(known, evidence.scored, SCORED)
    if carried:
        keep(known, carried)
    tags["run_id"] = run_id or known.tags.get("run_id", "none")
    changed = {key: value for key, value in tags.items() if known.tags.get(key) != value}
    # The last tag of all: a process that dies before it does everything again.
    store.tag(NAME, str(known.version), changed | {SCORES_DIGEST: evidence.as_tag()})
    return str(known.version)


def _first_with(model_digest: str) -> ModelVersion | None:
    return next((item for item in store.all_of(NAME) if item.tags.get(MODEL_DIGEST) == model_digest), None)


def _create(model_dir: Path, evidence: Evidence, carried: Path | None, tags: dict[str, str],
            run_id: str | None) -> ModelVersion:
    """Copies the folder into a logged model and makes it a version, with all its tags in one step.

    Raises ValueError if the folder changed since it was compared with its scores.
    """
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
        folder, (data, reference) = Path(scratch) / "model", _to_copy(model_dir, evidence, Path(scratch))
        save_model(folder, loader_module="onediff.serve.pyfunc", data_path=str(data), signature=_signature(),
                   input_example=[{"before": "before.png", "after": "after.png"}], pip_requirements=[_requirement()],
                   mlflow_model=Model(artifact_path=logged.artifact_location, model_uuid=logged.model_id,
                                      run_id=known_run, model_id=logged.model_id))
        shutil.copytree(evidence.scored, folder / SCORED)
        if carried:
            shutil.copytree(carried, folder, dirs_exist_ok=True)
        if reference:
            (folder / REFERENCE).write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
        elif model_digests(folder / "data" / data.name) != evidence.model:
            raise ValueError(f"{model_dir} was changed while it was registered; start again")
        (folder / DIGEST_FILE).write_text(evidence.model.folder + "\n", encoding="utf-8")
        opened.log_model_artifacts(logged.model_id, str(folder))
    opened.finalize_logged_model(logged.model_id, "READY")
    source = f"models:/{logged.model_id}"
    return opened.create_model_version(NAME, source, known_run, tags=tags, model_id=logged.model_id)


def _to_copy(model_dir: Path, evidence: Evidence, scratch: Path) -> tuple[Path, dict[str, str | None]]:
    """The folder to copy, and where its weights are if they are not in it. Raises ValueError for a folder that is too
    large to copy and that DVC does not keep.
    """
    limit = load_runtime().register_by_reference_gb
    if size_mib(model_dir) * 2**20 <= limit * 1e9:
        return model_dir, {}
    md5 = evidence.model_md5
    if locked_md5(model_dir, root=evidence.root) != md5:
        raise ValueError(f"{model_dir} is above register_by_reference_gb {limit:g} of runtime.yaml: DVC must keep it, "
                         "but it is not what dvc.lock says: 'dvc repro', or raise the limit")
    slim = scratch / model_dir.name
    shutil.copytree(model_dir, slim, ignore=shutil.ignore_patterns("*.safetensors"))
    return slim, {"path": model_dir.as_posix(), "md5": md5, "model_digest": evidence.model.folder,
                  "weights_digest": evidence.model.weights, "remote": _default_remote()}


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


def _flat(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Tag -> flat scores without lists: {"scores_gate": {"scenes.CIDEr": 3.1, ...}, ...}."""
    return {f"scores_{split}": {key: value for key, value in tracking.flatten(table).items()
                                if not isinstance(value, list)} for split, table in evidence.tables().items()}


def _score_tags(scores: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """All scores as one JSON tag per split, and the main ones as a tag each, for the eye."""
    tags = {key: json.dumps(values, sort_keys=True) for key, values in scores.items()}
    for key, values in scores.items():
        split = key.removeprefix("scores_")
        tags |= {f"{split}.{path}": f"{value:.4g}" for path, value in _main_scores(values).items()}
    return tags


def _main_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    return {path: float(value) for path, value in scores.items()
            if path.count(".") == 1 and path.split(".")[1] in HEADLINES and isinstance(value, (int, float))}
