"""What dvc.yaml and dvc.lock say about the stages: their order, what they need, what is out of date."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.processes import DVC
from onediff.config import Data, load_params

LOCK = Path("dvc.lock")
STAGES = ("probe", "validate", "build", "align", "tune", "caption", "score", "stress", "report")


def stages(data: Data) -> list[str]:
    """The stages of dvc.yaml in an order in which each finds what it needs: first those of the sources."""
    lists: dict[str, list[Any]] = {
        "synthesize": data.generated, "read": data.raw, "retrieve": data.retrieved, "instruct": data.diffused,
        "diffuse": data.diffused, "write": data.written}
    return [f"{stage}@{source}" for stage, sources in lists.items() for source in sources] + list(STAGES)


def needs(stage: str, folder: Path = Path()) -> str:
    """`cpu` or `gpu`: the kind of machine that a stage runs on."""
    return str(_described(stage, folder)["meta"]["needs"])


def stale_stages() -> set[str]:
    """The stages whose deps, parameters or outs differ from dvc.lock now; what follows them may become stale too.

    Raises ValueError in DVC's words if dvc.yaml or the project is not in order.
    """
    return set(json.loads(dvc(Path(), "status", "--json")))


def stale_elsewhere() -> set[str]:
    """The same where the data are on other machines: what is missing here is taken to be as dvc.lock says.

    A folder that several stages fill cannot be told from here: what reads it is among them.
    """
    changed = {stage for stage, changes in json.loads(dvc(Path(), "status", "--json")).items()
               if not all(isinstance(change, dict) and _only_missing(change) for change in changes)}
    locked = _locked(Path())
    made = {out["path"]: out["md5"] for entry in locked.values() for out in entry.get("outs", [])}
    other = {stage for stage, entry in locked.items()
             if any(made.get(dep["path"], dep["md5"]) != dep["md5"] for dep in entry.get("deps", []))}
    return changed | other | {stage for stage in stages(load_params().data) if stage not in locked}


def outs_for(folder: Path, stage: str) -> tuple[list[str], list[Path]]:
    """What a stage reads that dvc.lock or a .dvc file knows, by DVC's names; and files of stages that are no more."""
    source = stage.partition("@")[2]
    deps = [Path(dep.replace("${item.source}", source)) for dep in _described(stage, folder)["deps"]]
    made = {Path(out["path"]) for entry in _locked(folder).values() for out in entry.get("outs", []) if "hash" in out}
    kept = set(small_outs(folder))
    wanted = [out for out in sorted(made - kept) if any(_within(out, dep) or _within(dep, out) for dep in deps)]
    raw = [f"{dep}.dvc" for dep in deps if (folder / f"{dep}.dvc").exists()]
    raw += [str(path.relative_to(folder)) for dep in deps for path in sorted((folder / dep).rglob("*.dvc"))]
    gone = [path for dep in deps if dep not in made and any(_within(out, dep) for out in made)
            for path in (folder / dep).iterdir()
            if path.name != ".gitignore" and not any(_within(out, path.relative_to(folder)) for out in made)]
    return [*map(str, wanted), *raw], gone


def small_outs(folder: Path = Path()) -> list[Path]:
    """The metrics that git keeps, not DVC's cache."""
    listed = YAML(typ="safe").load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return [Path(path) for stage in listed.values() for metric in stage.get("metrics", []) for path in metric]


def raw_files(folder: Path = Path()) -> list[Path]:
    """The .dvc files of raw data, which refreshing it changes before anybody commits them."""
    return sorted(path.relative_to(folder) for path in (folder / "data/raw").rglob("*.dvc"))


def dvc(folder: Path, *arguments: str) -> str:
    """What `dvc ARGUMENTS` prints. Raises ValueError in DVC's own words."""
    asked = subprocess.run([*DVC, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ValueError(f"dvc {arguments[0]}: {one_line(asked.stderr)}")
    return asked.stdout


def outcome(said: str) -> str:
    """What `dvc repro` did, by its output: Ran, Restored (from the run cache or the remote) or UpToDate."""
    if re.search(r"^Stage '.*' is cached - skipping run", said, re.MULTILINE):
        return "Restored"
    return "Ran" if re.search(r"^Running stage '", said, re.MULTILINE) else "UpToDate"


def reason(folder: Path, since: float) -> str:
    """What a training phase wrote about its end; DVC gives every failure the same exit status."""
    status = training_status(folder, since)
    if status is None:
        return "; see its message above"
    return f": {status['state']} at step {status['step']}" + (f" ({status['reason']})" if status["reason"] else "")


def training_status(folder: Path, since: float) -> dict[str, Any] | None:
    """The state, step and reason that an unfinished training phase last wrote, if it wrote after `since`."""
    written = [path for path in folder.glob(".onediff/scratch/*/status.json") if path.stat().st_mtime >= since]
    return json.loads(max(written, key=lambda path: path.stat().st_mtime).read_text()) if written else None


def one_line(text: str) -> str:
    """DVC's message without the listing of the file below it, whose lines begin with a number."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\s+\d+\s", line)]
    return " ".join(lines).removeprefix("ERROR: ") or "no message"


def _described(stage: str, folder: Path) -> dict[str, Any]:
    listed = YAML(typ="safe").load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return listed[stage.partition("@")[0]]


def _locked(folder: Path) -> dict[str, Any]:
    path = folder / LOCK
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}


def _only_missing(change: dict[str, dict[str, str]]) -> bool:
    return all(state in ("deleted", "not in cache") for paths in change.values() for state in paths.values())


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents
