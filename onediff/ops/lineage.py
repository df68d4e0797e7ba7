"""Lineage of a version: which files, code and runs it was made from, and which versions were made from a file.

    write_lineage(folder)                       # before registering
    lineage_of("3"), as_text(lineage_of("3"))   # `onediff lineage 3`
    versions_of("data/diffcap/train-00001.parquet")

onediff/ops/verify.py checks that the lineage is true.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from onediff import paths, registry, tracking
from onediff.files import read_json, write_json
from onediff.git import changed_files, current_branch
from onediff.paths import CARD, DVC_LOCK, PARAMS
from onediff.repro.lock import Stage, cache_of, files_of, md5_of, md5_of_files, read_dvc_lock

FOLDER = "lineage"  # name of the folder with the lineage, among the files of a registered model version
WEIGHTS, DIFFCAP = paths.TRAINED.as_posix(), paths.DIFFCAP.as_posix()  # paths of the weights and data in dvc.lock
TRAINING, SCORING = ("align", "tune"), ("score",)
_DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?|[0-9a-f]{64}")
_ONE_PER_SOURCE = ("raw", "pairs", "synthetic", "written")  # folders of data/ that have one sub-folder for each source


def write_lineage(folder: Path, *, root: Path = Path(), evaluation_run: str | None = None) -> None:
    """Write the lineage of the pipeline's current results to FOLDER/lineage.

    The written files are lineage.json and copies of dvc.lock, params.yaml and the data card. Raises FileNotFoundError
    if 'dvc repro' has not produced one of the copied files yet.
    """
    stages = read_dvc_lock(root / DVC_LOCK)
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for path in (DVC_LOCK, PARAMS, CARD):
        if not (root / path).exists():
            raise FileNotFoundError(f"{root / path} does not exist, and a registered version must contain a copy of "
                                    "it: run 'dvc repro'")
        shutil.copyfile(root / path, target / path.name)
    provenance = tracking.provenance(root)
    # DVC restores the files in data/runs together with the model, so they name the MLflow run that trained the model.
    stage_runs = {path.stem: read_json(path)["run_id"]
                  for path in sorted((root / paths.RUNS).glob("*.json"))}
    folders = {path: md5 for stage in stages.values() for path, md5 in (stage.deps | stage.outs).items()
               if path.startswith("data/") and md5.endswith(".dir")}
    write_json(target / "lineage.json", {
        "git": {"commit": provenance["git_commit"], "branch": current_branch(root), "dirty": changed_files(root)},
        "dvc_lock": provenance["dvc_lock"], "data_card": provenance["data_digest"],
        "runs": {"flow": os.environ.get("PREFECT__FLOW_RUN_ID"), "parent": os.environ.get(tracking.PARENT),
                 **stage_runs, "evaluation": evaluation_run},
        "stages": {name: asdict(stage) for name, stage in stages.items()},
        "files": {path: _files_in(path, md5, root) for path, md5 in sorted(folders.items())},
        "shards": read_json(root / CARD)["digests"],
    }, indent=1)


def _files_in(folder: str, md5: str, root: Path) -> dict[str, str] | None:
    """Return the md5 of each file in a folder, by relative path.

    Return None if neither DVC's cache nor the workspace contains the folder with this digest.
    """
    try:
        return files_of(md5, cache_of(root))
    except FileNotFoundError:
        # DVC's cache lacks the list of files if another machine trained, or if DVC tracks the files one by one.
        in_workspace = (root / folder).is_dir() and md5_of(root / folder) == md5
        return md5_of_files(root / folder) if in_workspace else None


def uri_of(version: str) -> str:
    """Return the MLflow address of a version, given its number, an alias or the address."""
    if version.startswith("models:/"):
        return version
    return f"models:/{registry.NAME}{'/' if version.isdigit() else '@'}{version}"


def lineage_of(version: str) -> dict[str, Any]:
    """Return the content of a registered version's lineage.json, plus the version number and the digest of the weights.

    Raises ValueError if the version does not exist, or if its lineage.json is missing or damaged.
    """
    uri = uri_of(version)
    tags = registry.version_tags(uri)
    try:
        lineage = json.loads(registry.version_text(uri, f"{FOLDER}/lineage.json"))
    except FileNotFoundError as error:
        raise ValueError(f"version {tags['version']} has no lineage: an old release of OneDiff registered it, or the "
                         f"files were deleted ({error}); register the model again") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"version {tags['version']}: {FOLDER}/lineage.json is damaged ({error}): restore the file "
                         "from a backup, or register the model again") from None
    return {"version": tags["version"], "weights_digest": tags["weights_digest"], **lineage}


def as_text(lineage: Mapping[str, Any]) -> str:
    """Return the lineage as text for people, from the weights back to the sources."""
    git, stages = lineage["git"], stages_of(lineage)
    dirty = f"; CHANGED since the commit: {', '.join(git['dirty'])}" if git["dirty"] else ", nothing changed since"
    lines = [f"version {lineage['version']} of {registry.NAME}",
             f"  weights     sha256 {lineage['weights_digest']}",
             f"  code        commit {git['commit']}" + (f" on {git['branch']}" if git["branch"] else "") + dirty,
             f"  dvc.lock    sha256 {lineage['dvc_lock']}",
             f"  data card   sha256 {lineage['data_card']}",
             "  runs        " + ", ".join(f"{name} {run}" for name, run in lineage["runs"].items() if run),
             f"  copies of parameters, dvc.lock and data card are in {FOLDER}/ of the version's files in MLflow", "",
             "how the version was made:"]
    order = list(stages)
    # Stages are sorted by their number of upstream stages, so each stage follows the stages that it depends on.
    for name in sorted(upstream(stages, TRAINING + SCORING),
                       key=lambda name: (len(upstream(stages, [name])), order.index(name))):
        stage = stages[name]
        data = [f"{path} {md5[:8]}" for path, md5 in stage.deps.items() if path.startswith("data/")]
        code = len(stage.deps) - len(data)
        lines.append(f"  {name}: from {', '.join([*data, f'{code} files of code', f'{len(stage.params)} parameters'])}")
        lines += [f"    -> {path} {md5}" for path, md5 in stage.outs.items()]
    return "\n".join([*lines, "", f"to verify this lineage, run: onediff lineage {lineage['version']} --verify"])


def stages_of(lineage: Mapping[str, Any]) -> dict[str, Stage]:
    """Return the stages of dvc.lock that a lineage.json contains, by name."""
    return {name: Stage(**stage) for name, stage in lineage["stages"].items()}


def upstream(stages: Mapping[str, Stage], names: Iterable[str]) -> set[str]:
    """Return the given stages and every stage on which they depend, directly or indirectly."""
    needed: set[str] = set()
    waiting = [name for name in names if name in stages]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += [other for other, stage in stages.items() if any(
                _contains(dep, out) or _contains(out, dep) for dep in stages[name].deps for out in stage.outs)]
    return needed


def _contains(folder: str, path: str) -> bool:
    return PurePosixPath(path).is_relative_to(folder)


@dataclass(frozen=True)
class Use:
    """A file or folder in the lineage of a model version, and how the version used it (`role`).

    `here` is true if the workspace has equal bytes at this path, false if it has other bytes, and None if the path
    does not exist in the workspace. All fields are keys of the JSON output of `onediff lineage --of`.
    """

    version: str
    aliases: list[str]
    path: str
    digest: str
    role: str
    here: bool | None


def versions_of(item: str) -> tuple[list[Use], list[str]]:
    """Return every registered version whose lineage contains `item`, and the numbers of the versions without a lineage.

    `item` is a path in dvc.yaml, a file below such a path, an md5 or a SHA-256. The newest version comes first.
    Raises ValueError if nothing is registered, or if `item` is in no lineage, does not exist, is not in dvc.lock and is
    no digest, because then it is probably misspelt.
    """
    uses, without_lineage = [], []
    for row in registry.list_versions():
        try:
            lineage = lineage_of(row["version"])
        except ValueError:
            without_lineage.append(row["version"])
            continue
        for path, digest in _digests_of(item, lineage).items():
            here = md5_of(Path(path)) == digest if Path(path).exists() else None
            uses.append(Use(row["version"], row["aliases"], path, digest, _role(path, lineage), here))
    if not uses and not _DIGEST.fullmatch(item) and not Path(item).exists() and _name_of(item) not in _locked_paths():
        raise ValueError(f"{item} must be a path in this project, a path in {DVC_LOCK}, an md5 or a SHA-256, but it is "
                         "none of these: correct the path, or give all 32 or 64 digits of the digest")
    return uses, without_lineage


def _locked_paths() -> set[str]:
    """Return the paths of all dependencies and outputs in dvc.lock, or an empty set if there is no dvc.lock."""
    stages = read_dvc_lock().values() if DVC_LOCK.exists() else ()
    return {path for stage in stages for path in stage.deps | stage.outs}


def _name_of(item: str) -> str:
    """Return the path of a file or folder as dvc.lock writes it, relative to the project's folder."""
    path = Path(os.path.normpath(Path.cwd() / item))
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else item


def _digests_of(item: str, lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of all paths in the lineage that match `item`, which is a path or a digest.

    If `item` is a file in a folder whose files the lineage does not list, the digest of this folder is returned.
    """
    digests: dict[str, str] = {}
    for stage in lineage["stages"].values():
        digests |= stage["deps"] | stage["outs"]
    for folder, files in lineage["files"].items():
        digests |= {f"{folder}/{name}": md5 for name, md5 in (files or {}).items()}
    digests |= {f"{WEIGHTS}/*.safetensors": lineage["weights_digest"], f"{DVC_LOCK} (SHA-256)": lineage["dvc_lock"],
                f"{CARD} (SHA-256)": lineage["data_card"]}
    if _DIGEST.fullmatch(item):
        # The data card identifies a shard by the first half of its SHA-256.
        shards = {f"{DIFFCAP}/{shard}" for shard, half in lineage["shards"].items() if item[:32] == half}
        return {path: digest for path, digest in digests.items()
                if item.removesuffix(".dir") == digest.removesuffix(".dir") or path in shards}
    name = _name_of(item)
    if name in digests:
        return {name: digests[name]}
    return {path: digest for path, digest in digests.items()
            if digest.endswith(".dir") and _contains(path, name) and not lineage["files"].get(path)}


def _role(path: str, lineage: Mapping[str, Any]) -> str:
    """Return how a model version used the file or folder at this path, as a phrase such as 'was trained on it'."""
    stages = stages_of(lineage)
    parts = path.split("/")
    mixtures = {source for phase in TRAINING if phase in stages
                for source in (stages[phase].params.get(phase) or {}).get("mixture", {})}
    if _contains(WEIGHTS, path):
        return "consists of it"
    if path.startswith(f"{DIFFCAP}/") and not parts[2].startswith("train-"):
        return {"val": "chose the best step on it"}.get(parts[2].split("-")[0], "was scored on it, but not trained")
    if len(parts) > 2 and parts[1] in _ONE_PER_SOURCE and parts[2] not in mixtures:
        return "was scored on it, but not trained"
    needed = [stages[name] for name in upstream(stages, TRAINING)]
    if any(path in stage.outs or any(_contains(dep, path) for dep in stage.deps) for stage in needed):
        return "was trained on it" if path.startswith("data/") else "was trained with it"
    return "has it in its lineage"
