"""Read dvc.yaml and dvc.lock: the order of the stages, the inputs of a stage, and which stages are out of date."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.processes import DVC
from onediff.config import Data, load_params
from onediff.paths import DVC_LOCK, DVC_YAML, RAW
from onediff.repro import lock

STAGES = ("probe", "validate", "build", "align", "tune", "caption", "score", "stress", "report")


def stages(data: Data) -> list[str]:
    """Return the stages of dvc.yaml in an order in which every stage follows the stages that make its inputs."""
    sources_of: dict[str, list[Any]] = {
        "synthesize": data.generated, "read": data.raw, "retrieve": data.retrieved, "instruct": data.diffused,
        "diffuse": data.diffused, "write": data.written}
    return [f"{stage}@{source}" for stage, sources in sources_of.items() for source in sources] + list(STAGES)


def needs(stage: str, folder: Path = Path()) -> str:
    """Return the kind of machine that a stage needs: `cpu` or `gpu`."""
    return str(_definitions(folder)[stage.partition("@")[0]]["meta"]["needs"])


def stale_stages() -> set[str]:
    """Return the stages whose dependencies, parameters or outputs differ from dvc.lock.

    Stages that depend on a stale stage are not included unless they are stale themselves. Raises ValueError with DVC's
    message if DVC cannot read the project.
    """
    return set(json.loads(dvc(Path(), "status", "--json")))


def stale_elsewhere() -> set[str]:
    """Return the stale stages if the data are on other machines. A file missing on this machine counts as unchanged.

    A stage that reads a folder with the outputs of several stages counts as stale, because without the files this
    machine cannot compute the digest of the folder.
    """
    missing = {"deleted", "not in cache"}
    changed = {stage for stage, changes in json.loads(dvc(Path(), "status", "--json")).items()
               if not all(isinstance(change, dict) and all(missing.issuperset(paths.values())
                                                           for paths in change.values()) for change in changes)}
    locked = _locked(Path())
    outs = lock.outs_of(locked)
    other = {stage for stage, entry in locked.items()
             if any(outs.get(path, md5) != md5 for path, md5 in entry.deps.items())}
    return changed | other | {stage for stage in stages(load_params().data) if stage not in locked}


def inputs_of(stage: str, folder: Path) -> tuple[list[str], list[Path]]:
    """Return two lists: the inputs of a stage, as targets of `dvc pull`, and outdated files in its input folders.

    Targets are dependencies that are listed in dvc.lock or have a .dvc file. A file is outdated if dvc.lock does not
    list it, for example because its stage was removed from dvc.yaml.
    """
    name, _, source = stage.partition("@")
    deps = [Path(dep.replace("${item.source}", source)) for dep in _definitions(folder)[name]["deps"]]
    outs = set(map(Path, lock.outs_of(_locked(folder))))
    inputs = [str(out) for out in sorted(outs.difference(metric_files(folder)))
              if any(out.is_relative_to(dep) or dep.is_relative_to(out) for dep in deps)]
    inputs += [f"{dep}.dvc" for dep in deps if (folder / f"{dep}.dvc").exists()]
    inputs += [str(path.relative_to(folder)) for dep in deps for path in sorted((folder / dep).rglob("*.dvc"))]
    left_behind = [path for dep in deps if dep not in outs and any(out.is_relative_to(dep) for out in outs)
                   for path in (folder / dep).iterdir() if path.name != ".gitignore"
                   and not any(out.is_relative_to(path.relative_to(folder)) for out in outs)]
    return inputs, left_behind


def metric_files(folder: Path = Path()) -> list[Path]:
    """Return the paths of the metrics files in dvc.yaml. These files are in git, not in the DVC cache."""
    return [Path(path) for stage in _definitions(folder).values() for metric in stage.get("metrics", [])
            for path in metric]


def raw_files(folder: Path = Path()) -> list[Path]:
    """Return the .dvc files of the raw data. They may contain uncommitted changes that the flow `refresh-data` made."""
    return sorted(path.relative_to(folder) for path in (folder / RAW).rglob("*.dvc"))


def dvc(folder: Path, *arguments: str) -> str:
    """Run `dvc ARGUMENTS` in the folder and return its output. Raises ValueError with DVC's message if it fails."""
    done = subprocess.run([*DVC, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:  # Below the error message, DVC prints numbered lines of the faulty file; drop these lines.
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not re.match(r"\s+\d+\s", line)]
        raise ValueError(f"dvc {arguments[0]}: {' '.join(lines).removeprefix('ERROR: ') or 'no message'}")
    return done.stdout


def outcome(stdout: str) -> str:
    """Return what `dvc repro` did, read from its output: Ran, Restored (from the run cache or a remote) or UpToDate."""
    if re.search(r"^Stage '.*' is cached - skipping run", stdout, re.MULTILINE):
        return "Restored"
    return "Ran" if re.search(r"^Running stage '", stdout, re.MULTILINE) else "UpToDate"


def reason(folder: Path, since: float) -> str:
    """Return why a stage failed: the reason that training wrote to status.json, or else 'see its message above'."""
    status = training_status(folder, since)
    if status is None:
        return "; see its message above"
    return f": {status['state']} at step {status['step']}" + (f" ({status['reason']})" if status["reason"] else "")


def training_status(folder: Path, since: float) -> dict[str, Any] | None:
    """Return the newest status.json of an unfinished training phase, or None if none was written after `since`."""
    written = [path for path in folder.glob(".onediff/scratch/*/status.json") if path.stat().st_mtime >= since]
    return json.loads(max(written, key=lambda path: path.stat().st_mtime).read_text()) if written else None


def _definitions(folder: Path) -> dict[str, Any]:
    return dict(YAML(typ="safe").load((folder / DVC_YAML).read_text(encoding="utf-8"))["stages"])


def _locked(folder: Path) -> dict[str, lock.Stage]:
    return lock.read_dvc_lock(folder / DVC_LOCK) if (folder / DVC_LOCK).exists() else {}
