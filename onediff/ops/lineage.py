"""Where a version comes from, and what came of a file: what a version carries about itself, and how it is asked.

    pack(folder)                              # before registering: lineage/ and README.md, the model card
    told("3"), text(told("3"))                # `onediff lineage 3`
    versions_of("data/diffcap/train-00001.parquet")

onediff/ops/verify.py proves what is told here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from onediff import registry, tracking
from onediff.git import changed_files, current_branch
from onediff.repro import lock as versioned
from onediff.repro.lock import LOCK, Stage
from onediff.serve.card import write_card

FOLDER = "lineage"
WEIGHTS = "data/models/tune"
DIFFCAP = "data/diffcap"
TRAINING, SCORING = ("align", "tune"), ("score",)
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
_SOURCES = ("raw", "pairs", "synthetic", "written")  # data/<one of these>/<source>
_CARRIED = (LOCK, Path("params.yaml"), Path(DIFFCAP) / "card.json")


def pack(folder: Path, *, root: Path = Path(), evaluation_run: str | None = None, flow_run: str | None = None) -> Path:
    """Lineage and model card of the pipeline's present results, in a folder that a version carries; gives it."""
    gather(folder, root=root, evaluation_run=evaluation_run, flow_run=flow_run)
    write_card(folder, root=root)
    return folder


def gather(folder: Path, *, root: Path = Path(), evaluation_run: str | None = None,
           flow_run: str | None = None) -> None:
    """Writes folder/lineage: what the pipeline's present results were made of, and dvc.lock, params.yaml and data card
    as they are. `flow_run`: Prefect's; default: that which a worker set for this process.

    Raises FileNotFoundError for what 'dvc repro' has not made yet.
    """
    stages = versioned.locked(root / LOCK)
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    for path in _CARRIED:
        if not (root / path).exists():
            raise FileNotFoundError(f"{root / path} not found: a version carries it; 'dvc repro' makes it")
        shutil.copyfile(root / path, place / path.name)
    made = tracking.provenance(root)
    told = {
        "git": {"commit": made["git_commit"], "branch": current_branch(root), "dirty": changed_files(root)},
        "dvc_lock": made["dvc_lock"], "data_card": made["data_digest"],
        "runs": {"flow": flow_run or os.environ.get(FLOW_RUN), **_runs(root), "evaluation": evaluation_run},
        "stages": {name: asdict(stage) for name, stage in stages.items()},
        "files": _files(stages, root),
        "shards": json.loads((root / DIFFCAP / "card.json").read_text(encoding="utf-8"))["digests"],
    }
    (place / "lineage.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _runs(root: Path) -> dict[str, Any]:
    """Run ids of MLflow. data/runs comes out of DVC's cache with a stage, and so names the run that made it."""
    notes = sorted((root / "data/runs").glob("*.json"))
    return {"parent": os.environ.get(tracking.PARENT),
            **{path.stem: json.loads(path.read_text(encoding="utf-8"))["run_id"] for path in notes}}


def _files(stages: Mapping[str, Stage], root: Path) -> dict[str, dict[str, str] | None]:
    """Folder below data -> its files, for what goes in and comes out; None where no cache here lists them."""
    known = {path: md5 for stage in stages.values() for path, md5 in (stage.deps | stage.outs).items()
             if path.startswith("data/") and md5.endswith(".dir")}
    return {path: _listing(path, md5, root) for path, md5 in sorted(known.items())}


def _listing(path: str, md5: str, root: Path) -> dict[str, str] | None:
    try:
        return versioned.files_of(md5, project=root)
    except FileNotFoundError:  # trained elsewhere, or a folder of outs that are listed one by one
        there = (root / path).is_dir() and versioned.md5_of(root / path) == md5
        return versioned.tree(root / path) if there else None


# --- asked of a version ----------------------------------------------------------------------------------------------


def uri_of(version: str) -> str:
    """The MLflow address of a version that is named by number, alias or address."""
    if version.startswith("models:/"):
        return version
    return f"models:/{registry.NAME}{'/' if version.isdigit() else '@'}{version}"


def told(version: str) -> dict[str, Any]:
    """What a version carries about itself, with what the registry notes of it.

    Raises ValueError if there is no such version or it was registered without.
    """
    uri = uri_of(version)
    tags = registry.version_tags(uri)
    try:
        found = json.loads(registry.version_text(uri, f"{FOLDER}/lineage.json"))
    except FileNotFoundError as error:
        raise ValueError(f"version {tags['version']} carries no lineage: it was registered before lineage was kept, or "
                         f"its files are gone ({error}); register it again") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"version {tags['version']}: its {FOLDER}/lineage.json is damaged ({error}): bring it back "
                         "from a backup, or register it again") from None
    return {"version": tags["version"], "weights_digest": tags["weights_digest"], **found}


def text(found: Mapping[str, Any]) -> str:
    """For people: from the weights back to the sources."""
    git, runs, stages = found["git"], found["runs"], _stages(found)
    dirty = f"; CHANGED since the commit: {', '.join(git['dirty'])}" if git["dirty"] else ", nothing changed since"
    lines = [f"version {found['version']} of {registry.NAME}",
             f"  weights     sha256 {found['weights_digest']}",
             f"  code        commit {git['commit']}" + (f" on {git['branch']}" if git["branch"] else "") + dirty,
             f"  dvc.lock    sha256 {found['dvc_lock']}",
             f"  data card   sha256 {found['data_card']}",
             "  runs        " + ", ".join(f"{what} {run}" for what, run in runs.items() if run),
             f"  parameters, dvc.lock and data card as they were: in {FOLDER}/ of the version's files in MLflow", "",
             "how it was made:"]
    for name in _in_order(stages, set(TRAINING + SCORING)):
        stage = stages[name]
        data = [f"{path} {md5[:8]}" for path, md5 in stage.deps.items() if path.startswith("data/")]
        code = len(stage.deps) - len(data)
        lines.append(f"  {name}: from {', '.join([*data, f'{code} files of code', f'{len(stage.params)} parameters'])}")
        lines += [f"    -> {path} {md5}" for path, md5 in stage.outs.items()]
    return "\n".join([*lines, "", f"to prove it: onediff lineage {found['version']} --verify"])


def _stages(found: Mapping[str, Any]) -> dict[str, Stage]:
    return {name: Stage(**stage) for name, stage in found["stages"].items()}


def before(stages: Mapping[str, Stage], wanted: Iterable[str]) -> set[str]:
    """These stages and all that they need."""
    found: set[str] = set()
    waiting = [name for name in wanted if name in stages]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other, stage in stages.items()
                        if any(_holds(dep, out) or _holds(out, dep) for dep in stages[name].deps for out in stage.outs)]
    return found


def _in_order(stages: Mapping[str, Stage], wanted: Iterable[str]) -> list[str]:
    """What was needed first comes first."""
    chosen = before(stages, wanted)
    return sorted(chosen, key=lambda name: (len(before(stages, [name])), list(stages).index(name)))


def _holds(outer: str, inner: str) -> bool:
    return PurePosixPath(inner).is_relative_to(outer)


# --- asked of a file -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """That a version has a file or folder in its lineage. `here`: whether the workspace has the same bytes now; None
    if it has none under that path.
    """

    version: str
    aliases: list[str]
    path: str
    digest: str
    role: str
    here: bool | None


def versions_of(item: str, *, root: Path = Path()) -> tuple[list[Use], list[str]]:
    """Every version with an item in its lineage: a path as in dvc.yaml, a file below one, or an md5 or SHA-256; then
    the versions that carry no lineage, of which nothing is known. Newest first.

    Raises ValueError if nothing is registered.
    """
    name = item if _is_digest(item) else _relative(item, root)
    found, unknown = [], []
    for row in registry.list_versions():
        try:
            lineage = told(row["version"])
        except ValueError:
            unknown.append(row["version"])
            continue
        for path, digest in _matches(name, lineage).items():
            here = versioned.md5_of(root / path) == digest if (root / path).exists() else None
            found.append(Use(row["version"], row["aliases"], path, digest, _role(path, lineage), here))
    return found, unknown


def _matches(name: str, lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of a version's lineage has this path or digest; else the folder that holds the path, if its files are not
    listed.
    """
    entries = _entries(lineage)
    if _is_digest(name):  # the data card names shards by half the SHA-256
        shards = {f"{DIFFCAP}/{shard}" for shard, half in lineage["shards"].items() if name[:32] == half}
        return {path: digest for path, digest in entries.items()
                if name.removesuffix(".dir") == digest.removesuffix(".dir") or path in shards}
    if name in entries:
        return {name: entries[name]}
    return {path: digest for path, digest in entries.items()
            if digest.endswith(".dir") and _holds(path, name) and not lineage["files"].get(path)}


def _is_digest(item: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}(\.dir)?|[0-9a-f]{64}", item) is not None


def _relative(item: str, root: Path) -> str:
    path = Path(os.path.normpath(root.absolute() / item))
    return path.relative_to(root.absolute()).as_posix() if path.is_relative_to(root.absolute()) else item


def _entries(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Path -> digest of all in a version's lineage: deps, outs, files in them, and the weights by SHA-256."""
    entries: dict[str, str] = {}
    for stage in lineage["stages"].values():
        entries |= stage["deps"] | stage["outs"]
    for folder, files in lineage["files"].items():
        entries |= {f"{folder}/{name}": md5 for name, md5 in (files or {}).items()}
    return entries | {f"{WEIGHTS}/*.safetensors": lineage["weights_digest"], f"{LOCK} (SHA-256)": lineage["dvc_lock"],
                      f"{DIFFCAP}/card.json (SHA-256)": lineage["data_card"]}


def _role(path: str, lineage: Mapping[str, Any]) -> str:
    """What the version did with it."""
    stages = _stages(lineage)
    parts = path.split("/")
    learned = {source for phase in TRAINING if phase in stages
               for source in (stages[phase].params.get(phase) or {}).get("mixture", {})}
    if _holds(WEIGHTS, path):
        return "is made of it"
    if path.startswith(f"{DIFFCAP}/") and not parts[2].startswith("train-"):
        return {"val": "chose its step on it"}.get(parts[2].split("-")[0], "was not trained on it, but scored")
    if len(parts) > 2 and parts[1] in _SOURCES and parts[2] not in learned:
        return "was not trained on it, but scored"
    needed = [stages[name] for name in before(stages, TRAINING)]
    if any(_holds(dep, path) for stage in needed for dep in stage.deps) or any(path in stage.outs for stage in needed):
        return "was trained on it" if path.startswith("data/") else "was trained with it"
    return "has it in its lineage"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
