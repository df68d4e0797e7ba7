"""Facts about a version: the data passed validation, no test pair leaks into the training data, and git has the code.

They are read from dvc.lock, in which DVC writes a stage only after it succeeded, and from the files on disk; no MLflow.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff import paths
from onediff.git import changed_files, head
from onediff.paths import DVC_LOCK
from onediff.repro.lock import Stage, md5_of, outs_of, read_dvc_lock
from onediff.tracking import provenance

YES, NO_GIT = "yes", "no git"
OF_DATA = ("data_validated", "leak_audit")
FACTS = (*OF_DATA, "clean_lineage")
DIFFCAP, QUARANTINE, REPORTS = map(str, (paths.DIFFCAP, paths.QUARANTINE, paths.DIFFCAP_REPORTS))
AUDIT = "audit.json"
TRAINED_CLEAN = "training_lineage"  # tag: clean_lineage of the training only; scoring again does not change it


def facts_at_registration(model_dir: Path, *, root: Path = Path()) -> dict[str, str]:
    """data_validated, leak_audit, clean_lineage, training_lineage: each `yes`, `no git`, or `no: ` with the reason and
    the cure.
    """
    stages, lineage = _stages(root), _lineage(root)
    return _facts_of_data(_broken_chain(model_dir, stages, root), stages, root) | {
        "clean_lineage": _other_inputs(stages, ("tune", "caption", "score"), root) or lineage,
        TRAINED_CLEAN: _other_inputs(stages, ("tune",), root) or lineage}


def facts_after_scoring(tags: Mapping[str, str], *, root: Path = Path()) -> dict[str, str]:
    """Facts for a version that was scored again with the DiffCap and the code that are in `root` now.

    `tags`: the tags of the version, which say from which data and code it was trained.
    """
    stages, data = _stages(root), provenance(root)["data_digest"]
    broken = (_broken_data(md5_of(root / DIFFCAP), stages) if (root / DIFFCAP).exists() else
              f"{root / DIFFCAP} not found; 'dvc pull {DIFFCAP}' brings it, 'dvc repro' makes it")
    if not broken and tags.get("data_digest") != data:
        broken = (f"the version learned from other data (data card {tags.get('data_digest', 'none')[:12]}) than it was "
                  f"scored on ({data[:12]}), and no leak audit compares the two; 'dvc repro' trains on this data")
    return _facts_of_data(broken, stages, root) | {"clean_lineage": _lineage_after_scoring(tags, root)}


def size_mib(folder: Path) -> float:
    """The size of all files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def locked_md5(model_dir: Path, *, root: Path = Path()) -> str | None:
    """The digest of the folder's content in dvc.lock, or None if no stage made it."""
    path, project = model_dir.absolute(), root.absolute()
    return outs_of(_stages(root)).get(path.relative_to(project).as_posix()) if path.is_relative_to(project) else None


def _stages(root: Path) -> dict[str, Stage]:
    return read_dvc_lock(root / DVC_LOCK) if (root / DVC_LOCK).exists() else {}


def _broken_chain(model_dir: Path, stages: Mapping[str, Stage], root: Path) -> str:
    """Where the chain from the folder's bytes back to the stage `validate` breaks; empty if it does not.

    The folder is what a stage wrote, which read what `build` wrote, which read what `validate` wrote. A stage that
    failed, as `validate` does for too many bad pairs, has no entry in dvc.lock.
    """
    md5 = locked_md5(model_dir, root=root)
    if md5 is None:
        return f"{model_dir} is no out of a stage in dvc.lock; only what 'dvc repro' made comes from checked data"
    if md5_of(model_dir) != md5:
        return f"{model_dir} is not what dvc.lock says; 'dvc repro' or 'dvc checkout' makes them agree"
    trained = next(stage for stage in stages.values() if md5 in stage.outs.values())
    return _broken_data(trained.deps.get(DIFFCAP), stages)


def _broken_data(diffcap_md5: str | None, stages: Mapping[str, Stage]) -> str:
    """Where the chain from this DiffCap back to the stage `validate` breaks; empty if it does not."""
    for stage, path in (("build", DIFFCAP), ("validate", QUARANTINE)):
        md5 = diffcap_md5 if stage == "build" else stages["build"].deps.get(QUARANTINE)
        if stage not in stages or md5 is None or stages[stage].outs.get(path) != md5:
            return f"dvc.lock: {path} that was read is not what stage {stage} left; 'dvc repro' makes it anew"
    return ""


def _facts_of_data(broken: str, stages: Mapping[str, Stage], root: Path) -> dict[str, str]:
    validated = f"no: {broken}" if broken else YES
    return {"data_validated": validated, "leak_audit": validated if broken else _leaks(stages, root)}


def _leaks(stages: Mapping[str, Stage], root: Path) -> str:
    folder = root / REPORTS
    if not (folder / AUDIT).exists():
        return f"no: {folder / AUDIT} not found; 'dvc pull build' brings it, 'dvc repro' makes it"
    if md5_of(folder) != stages["build"].outs.get(REPORTS):
        return f"no: {folder} is not what dvc.lock says; 'dvc checkout' or 'dvc repro' makes them agree"
    benchmarks = json.loads((folder / AUDIT).read_text(encoding="utf-8"))["benchmarks"]
    leaks = [f"{name}: {table['verdict']}" for name, table in benchmarks.items() if table["verdict"] != "clean"]
    return f"no: {'; '.join(leaks)}; see {folder / AUDIT} and data.leaks in params.yaml" if leaks else YES


def _lineage(root: Path) -> str:
    if head(root) is None:
        return ("no: this repository has no commit; 'git add -A' and 'git commit', then register again"
                if (root / ".git").exists() else NO_GIT)
    changed = changed_files(root)
    return (f"no: changed since the commit: {', '.join(changed[:5])}; 'git commit', then register again"
            if changed else YES)


def _lineage_after_scoring(tags: Mapping[str, str], root: Path) -> str:
    """clean_lineage now, unless the training itself was not clean. `tags`: those of the version; versions of early code
    have git_dirty only: false, true, or none without git.
    """
    lineage, dirty = _lineage(root), tags.get("git_dirty", "none")
    trained = tags.get(TRAINED_CLEAN, YES)
    if trained.startswith("no: stage"):
        return trained
    if dirty == "false" or (dirty == "none" and lineage == NO_GIT):
        return lineage
    how = "outside git" if dirty == "none" else "from code or parameters that were not committed"
    return f"no: the version was registered {how}; 'git commit', 'dvc repro', then register again"


def _other_inputs(stages: Mapping[str, Stage], names: tuple[str, ...], root: Path) -> str | None:
    """The first file of code or parameter that has changed since one of these stages, or one before them, ran with it:
    then the commit does not contain what was run.
    """
    params = root / paths.PARAMS
    values = YAML(typ="safe").load(params.read_text(encoding="utf-8")) or {} if params.exists() else {}
    for name, stage in _with_earlier(stages, names).items():
        for path, md5 in stage.deps.items():
            if not path.startswith("data/") and (not (root / path).exists() or md5_of(root / path) != md5):
                return f"no: stage {name} ran with another {path} than there is now; 'dvc repro', then register again"
        for key, value in stage.params.items():
            if _parameter(values, key) != value:
                return (f"no: stage {name} ran with another value of {key} than params.yaml has now; 'dvc repro', then "
                        "register again")
    return None


def _with_earlier(stages: Mapping[str, Stage], names: tuple[str, ...]) -> dict[str, Stage]:
    """These stages and all stages whose outs they read, directly or through other stages."""
    reached: dict[str, Stage] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name in stages and name not in reached:
            reached[name] = stages[name]
            waiting += [other for other, stage in stages.items()
                        if any(Path(out).is_relative_to(dep) or Path(dep).is_relative_to(out)
                               for out in stage.outs for dep in stages[name].deps)]
    return reached


def _parameter(values: Any, key: str) -> Any:
    """The value with this full name, such as tune.steps, or None."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
