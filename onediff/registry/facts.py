"""What is known of a model folder when it is registered: from data that passed, clean of leaks, by code that git has.

Read from dvc.lock, in which DVC writes a stage only after it succeeded, and from what lies on disk; no MLflow.
"""

from __future__ import annotations

import json
from pathlib import Path

from onediff import tracking

YES = "yes"
DIFFCAP, QUARANTINE = "data/diffcap", "data/quarantine.parquet"
REPORTS, AUDIT = "data/reports/diffcap", "audit.json"


def facts(model_dir: Path, *, root: Path = Path()) -> dict[str, str]:
    """data_validated, leak_audit, clean_lineage: each `yes`, or `no: ` and why, with the cure."""
    broken = _broken_chain(model_dir, root)
    return {"data_validated": f"no: {broken}" if broken else YES, "leak_audit": _leaks(broken, root),
            "clean_lineage": _lineage(root)}


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def locked_md5(model_dir: Path, *, root: Path = Path()) -> str | None:
    """The digest of the folder's content in dvc.lock, or None if no stage made it."""
    from onediff.versioned import locked, outs_of

    path = model_dir.absolute()
    if not (root / "dvc.lock").exists() or not path.is_relative_to(root.absolute()):
        return None
    return outs_of(locked(root / "dvc.lock")).get(path.relative_to(root.absolute()).as_posix())


def _broken_chain(model_dir: Path, root: Path) -> str:
    """Where the chain from the folder's bytes back to the stage `validate` breaks, or nothing.

    The folder is what a stage left, which read what `build` left, which read what `validate` left. A stage that failed,
    as `validate` does for too many bad pairs, leaves no line in dvc.lock.
    """
    from onediff.versioned import locked, md5_of

    made = locked_md5(model_dir, root=root)
    if made is None:
        return f"{model_dir} is no out of a stage in dvc.lock; only what 'dvc repro' made comes from checked data"
    if md5_of(model_dir) != made:
        return f"{model_dir} is not what dvc.lock says; 'dvc repro' or 'dvc checkout' makes them agree"
    stages = locked(root / "dvc.lock")
    trained = next(stage for stage in stages.values() if made in stage.outs.values())
    built = stages["build"].deps if "build" in stages else {}
    links = [("build", DIFFCAP, trained.deps), ("validate", QUARANTINE, built)]
    for name, path, deps in links:
        if name not in stages or stages[name].outs.get(path) != deps.get(path, ""):
            return f"dvc.lock: {path} that was read is not what stage {name} left; 'dvc repro' makes it anew"
    return ""


def _leaks(broken: str, root: Path) -> str:
    from onediff.versioned import locked, md5_of

    if broken:
        return f"no: {broken}"
    folder = root / REPORTS
    if not (folder / AUDIT).exists():
        return f"no: {folder / AUDIT} not found; 'dvc pull build' brings it, 'dvc repro' makes it"
    if md5_of(folder) != locked(root / "dvc.lock")["build"].outs.get(REPORTS):
        return f"no: {folder} is not what dvc.lock says; 'dvc checkout' or 'dvc repro' makes them agree"
    told = json.loads((folder / AUDIT).read_text(encoding="utf-8"))["benchmarks"]
    bad = [f"{name}: {its['verdict']}" for name, its in told.items() if its["verdict"] != "clean"]
    return f"no: {'; '.join(bad)}; see {folder / AUDIT} and data.leaks in params.yaml" if bad else YES


def _lineage(root: Path) -> str:
    if tracking.provenance(root)["git_commit"] == "none":
        return "no: this is no git commit; 'git init' and 'git commit', then register again"
    changed = tracking.changed_files(root)
    if changed:
        return f"no: changed since the commit: {', '.join(changed[:5])}; 'git commit', then register again"
    return YES
