"""Versions of the registered model `onediff`: register a model folder once, replace its scores, list all versions."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from configparser import RawConfigParser
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from onediff import tracking
from onediff.config import load_runtime
from onediff.eval.metrics.catalog import HEADLINES
from onediff.files import write_json, write_text
from onediff.model.digest import DIGEST_FILE, model_digests
from onediff.registry import store
from onediff.registry.artifacts import MODEL_DIGEST, REFERENCE, SCORED, SCORES, SCORES_DIGEST, add_files
from onediff.registry.description import describe, scored_again
from onediff.registry.evidence import TABLES, Evidence
from onediff.registry.facts import FACTS, OF_DATA, YES, facts_after_scoring, facts_at_registration, locked_md5, size_mib
from onediff.registry.promotion import REFUSED, champion_moves, propose
from onediff.registry.store import CHAMPION, NAME, ModelVersion, may_write, shared, writing

HEADLINES_TAG = "gate_scores"  # MLflow tag with a version's main scores on the `gate` split, as JSON.

@tracking.plain_errors()
def register(evidence: Evidence, *, run_id: str | None = None, carried: Path | None = None,
             measured: Mapping[str, float] | None = None, by: str | None = None) -> str:
    """Register a model folder as a version in MLflow, give it the alias `candidate`, and return the version's number.

    `evidence` is the result of `pipeline_evidence(model_dir)`. All files of the folder `carried` are stored with the
    version, and README.md in this folder becomes its description. `measured` has measured values such as caption_ms,
    which become tags. If a version with the same model files exists, it gets the new scores and facts, and no model
    file is copied. In a registry that several machines share, the alias changes only inside `with sole_writer()`.

    The model is not loaded. Raises FileNotFoundError for missing files, and ValueError for invalid scores.
    """
    # The lock prevents two processes from registering the same model folder as two versions.
    with nullcontext() if shared() else writing():
        version = _register(evidence, run_id, carried, measured or {})
    if may_write():
        propose(version, by=by)
    return version


@tracking.plain_errors()
def version_with(model_digest: str) -> ModelVersion | None:
    """Return the first registered version whose model folder has this SHA-256 digest, or None if there is none."""
    return next((item for item in store.versions_of(NAME) if item.tags.get(MODEL_DIGEST) == model_digest), None)


@tracking.plain_errors()
def rescore(version: str, evidence: Evidence, *, root: Path = Path()) -> None:
    """Replace the scores of a registered version after `flows/evaluate.py` scored its model again.

    `version` is the number of the version. Its facts about data and code are updated from the present project in
    `root`. Raises ValueError unless the scores in `evidence` belong to the model of this version.
    """
    item = store.get(version)
    registered, got = item.tags.get(MODEL_DIGEST), evidence.model.folder
    if not registered:
        registered, got = item.tags["weights_digest"], evidence.model.weights
    if got != registered:
        raise ValueError(f"version {version}: its new scores must be those of its model, digest {registered[:12]}, got "
                         f"scores of the model with digest {got[:12]}: score the version again: "
                         f"python -m flows.evaluate models:/{NAME}/{version}")
    scores, provenance = _score_tags(evidence), tracking.provenance(root)
    _add_scores(item, evidence)
    store.set_tags(NAME, version, {
        MODEL_DIGEST: evidence.model.folder, **scores,
        **{f"scored_{key}": provenance[key] for key in ("git_commit", "git_dirty", "data_digest")},
        **facts_after_scoring(item.tags, root=root), SCORES_DIGEST: evidence.as_tag()})
    _remove_outdated_tags(item)
    tracking.client().update_model_version(NAME, version, scored_again(item.description or "", scores[HEADLINES_TAG]))


@tracking.plain_errors()
def list_versions() -> list[dict[str, Any]]:
    """Return a list with one dict for each registered version, newest first.

    The keys are version, aliases, created, weights_digest, git_commit, run_id, scores (the main scores on the `gate`
    split, such as {"scenes.CIDEr": 3.1}), refused (time and reasons of the last refused promotion, or "") and changes
    (one line for each time when the version became champion or was replaced as champion). Raises ValueError if there
    are no versions.
    """
    aliases, moves = store.aliases(), champion_moves()
    rows = []
    for item in reversed(store.versions_of(NAME)):
        number = str(item.version)
        rows.append({"version": number,
                     "aliases": sorted(alias for alias, version in aliases.items() if version == number),
                     "created": store.iso_time(item.creation_timestamp),
                     **{key: item.tags.get(key, "none") for key in ("weights_digest", "git_commit", "run_id")},
                     # Old versions have all their scores on the `gate` split in the MLflow tag scores_gate.
                     "scores": _main_scores(json.loads(item.tags.get(HEADLINES_TAG) or
                                                       item.tags.get("scores_gate", "{}"))),
                     "refused": ": ".join(item.tags[key] for key in REFUSED if key in item.tags),
                     "changes": [str(record) for record in moves
                                 if number in (record.old.get(CHAMPION), record.new.get(CHAMPION))]})
    return rows


def _register(evidence: Evidence, run_id: str | None, carried: Path | None, measured: Mapping[str, float]) -> str:
    scores, scores_digest = _score_tags(evidence), evidence.as_tag()
    store.make_model(NAME, "OneDiff describes in one English sentence what changed between two images.")
    known = version_with(evidence.model.folder)
    facts = facts_at_registration(evidence.model_dir, root=evidence.root)
    if known and known.tags.get(SCORES_DIGEST) == scores_digest and all(
            known.tags.get(name) == YES for name in FACTS) and all(
            facts[name] == YES for name in OF_DATA) and not set(measured) - set(known.tags):
        # The version with this model already has these scores and facts, so the registration changes nothing.
        return str(known.version)
    # MLflow's page shows the tags in this order.
    tags = {**scores, **{key: f"{value:.6g}" for key, value in measured.items()},
            "size_mib": f"{size_mib(evidence.model_dir):.6g}", **facts, **tracking.provenance(evidence.root),
            "run_id": run_id or "none", MODEL_DIGEST: evidence.model.folder,
            "weights_digest": evidence.model.weights}
    if known is None:
        created = _create(evidence, carried, tags | {SCORES_DIGEST: scores_digest}, run_id)
        known = version_with(evidence.model.folder)
        if known is None or known.version == created.version:
            return str(created.version)
        # Another process registered the same model folder first, so this version is a duplicate.
        tracking.client().delete_model_version(NAME, str(created.version))
    _add_scores(known, evidence)
    if carried:
        add_files(known, carried)
        tracking.client().update_model_version(NAME, str(known.version), describe(carried))
    tags["run_id"] = run_id or known.tags.get("run_id", "none")
    changed = {key: value for key, value in tags.items() if known.tags.get(key) != value}
    # SCORES_DIGEST is set last: if this process dies before that, the next registration repeats all steps.
    store.set_tags(NAME, str(known.version), changed | {SCORES_DIGEST: scores_digest})
    _remove_outdated_tags(known, prefixes=("scored_",))
    return str(known.version)


def _create(evidence: Evidence, carried: Path | None, tags: dict[str, str], run_id: str | None) -> ModelVersion:
    """Copy the model folder into MLflow and register the copy as a new version, with all tags in one request.

    Raises ValueError if the model folder has changed since the digests in `evidence` were computed.
    """
    mlflow, experiment = tracking.client(), tracking.experiment_id()
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema

    # A model trained on another machine may have no MLflow run in this store; then only a tag contains the run id.
    source_run = run_id if run_id and tracking.lookup(mlflow.get_run, run_id) else None
    logged = mlflow.create_logged_model(experiment, name=NAME, source_run_id=source_run)
    inputs = [ColSpec("string", "before"), ColSpec("string", "after"), ColSpec("string", "instruction", required=False)]
    with tempfile.TemporaryDirectory() as scratch:
        folder, (data, reference) = Path(scratch) / "model", _files_to_copy(evidence, Path(scratch))
        save_model(folder, loader_module="onediff.serve.pyfunc", data_path=str(data),
                   signature=ModelSignature(Schema(inputs), Schema([ColSpec("string")])),
                   input_example=[{"before": "before.png", "after": "after.png"}], pip_requirements=[_requirement()],
                   mlflow_model=Model(artifact_path=logged.artifact_location, model_uuid=logged.model_id,
                                      run_id=source_run, model_id=logged.model_id))
        shutil.copytree(evidence.scored, folder / SCORED)
        _copy_tables(evidence, folder / SCORES)
        if carried:
            shutil.copytree(carried, folder, dirs_exist_ok=True)
        if reference:
            write_json(folder / REFERENCE, reference, indent=1)
        elif model_digests(folder / "data" / data.name) != evidence.model:
            raise ValueError(f"{evidence.model_dir} must not change while it is being registered, but it did; start "
                             "the registration again")
        write_text(folder / DIGEST_FILE, evidence.model.folder + "\n")
        mlflow.log_model_artifacts(logged.model_id, str(folder))
    mlflow.finalize_logged_model(logged.model_id, "READY")
    return mlflow.create_model_version(NAME, f"models:/{logged.model_id}", source_run, tags=tags,
                                       description=describe(carried) if carried else None, model_id=logged.model_id)


def _add_scores(version: ModelVersion, evidence: Evidence) -> None:
    """Upload the scores of each image pair and the score tables to a registered version, replacing its old scores."""
    add_files(version, evidence.scored, SCORED)
    with tempfile.TemporaryDirectory() as scratch:
        add_files(version, _copy_tables(evidence, Path(scratch) / SCORES), SCORES)


def _copy_tables(evidence: Evidence, folder: Path) -> Path:
    folder.mkdir()
    for path in TABLES.values():
        shutil.copy(evidence.root / path, folder)
    return folder


def _remove_outdated_tags(version: ModelVersion, prefixes: tuple[str, ...] = ()) -> None:
    """Remove the MLflow tags of a version that contain outdated scores, and all tags that start with these prefixes.

    Older versions of OneDiff stored scores in tags. Scores are now in files, so the values in these tags are outdated.
    """
    for key in version.tags:
        if key in ("scores_test", "scores_gate", "scored_dvc_lock") or key.startswith(("test.", "gate.", *prefixes)):
            tracking.client().delete_model_version_tag(NAME, str(version.version), key)


def _files_to_copy(evidence: Evidence, scratch: Path) -> tuple[Path, dict[str, str | None]]:
    """Return the model folder to copy into MLflow, and the content of reference.json or {}.

    A model larger than the setting `register_by_reference_gb` is copied without its weights, and reference.json says
    where DVC stores them. Raises ValueError if dvc.lock does not have the md5 of such a model.
    """
    model_dir, limit = evidence.model_dir, load_runtime().register_by_reference_gb
    if size_mib(model_dir) * 2**20 <= limit * 1e9:
        return model_dir, {}
    if locked_md5(model_dir, root=evidence.root) != evidence.model_md5:
        raise ValueError(f"{model_dir} is larger than register_by_reference_gb {limit:g} of runtime.yaml, so dvc.lock "
                         "must contain its digest, but dvc.lock has another digest or none: run 'dvc repro', or raise "
                         "the limit")
    config = RawConfigParser(strict=False)
    config.read([Path(".dvc/config"), Path(".dvc/config.local")])
    without_weights = scratch / model_dir.name
    shutil.copytree(model_dir, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    return without_weights, {"path": model_dir.as_posix(), "md5": evidence.model_md5,
                             "model_digest": evidence.model.folder, "weights_digest": evidence.model.weights,
                             "remote": config.get("core", "remote", fallback=None)}


def _requirement() -> str:
    """Return the pip requirement that MLflow stores with a registered version: OneDiff in the installed release.

    A registered version contains no code of OneDiff, so OneDiff must be installed where the model is loaded.
    """
    try:
        return f"onediff-idc[full]=={metadata.version('onediff-idc')}"
    except metadata.PackageNotFoundError:  # OneDiff runs from a checkout without being installed.
        return "onediff-idc[full]"


def _score_tags(evidence: Evidence) -> dict[str, str]:
    """Return the MLflow tag with the main scores on the `gate` split, after checking all score files for errors."""
    scores = tracking.flatten(evidence.tables()["gate"])
    return {HEADLINES_TAG: json.dumps(_main_scores(scores), sort_keys=True)}


def _main_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    return {path: float(value) for path, value in scores.items()
            if path.count(".") == 1 and path.split(".")[1] in HEADLINES and isinstance(value, (int, float))}
