"""Versions of the registered model: each model folder is registered once; new scores replace older ones."""

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
from onediff.registry.artifacts import MODEL_DIGEST, REFERENCE, SCORED, SCORES_DIGEST, add_files
from onediff.registry.evidence import Evidence
from onediff.registry.facts import FACTS, OF_DATA, YES, facts_after_scoring, facts_at_registration, locked_md5, size_mib
from onediff.registry.promotion import REFUSED, champion_moves, gate_scores, propose
from onediff.registry.store import CHAMPION, NAME, ModelVersion, may_write, shared, writing


@tracking.plain_errors()
def register(evidence: Evidence, *, run_id: str | None = None, carried: Path | None = None,
             measured: Mapping[str, float] | None = None, by: str | None = None) -> str:
    """Makes a model folder a version and the candidate; returns the version's number. On a shared registry it becomes
    the candidate only inside `sole_writer`.

    `evidence`: `pipeline_evidence(model_dir)`. `carried`: a folder whose content is stored beside the scores.
    `measured`: figures such as caption_ms. A folder with the same bytes is the same version: it gets new scores and
    facts, and nothing of the model is copied. Does not load the model. Raises FileNotFoundError for what is missing,
    ValueError for scores that no scoring can give.
    """
    with nullcontext() if shared() else writing():  # or two processes make the same model two versions
        version = _register(evidence, run_id, carried, measured or {})
    if may_write():
        propose(version, by=by)
    return version


@tracking.plain_errors()
def version_with(model_digest: str) -> ModelVersion | None:
    """The first version that has the model folder of this digest, or None."""
    return next((item for item in store.versions_of(NAME) if item.tags.get(MODEL_DIGEST) == model_digest), None)


@tracking.plain_errors()
def rescore(version: str, evidence: Evidence, *, root: Path = Path()) -> None:
    """Writes new scores on a version, after `flows/evaluate.py` scored it again, and all facts as they are in `root`
    now.

    Raises ValueError unless the scores are those of the version's model folder.
    """
    item = store.get(version)
    registered, got = item.tags.get(MODEL_DIGEST), evidence.model.folder
    if not registered:
        registered, got = item.tags["weights_digest"], evidence.model.weights
    if got != registered:
        raise ValueError(f"version {version}: its new scores must be those of its model, digest {registered[:12]}, got "
                         f"those of {got[:12]}: score it again: python -m flows.evaluate models:/{NAME}/{version}")
    scores = _score_tags(evidence)
    add_files(item, evidence.scored, SCORED)
    store.set_tags(NAME, version, {
        MODEL_DIGEST: evidence.model.folder, **scores,
        **{f"scored_{key}": value for key, value in tracking.provenance(root).items()},
        **facts_after_scoring(item.tags, root=root), SCORES_DIGEST: evidence.as_tag()})


@tracking.plain_errors()
def list_versions() -> list[dict[str, Any]]:
    """One dict per version, newest first: version, aliases, created, weights_digest, git_commit, run_id, scores (the
    main ones of split gate, by path), refused (when and why, or nothing) and changes (of the champion that it took part
    in, in words).

    Raises ValueError if nothing is registered.
    """
    aliases, moves = store.aliases(), champion_moves()
    rows = []
    for item in reversed(store.versions_of(NAME)):
        number = str(item.version)
        rows.append({"version": number,
                     "aliases": sorted(alias for alias, version in aliases.items() if version == number),
                     "created": store.iso_time(item.creation_timestamp),
                     **{key: item.tags.get(key, "none") for key in ("weights_digest", "git_commit", "run_id")},
                     "scores": _main_scores(gate_scores(item)),
                     "refused": ": ".join(item.tags[key] for key in REFUSED if key in item.tags),
                     "changes": [str(record) for record in moves
                                 if number in (record.old.get(CHAMPION), record.new.get(CHAMPION))]})
    return rows


def _register(evidence: Evidence, run_id: str | None, carried: Path | None, measured: Mapping[str, float]) -> str:
    scores, scores_digest = _score_tags(evidence), evidence.as_tag()
    store.make_model(NAME, "Two images in, what changed in words out.")
    known = version_with(evidence.model.folder)
    facts = facts_at_registration(evidence.model_dir, root=evidence.root)
    if known and known.tags.get(SCORES_DIGEST) == scores_digest and all(
            known.tags.get(name) == YES for name in FACTS) and all(
            facts[name] == YES for name in OF_DATA) and not set(measured) - set(known.tags):
        return str(known.version)  # nothing new is known; that it came of a clean commit stays written
    made_from = tracking.provenance(evidence.root)
    tags = {MODEL_DIGEST: evidence.model.folder, "weights_digest": evidence.model.weights, "run_id": run_id or "none",
            **made_from, **{f"scored_{key}": value for key, value in made_from.items()}, **scores, **facts,
            "size_mib": f"{size_mib(evidence.model_dir):.6g}",
            **{key: f"{value:.6g}" for key, value in measured.items()}}
    if known is None:
        created = _create(evidence, carried, tags | {SCORES_DIGEST: scores_digest}, run_id)
        known = version_with(evidence.model.folder)
        if known is None or known.version == created.version:
            return str(created.version)
        tracking.client().delete_model_version(NAME, str(created.version))  # another process was first
    add_files(known, evidence.scored, SCORED)
    if carried:
        add_files(known, carried)
    tags["run_id"] = run_id or known.tags.get("run_id", "none")
    changed = {key: value for key, value in tags.items() if known.tags.get(key) != value}
    # The digest is the last tag: if a process dies before it is set, the next registration repeats everything.
    store.set_tags(NAME, str(known.version), changed | {SCORES_DIGEST: scores_digest})
    return str(known.version)


def _create(evidence: Evidence, carried: Path | None, tags: dict[str, str], run_id: str | None) -> ModelVersion:
    """Copies the folder into a logged model and makes it a version, with all its tags in one request.

    Raises ValueError if the folder changed since it was compared with its scores.
    """
    mlflow, experiment = tracking.client(), tracking.experiment_id()
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema

    # A phase that ran elsewhere and came out of DVC's cache has no run here: its id stays as a tag.
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
        if carried:
            shutil.copytree(carried, folder, dirs_exist_ok=True)
        if reference:
            write_json(folder / REFERENCE, reference, indent=1)
        elif model_digests(folder / "data" / data.name) != evidence.model:
            raise ValueError(f"{evidence.model_dir} was changed while it was registered; start again")
        write_text(folder / DIGEST_FILE, evidence.model.folder + "\n")
        mlflow.log_model_artifacts(logged.model_id, str(folder))
    mlflow.finalize_logged_model(logged.model_id, "READY")
    return mlflow.create_model_version(NAME, f"models:/{logged.model_id}", source_run, tags=tags,
                                       model_id=logged.model_id)


def _files_to_copy(evidence: Evidence, scratch: Path) -> tuple[Path, dict[str, str | None]]:
    """The folder to copy, and where its weights are if they are not in it. Raises ValueError for a folder that is too
    large to copy and that DVC does not keep.
    """
    model_dir, limit = evidence.model_dir, load_runtime().register_by_reference_gb
    if size_mib(model_dir) * 2**20 <= limit * 1e9:
        return model_dir, {}
    if locked_md5(model_dir, root=evidence.root) != evidence.model_md5:
        raise ValueError(f"{model_dir} is above register_by_reference_gb {limit:g} of runtime.yaml: DVC must keep it, "
                         "but it is not what dvc.lock says: 'dvc repro', or raise the limit")
    config = RawConfigParser(strict=False)
    config.read([Path(".dvc/config"), Path(".dvc/config.local")])
    without_weights = scratch / model_dir.name
    shutil.copytree(model_dir, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    return without_weights, {"path": model_dir.as_posix(), "md5": evidence.model_md5,
                             "model_digest": evidence.model.folder, "weights_digest": evidence.model.weights,
                             "remote": config.get("core", "remote", fallback=None)}


def _requirement() -> str:
    """The requirement of a version, so that MLflow infers none. A version loads only where OneDiff is installed."""
    try:
        return f"onediff-idc[full]=={metadata.version('onediff-idc')}"
    except metadata.PackageNotFoundError:  # run from a checkout
        return "onediff-idc[full]"


def _score_tags(evidence: Evidence) -> dict[str, str]:
    """All scores as one JSON tag per split, flat and without lists, and the main scores as a tag each for readers:
    {"scores_gate": '{"scenes.CIDEr": 3.1, ...}', "gate.scenes.CIDEr": "3.1", ...}.
    """
    tags = {}
    for split, table in evidence.tables().items():
        scores = {key: value for key, value in tracking.flatten(table).items() if not isinstance(value, list)}
        tags[f"scores_{split}"] = json.dumps(scores, sort_keys=True)
        tags |= {f"{split}.{path}": f"{value:.4g}" for path, value in _main_scores(scores).items()}
    return tags


def _main_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    return {path: float(value) for path, value in scores.items()
            if path.count(".") == 1 and path.split(".")[1] in HEADLINES and isinstance(value, (int, float))}
