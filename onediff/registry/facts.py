"""Facts about a model version: its data passed validation, no test pair is in its training data, git has its code.

The facts are read from dvc.lock and from the files on disk. DVC adds a stage to dvc.lock only after the stage has
succeeded. This module does not use MLflow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff import paths
from onediff.files import read_json
from onediff.git import changed_files, head
from onediff.paths import DVC_LOCK
from onediff.repro.lock import Stage, md5_of, outs_of, read_dvc_lock
from onediff.tracking import provenance

YES, NO_GIT = "yes", "no git"
OF_DATA = ("data_validated", "leak_audit")
FACTS = (*OF_DATA, "clean_lineage")
DIFFCAP, QUARANTINE, REPORTS = map(str, (paths.DIFFCAP, paths.QUARANTINE, paths.DIFFCAP_REPORTS))
AUDIT = "audit.json"
# This MLflow tag is like clean_lineage, but for the training only, so scoring a version again does not change it.
TRAINED_CLEAN = "training_lineage"


def facts_at_registration(model_dir: Path, *, root: Path = Path()) -> dict[str, str]:
    """Return the facts about a model of the pipeline in `root`, as MLflow tags for its registered version.

    The tags are data_validated, leak_audit, clean_lineage and training_lineage. Each value is `yes`, `no git`, or
    `no: ` followed by the reason and by a command that corrects the cause.
    """
    stages, lineage = _stages(root), _lineage(root)
    return _facts_of_data(_broken_chain(model_dir, stages, root), stages, root) | {
        "clean_lineage": _other_inputs(stages, ("tune", "caption", "score"), root) or lineage,
        TRAINED_CLEAN: _other_inputs(stages, ("tune",), root) or lineage}


def facts_after_scoring(tags: Mapping[str, str], *, root: Path = Path()) -> dict[str, str]:
    """Return the new facts about a registered version that was scored again with the present data and code in `root`.

    `tags` are the MLflow tags of the version, which identify the data and code of its training. Returns the tags
    data_validated, leak_audit and clean_lineage.
    """
    stages, data = _stages(root), provenance(root)["data_digest"]
    broken = (_broken_data(md5_of(root / DIFFCAP), stages) if (root / DIFFCAP).exists() else
              f"{root / DIFFCAP} does not exist; 'dvc pull {DIFFCAP}' downloads it, 'dvc repro' creates it")
    if not broken and tags.get("data_digest") != data:
        broken = (f"the version was trained on other data (data card {tags.get('data_digest', 'none')[:12]}) than it "
                  f"was scored on ({data[:12]}), and no leak audit compares the two; 'dvc repro' trains on this data")
    return _facts_of_data(broken, stages, root) | {"clean_lineage": _lineage_after_scoring(tags, root)}


def size_mib(folder: Path) -> float:
    """Return the total size of all files in the folder, in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def locked_md5(model_dir: Path, *, root: Path = Path()) -> str | None:
    """Return the md5 that dvc.lock has for the model folder, or None if the folder is not an output of a DVC stage."""
    path, project = model_dir.absolute(), root.absolute()
    return outs_of(_stages(root)).get(path.relative_to(project).as_posix()) if path.is_relative_to(project) else None


def _stages(root: Path) -> dict[str, Stage]:
    return read_dvc_lock(root / DVC_LOCK) if (root / DVC_LOCK).exists() else {}


def _broken_chain(model_dir: Path, stages: Mapping[str, Stage], root: Path) -> str:
    """Return why dvc.lock does not show that the model was trained on data that passed stage `validate`, else "".

    The model folder must be the output of a stage that read the output of `build`, and `build` must have read the
    output of `validate`. If `validate` refused the data, dvc.lock has no entry for `validate`.
    """
    md5 = locked_md5(model_dir, root=root)
    if md5 is None:
        return (f"{model_dir} must be an output of a stage in dvc.lock, but is none; train with 'dvc repro', which "
                "checks the data")
    if md5_of(model_dir) != md5:
        return (f"{model_dir} must have the digest in dvc.lock, but has another one; run 'dvc repro' or 'dvc checkout' "
                f"to make them agree")
    trained = next(stage for stage in stages.values() if md5 in stage.outs.values())
    return _broken_data(trained.deps.get(DIFFCAP), stages)


def _broken_data(diffcap_md5: str | None, stages: Mapping[str, Stage]) -> str:
    """Return why dvc.lock does not show that data/diffcap was built from data that passed stage `validate`, else ""."""
    for stage, path in (("build", DIFFCAP), ("validate", QUARANTINE)):
        md5 = diffcap_md5 if stage == "build" else stages["build"].deps.get(QUARANTINE)
        if stage not in stages or md5 is None or stages[stage].outs.get(path) != md5:
            return (f"dvc.lock: the {path} that a later stage read must be the output of stage {stage}, but has "
                    "another digest; 'dvc repro' creates it again")
    return ""


def _facts_of_data(broken: str, stages: Mapping[str, Stage], root: Path) -> dict[str, str]:
    validated = f"no: {broken}" if broken else YES
    return {"data_validated": validated, "leak_audit": validated if broken else _leaks(stages, root)}


def _leaks(stages: Mapping[str, Stage], root: Path) -> str:
    folder = root / REPORTS
    if not (folder / AUDIT).exists():
        return f"no: {folder / AUDIT} does not exist; 'dvc pull build' downloads it, 'dvc repro' creates it"
    if md5_of(folder) != stages["build"].outs.get(REPORTS):
        return f"no: {folder} must have the digest in dvc.lock, but has another one; run 'dvc checkout' or 'dvc repro'"
    benchmarks = read_json(folder / AUDIT)["benchmarks"]
    leaks = [f"{name}: {table['verdict']}" for name, table in benchmarks.items() if table["verdict"] != "clean"]
    return f"no: {'; '.join(leaks)}; see {folder / AUDIT} and data.leaks in params.yaml" if leaks else YES


def _lineage(root: Path) -> str:
    if head(root) is None:
        return ("no: this repository has no commit; run 'git add -A' and 'git commit', then register the version again"
                if (root / ".git").exists() else NO_GIT)
    changed = changed_files(root)
    return (f"no: changed since the commit: {', '.join(changed[:5])}; run 'git commit', then register the version again"
            if changed else YES)


def _lineage_after_scoring(tags: Mapping[str, str], root: Path) -> str:
    """Return the tag clean_lineage for a registered version that was scored again.

    `tags` are the MLflow tags of the version. If they show that the code and parameters of the training are not in
    git, return that reason; otherwise, return whether git has all files that are in `root` now. Old versions only have
    the tag git_dirty for this: false, true, or none if they were trained outside git.
    """
    lineage, dirty = _lineage(root), tags.get("git_dirty", "none")
    trained = tags.get(TRAINED_CLEAN, YES)
    if trained.startswith("no: stage"):
        return trained
    if dirty == "false" or (dirty == "none" and lineage == NO_GIT):
        return lineage
    how = "outside git" if dirty == "none" else "from code or parameters that were not committed"
    return f"no: the version was registered {how}; run 'git commit' and 'dvc repro', then register the version again"


def _other_inputs(stages: Mapping[str, Stage], names: tuple[str, ...], root: Path) -> str | None:
    """Return a message if a code file or parameter has changed since a stage used it, otherwise None.

    The check covers the stages `names` and all stages before them. After such a change, the git commit no longer
    contains the code that produced the outputs of the stage.
    """
    params = root / paths.PARAMS
    values = YAML(typ="safe").load(params.read_text(encoding="utf-8")) or {} if params.exists() else {}
    for name, stage in _with_earlier(stages, names).items():
        for path, md5 in stage.deps.items():
            if not path.startswith("data/") and (not (root / path).exists() or md5_of(root / path) != md5):
                return (f"no: stage {name} ran with another version of {path} than the present one; run 'dvc repro', "
                        "then register the version again")
        for key, value in stage.params.items():
            if _parameter(values, key) != value:
                return (f"no: stage {name} ran with another value of {key} than params.yaml has now; run 'dvc repro', "
                        "then register the version again")
    return None


def _with_earlier(stages: Mapping[str, Stage], names: tuple[str, ...]) -> dict[str, Stage]:
    """Return the stages with these names, and all stages whose outputs they read, directly or through other stages."""
    reached: dict[str, Stage] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name in stages and name not in reached:
            reached[name] = stages[name]
            waiting += [earlier for earlier, stage in stages.items()
                        if any(Path(out).is_relative_to(dep) or Path(dep).is_relative_to(out)
                               for out in stage.outs for dep in stages[name].deps)]
    return reached


def _parameter(values: Any, key: str) -> Any:
    """Return the value of a dotted key, such as tune.steps, from nested dicts, or None if the key does not exist."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
