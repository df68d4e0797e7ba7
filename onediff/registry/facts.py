"""Facts about a version: the data passed validation, no test pair leaks into the training data, and git has the code.

Read from dvc.lock, in which DVC writes a stage only after it succeeded, and from what lies on disk; no MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff import tracking
from onediff.registry import commits
from onediff.repro.lock import LOCK, Stage, md5_of, read_dvc_lock

YES = "yes"
OF_DATA = ("data_validated", "leak_audit")
FACTS = (*OF_DATA, "clean_lineage")
DIFFCAP, QUARANTINE = "data/diffcap", "data/quarantine.parquet"
REPORTS, AUDIT = "data/reports/diffcap", "audit.json"
TRAINED_CLEAN = "training_lineage"  # tag: clean_lineage of the training alone; scoring again does not change it
_TRAINING, _SCORING = ("tune",), ("tune", "caption", "score")


def facts(model_dir: Path, *, root: Path = Path()) -> dict[str, str]:
    """data_validated, leak_audit, clean_lineage, training_lineage: each `yes`, `no git`, or `no: ` and why, with the
    cure.
    """
    broken, stages, now = _broken_chain(model_dir, root), _stages(root), _lineage(root)
    return {"data_validated": f"no: {broken}" if broken else YES, "leak_audit": _leaks(broken, root),
            "clean_lineage": _other_code(stages, _SCORING, root) or now,
            TRAINED_CLEAN: _other_code(stages, _TRAINING, root) or now}


def facts_again(tags: Mapping[str, str], *, root: Path = Path()) -> dict[str, str]:
    """Facts for a version that was scored again with the DiffCap and the code that are in `root` now.

    `tags`: the tags of the version, which say from which data and code it was trained.
    """
    stages, data = _stages(root), tracking.provenance(root)["data_digest"]
    broken = _broken_data(stages, root)
    if not broken and tags.get("data_digest") != data:
        broken = (f"the version learned from other data (data card {tags.get('data_digest', 'none')[:12]}) than it was "
                  f"scored on ({data[:12]}), and no leak audit compares the two; 'dvc repro' trains on this data")
    return {"data_validated": f"no: {broken}" if broken else YES, "leak_audit": _leaks(broken, root),
            "clean_lineage": _lineage_again(tags, root)}


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def locked_md5(model_dir: Path, *, root: Path = Path()) -> str | None:
    """The digest of the folder's content in dvc.lock, or None if no stage made it."""
    path = model_dir.absolute()
    if not path.is_relative_to(root.absolute()):
        return None
    name = path.relative_to(root.absolute()).as_posix()
    return next((stage.outs[name] for stage in _stages(root).values() if name in stage.outs), None)


def _stages(root: Path) -> dict[str, Stage]:
    return read_dvc_lock(root / LOCK) if (root / LOCK).exists() else {}


def _broken_chain(model_dir: Path, root: Path) -> str:
    """Where the chain from the folder's bytes back to the stage `validate` breaks, or nothing.

    The folder is what a stage left, which read what `build` left, which read what `validate` left. A stage that failed,
    as `validate` does for too many bad pairs, leaves no line in dvc.lock.
    """
    made = locked_md5(model_dir, root=root)
    if made is None:
        return f"{model_dir} is no out of a stage in dvc.lock; only what 'dvc repro' made comes from checked data"
    if md5_of(model_dir) != made:
        return f"{model_dir} is not what dvc.lock says; 'dvc repro' or 'dvc checkout' makes them agree"
    stages = _stages(root)
    trained = next(stage for stage in stages.values() if made in stage.outs.values())
    return _broken_link(stages, "build", DIFFCAP, trained.deps.get(DIFFCAP)) or _unvalidated(stages)


def _broken_data(stages: Mapping[str, Stage], root: Path) -> str:
    """Where the chain from the bytes of DiffCap on disk back to the stage `validate` breaks, or nothing."""
    if not (root / DIFFCAP).exists():
        return f"{root / DIFFCAP} not found; 'dvc pull {DIFFCAP}' brings it, 'dvc repro' makes it"
    return _broken_link(stages, "build", DIFFCAP, md5_of(root / DIFFCAP)) or _unvalidated(stages)


def _unvalidated(stages: Mapping[str, Stage]) -> str:
    return _broken_link(stages, "validate", QUARANTINE, stages["build"].deps.get(QUARANTINE))


def _broken_link(stages: Mapping[str, Stage], name: str, path: str, read: str | None) -> str:
    if name in stages and read is not None and stages[name].outs.get(path) == read:
        return ""
    return f"dvc.lock: {path} that was read is not what stage {name} left; 'dvc repro' makes it anew"


def _leaks(broken: str, root: Path) -> str:
    if broken:
        return f"no: {broken}"
    folder = root / REPORTS
    if not (folder / AUDIT).exists():
        return f"no: {folder / AUDIT} not found; 'dvc pull build' brings it, 'dvc repro' makes it"
    if md5_of(folder) != _stages(root)["build"].outs.get(REPORTS):
        return f"no: {folder} is not what dvc.lock says; 'dvc checkout' or 'dvc repro' makes them agree"
    audited = json.loads((folder / AUDIT).read_text(encoding="utf-8"))["benchmarks"]
    bad = [f"{name}: {its['verdict']}" for name, its in audited.items() if its["verdict"] != "clean"]
    return f"no: {'; '.join(bad)}; see {folder / AUDIT} and data.leaks in params.yaml" if bad else YES


def _lineage(root: Path) -> str:
    commit = commits.head(root)
    if commit == commits.NO_GIT:
        return commits.NO_GIT
    if commit == commits.NO_COMMIT:
        return "no: this repository has no commit; 'git add -A' and 'git commit', then register again"
    changed = tracking.changed_files(root)
    if changed:
        return f"no: changed since the commit: {', '.join(changed[:5])}; 'git commit', then register again"
    return YES


def _lineage_again(tags: Mapping[str, str], root: Path) -> str:
    """clean_lineage now, unless the training itself was not clean. `tags`: those of the version; versions of early code
    have git_dirty alone: false, true, or none without git.
    """
    now, dirty = _lineage(root), tags.get("git_dirty", "none")
    trained = tags.get(TRAINED_CLEAN, YES)
    if trained.startswith("no: stage"):
        return trained
    if dirty == "false" or (dirty == "none" and now == commits.NO_GIT):
        return now
    how = "outside git" if dirty == "none" else "from code or parameters that were not committed"
    return f"no: the version was registered {how}; 'git commit', 'dvc repro', then register again"


def _other_code(stages: Mapping[str, Stage], names: tuple[str, ...], root: Path) -> str | None:
    """The first file of code or parameter with which one of these stages, or one before them, ran and that is another
    one now: then the commit does not have what was run.
    """
    values = _parameters(root)
    for name, stage in _with_earlier(stages, names).items():
        for path, md5 in stage.deps.items():
            if not path.startswith("data/") and (not (root / path).exists() or md5_of(root / path) != md5):
                return (f"no: stage {name} ran with another {path} than there is now; 'dvc repro', then register again")
        for key, ran_with in stage.params.items():
            if values.get(key) != ran_with:
                return (f"no: stage {name} ran with another value of {key} than params.yaml has now; 'dvc repro', then "
                        "register again")
    return None


def _with_earlier(stages: Mapping[str, Stage], names: tuple[str, ...]) -> dict[str, Stage]:
    """These stages and all whose outs they read, directly or through other stages."""
    found: dict[str, Stage] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name in stages and name not in found:
            found[name] = stages[name]
            waiting += [other for other, stage in stages.items()
                        if any(_overlap(out, dep) for out in stage.outs for dep in stages[name].deps)]
    return found


def _overlap(first: str, second: str) -> bool:
    """Whether two paths are the same, or one is inside the other."""
    return f"{first}/".startswith(f"{second}/") or f"{second}/".startswith(f"{first}/")


def _parameters(root: Path) -> dict[str, Any]:
    """Every value of params.yaml by its full name, as in dvc.lock: {"tune": {"steps": 3}, "tune.steps": 3}."""
    path = root / "params.yaml"
    return _named(YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def _named(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            found |= _named(value, f"{prefix}{key}.")
    return found
