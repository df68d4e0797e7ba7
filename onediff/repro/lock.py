"""Read dvc.lock, and restore files and folders of any dvc.lock from DVC's cache or from a remote.

    for name, stage in read_dvc_lock().items(): ...      # the md5 of every dependency and output
    fetch("b3b470bb...dir", Path("scratch/diffcap"))     # from the cache or the default remote, with checksums

`fetch` runs `dvc pull` in a temporary DVC project that uses the cache and the remotes of this project, so the workspace
does not change.
"""

import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from onediff.files import link_or_copy, new_file, new_folder
from onediff.paths import DVC_LOCK

_SHOWN = 3  # the largest number of files that an error message lists
# Settings of a DVC remote that contain no secrets, so that an error message may contain their values.
_PUBLIC = ("url", "region", "type", "profile", "version_aware", "worktree")


@dataclass(frozen=True)
class Stage:
    """The entry of one stage in dvc.lock.

    `deps` and `outs` map the paths of dependencies and outputs to their md5; the md5 of a folder ends with .dir.
    `params` maps dotted keys of params.yaml, such as tune.steps, to their values.
    """

    deps: dict[str, str]
    outs: dict[str, str]
    params: dict[str, Any]


def read_dvc_lock(path: Path = DVC_LOCK) -> dict[str, Stage]:
    """Read a dvc.lock file and return a dict from the name of each stage to its entry.

    Raises FileNotFoundError if the file does not exist, and ValueError if it is not a valid dvc.lock.
    """
    try:
        return parse_dvc_lock(path.read_bytes(), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; 'dvc repro' writes it") from None


def parse_dvc_lock(content: bytes, path: Path) -> dict[str, Stage]:
    """Parse the content of a dvc.lock file and return a dict from the name of each stage to its entry.

    `path` is only used in error messages. Raises ValueError if the content is not that of a dvc.lock.
    """
    try:
        stages = YAML(typ="safe").load(content.decode("utf-8"))["stages"]
        return {name: Stage(deps={dep["path"]: dep["md5"] for dep in stage.get("deps", ())},
                            outs={out["path"]: out["md5"] for out in stage.get("outs", ())},
                            params=dict(stage.get("params", {}).get("params.yaml", {})))
                for name, stage in stages.items()}
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: must be a dvc.lock, but it cannot be parsed ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]}); restore it with 'git checkout'") from None


@contextmanager
def preserved_dvc_lock(path: Path = DVC_LOCK) -> Iterator[None]:
    """Keep a copy of dvc.lock during the `with` block, and restore it afterwards if DVC left an empty file.

    DVC overwrites dvc.lock in place. If the disk is full, the file is empty afterwards.
    """
    copy = path.with_name(f"{path.name}.part")
    if path.exists():
        shutil.copyfile(path, copy)
    try:
        yield
    finally:
        if path.exists() and not path.stat().st_size:
            path.unlink()
            if copy.exists():
                copy.rename(path)
        copy.unlink(missing_ok=True)


def outs_of(stages: Mapping[str, Stage]) -> dict[str, str]:
    """Return a dict from the path of each output of these stages to its md5."""
    return {path: md5 for stage in stages.values() for path, md5 in stage.outs.items()}


def md5_of(path: Path) -> str:
    """Compute the md5 of a file or folder as DVC does; the md5 of a folder ends with .dir."""
    if path.is_dir():
        listing = [{"md5": md5, "relpath": name} for name, md5 in md5_of_files(path).items()]
        return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_of_files(folder: Path) -> dict[str, str]:
    """Return a dict from the relative path of each file in a folder to its md5, in DVC's order.

    Files that DVC does not track, such as .gitignore, are left out.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"
                   and not {"__pycache__", ".gitignore"} & {*path.relative_to(folder).parts})
    return {path.relative_to(folder).as_posix(): md5_of(path) for path in files}


def files_of(md5: str, cache: Path) -> dict[str, str]:
    """Return a dict from the relative path of each file in a folder to its md5, given the md5 of the folder.

    The result is read from the list of files that DVC's cache contains for each folder. If `md5` is that of a single
    file, the result is {"": md5}. Raises FileNotFoundError if the cache does not contain the list, and ValueError if
    the list is damaged.
    """
    if not md5.endswith(".dir"):
        return {"": md5}
    path = _object(cache, md5)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, but it must list the files of {md5}; run 'dvc push' on the "
                                "machine that made the files, then 'dvc pull' here")
    if md5_of(path) != md5.removesuffix(".dir"):
        raise ValueError(f"{path}: its md5 must equal its name, but it does not, so the file is damaged; "
                         "delete it, then run 'dvc pull'")
    return {item["relpath"]: item["md5"] for item in json.loads(path.read_text(encoding="utf-8"))}


def restore_outs(stage: str, *, project: Path = Path()) -> list[Path]:
    """Restore the missing outputs of a stage from its last successful run, and return the paths of the restored ones.

    DVC removes the outputs before it runs a stage, so without this call a failed run would leave no outputs at all.
    The restored files are hard links into DVC's cache, or copies if the cache is on another file system. Outputs that
    are not in dvc.lock or not in the cache are not restored.
    """
    missing = {path: md5 for path, md5 in _locked_outs(stage, project).items() if not os.path.lexists(project / path)}
    cache = cache_of(project) if missing else project
    restored = []
    for path, md5 in missing.items():
        if files := _cached_files(md5, cache):
            with (new_folder if md5.endswith(".dir") else new_file)(project / path) as part:
                for name, file_md5 in files.items():
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(_object(cache, file_md5), part / name)
            restored.append(Path(path))
    return restored


def uncached_outs(stage: str, *, project: Path = Path()) -> list[Path]:
    """Return the paths of those outputs of a stage in dvc.lock that DVC's cache does not contain.

    Outputs with `cache: false` are included. Call this function after a stage, because DVC exits with status 0 and
    writes dvc.lock even if the disk was too full to store the outputs in the cache.
    """
    outs = _locked_outs(stage, project)
    cache = cache_of(project) if outs else project
    if not (cache / "files/md5").is_dir():  # DVC's settings outside the project name another folder for the cache.
        return []
    return [Path(path) for path, md5 in outs.items() if not _cached_files(md5, cache)]


def _locked_outs(stage: str, project: Path) -> dict[str, str]:
    """Return a dict from the outputs of a stage to their md5 in dvc.lock, or {} if dvc.lock has no such stage."""
    stages = read_dvc_lock(project / DVC_LOCK) if (project / DVC_LOCK).exists() else {}
    return stages[stage].outs if stage in stages else {}


def _cached_files(md5: str, cache: Path) -> dict[str, str]:
    """Return a dict from the path of each file in an output to its md5, or {} if DVC's cache lacks one of the files.

    `md5` is that of the output, a file or a folder.
    """
    try:
        files = files_of(md5, cache)
    except (FileNotFoundError, ValueError):  # A damaged list of files is treated like a missing list.
        return {}
    return files if all(_object(cache, file_md5).exists() for file_md5 in files.values()) else {}


def fetch(md5: str, target: Path, *, project: Path = Path()) -> Path:
    """Copy the file or folder with this md5 from DVC's cache, or else from the default DVC remote, to `target`.

    Returns `target`, which is complete; after an error, it does not exist. The md5 of every file is computed again,
    because DVC does not check the files in its cache. Raises ValueError with a list of missing or damaged files, and
    FileNotFoundError if the folder `project` is not a DVC project.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} must not exist yet, but it does; choose another path")
    config = _config(project)
    target.parent.mkdir(parents=True, exist_ok=True)
    # 'dvc pull' runs in a temporary DVC project with one output, so that no file of this project changes.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        root, out = Path(scratch), Path(scratch) / "out"
        (root / ".dvc").mkdir()
        with (root / ".dvc/config").open("w", encoding="utf-8") as file:
            config.write(file)
        (root / "out.dvc").write_text(f"outs:\n- md5: {md5}\n  hash: md5\n  path: out\n", encoding="utf-8")
        environ = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(root / ".dvc/site")}
        done = subprocess.run([sys.executable, "-m", "dvc", "pull"], cwd=root, env=environ, capture_output=True,
                              text=True, check=False)
        if problems := _problems(md5, out, project / config.get("cache", "dir")):
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines()
                     if done.returncode and (line.startswith("ERROR") or "remote" in line)]
            complaint = f" (dvc: {_without_secrets(' '.join(dict.fromkeys(lines)), config)})" if lines else ""
            raise ValueError(f"{md5}: {'; '.join(problems[:_SHOWN])}{more}{complaint}. If no remote contains "
                             "it, run 'dvc push' on the machine that made it")
        out.rename(target)
    return target


def _problems(md5: str, out: Path, cache: Path) -> list[str]:
    """Return one error line for each file of the downloaded output `out` that is missing or has the wrong md5."""
    try:
        files = files_of(md5, cache)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    problems = []
    for name, file_md5 in files.items():
        path, cached = out / name, _object(cache, file_md5)
        if path.exists() and (actual := md5_of(path)) != file_md5:
            problems.append(f"{name or cached} is damaged: its md5 must be {file_md5}, got {actual}; delete {cached}, "
                            "then run 'dvc pull'")
        elif not path.exists() and not cached.exists():  # DVC writes no file of a folder if it cannot get one of them.
            problems.append(f"{name or 'the file'} is missing: neither the cache nor a remote contains {file_md5}")
    return problems or ([] if out.exists() else ["DVC did not write it"])


def _object(cache: Path, md5: str) -> Path:
    """Return the path in DVC's cache of the file with this md5. Raises ValueError if the text is not an md5."""
    if not re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5):
        raise ValueError(f"an md5 of DVC must be 32 hexadecimal digits, followed by .dir for a folder, got '{md5}'")
    return cache / "files/md5" / md5[:2] / md5[2:]


def _config(project: Path) -> configparser.RawConfigParser:
    """Return DVC's settings from .dvc/config and .dvc/config.local, after making all paths in them absolute.

    With absolute paths, a DVC project in another folder can use the cache and the remotes of this project.
    """
    home = (project / ".dvc").absolute()
    if not home.is_dir():
        raise FileNotFoundError(f"{home} does not exist, so this folder is no DVC project; run the command in the "
                                "project's folder")
    config = configparser.RawConfigParser(strict=False)
    config.optionxform = str  # type: ignore[assignment, method-assign]
    config.read_dict({"cache": {"dir": str(home / "cache")}})
    config.read([home / "config", home / "config.local"], encoding="utf-8")
    for section in config.sections():
        for key, value in config.items(section):
            path = home / value.strip("\"'")
            if "://" not in value and (key in ("url", "dir") or ("/" in value and path.exists())):
                config.set(section, key, os.path.normpath(path))
    # If DVC made links instead of copies, a change of a fetched file would also change the file in the cache.
    config.read_dict({"core": {"no_scm": "true"}, "cache": {"type": '"reflink,copy"'}})
    return config


def cache_of(project: Path = Path()) -> Path:
    """Return the folder of the DVC cache of a project. Raises FileNotFoundError if `project` is not a DVC project."""
    return project / _config(project).get("cache", "dir")


def _without_secrets(text: str, config: configparser.RawConfigParser) -> str:
    """Return a text after replacing secrets with ***: passwords, query strings in URLs, and settings of DVC remotes.

    Settings of remotes that contain no secrets, such as `region`, stay readable.
    """
    for section in config.sections():
        for key, value in config.items(section):
            if section.startswith("'remote") and key not in _PUBLIC and len(value) > 3:
                text = text.replace(value.strip("\"'"), "***")
    return re.sub(r"\?\S+", "?***", re.sub(r"//[^/@\s]+@", "//***@", text))
