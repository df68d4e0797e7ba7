"""Reads dvc.lock and DVC's cache: a file or folder that a dvc.lock names can be had again, whatever the workspace has.

    for name, stage in read_dvc_lock().items(): ...      # md5 of every dep and out
    fetch("b3b470bb...dir", Path("scratch/diffcap"))     # from the cache or the default remote, every byte checked

DVC runs as a command, in a temporary project that has the cache and the remotes of this project.
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

_SHOWN = 3  # files in a message
_PUBLIC = ("url", "region", "type", "profile", "version_aware", "worktree")  # settings of a remote that hold no secret


@dataclass(frozen=True)
class Stage:
    """A stage's entry in dvc.lock. deps and outs: path -> md5, which ends in .dir for a folder. params: the keys of
    params.yaml by full name.
    """

    deps: dict[str, str]
    outs: dict[str, str]
    params: dict[str, Any]


def read_dvc_lock(path: Path = DVC_LOCK) -> dict[str, Stage]:
    """Name of the stage -> its entry. Raises FileNotFoundError, or ValueError if the file is not a dvc.lock."""
    try:
        return parse_dvc_lock(path.read_bytes(), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: 'dvc repro' writes it") from None


def parse_dvc_lock(content: bytes, path: Path) -> dict[str, Stage]:
    """The content of a dvc.lock. Raises ValueError that names the path if it is not the content of a dvc.lock."""
    try:
        stages = YAML(typ="safe").load(content.decode("utf-8"))["stages"]
        return {name: Stage(deps={dep["path"]: dep["md5"] for dep in stage.get("deps", ())},
                            outs={out["path"]: out["md5"] for out in stage.get("outs", ())},
                            params=dict(stage.get("params", {}).get("params.yaml", {})))
                for name, stage in stages.items()}
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no dvc.lock ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                         "'git checkout' brings it back") from None


@contextmanager
def preserved_dvc_lock(path: Path = DVC_LOCK) -> Iterator[None]:
    """Restores dvc.lock if DVC empties it: DVC writes the file in place, so a full disk leaves an empty file."""
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
    """Path -> md5 of the outs of all stages."""
    return {path: md5 for stage in stages.values() for path, md5 in stage.outs.items()}


def md5_of(path: Path) -> str:
    """The md5 by which DVC knows a file, or a folder (with .dir at its end)."""
    if path.is_dir():
        listing = [{"md5": md5, "relpath": name} for name, md5 in md5_of_files(path).items()]
        return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_of_files(folder: Path) -> dict[str, str]:
    """Relative path -> md5 of every file below the folder that DVC counts, in DVC's order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"
                   and not {"__pycache__", ".gitignore"} & {*path.relative_to(folder).parts})
    return {path.relative_to(folder).as_posix(): md5_of(path) for path in files}


def files_of(md5: str, cache: Path) -> dict[str, str]:
    """Relative path -> md5 of the files in a `.dir`, as the cache lists them. The md5 of a file gives that file, under
    an empty path.

    Raises FileNotFoundError if the cache has no such listing, ValueError if it was damaged.
    """
    if not md5.endswith(".dir"):
        return {"": md5}
    path = _object(cache, md5)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: it lists the files of {md5}; 'dvc pull', after a 'dvc push' on the "
                                "machine that made them")
    if md5_of(path) != md5.removesuffix(".dir"):
        raise ValueError(f"{path}: its bytes are not those of its name, so it was damaged: delete it, then 'dvc pull'")
    return {item["relpath"]: item["md5"] for item in json.loads(path.read_text(encoding="utf-8"))}


def restore_outs(stage: str, *, project: Path = Path()) -> list[Path]:
    """Restores the outs of the stage's last run that the workspace lacks. Returns their paths.

    DVC removes them before it runs the stage, so without this a run that fails would leave nothing. The files are hard
    links to DVC's cache, or copies where the cache is on another file system. An out that dvc.lock or the cache does
    not have is left out.
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
    """The outs that dvc.lock names for the stage and the cache does not have, including those with `cache: false`.

    When the disk is full after a stage has run, DVC prints an error, writes dvc.lock and ends with status 0.
    """
    outs = _locked_outs(stage, project)
    cache = cache_of(project) if outs else project
    if not (cache / "files/md5").is_dir():  # DVC's settings outside the project name another cache
        return []
    return [Path(path) for path, md5 in outs.items() if not _cached_files(md5, cache)]


def _locked_outs(stage: str, project: Path) -> dict[str, str]:
    stages = read_dvc_lock(project / DVC_LOCK) if (project / DVC_LOCK).exists() else {}
    return stages[stage].outs if stage in stages else {}


def _cached_files(md5: str, cache: Path) -> dict[str, str]:
    """Relative path -> md5 of the file, or of every file of the folder; empty if the cache lacks any of them."""
    try:
        files = files_of(md5, cache)
    except (FileNotFoundError, ValueError):  # a damaged listing is of as little use as an absent one
        return {}
    return files if all(_object(cache, file_md5).exists() for file_md5 in files.values()) else {}


def fetch(md5: str, target: Path, *, project: Path = Path()) -> Path:
    """Copies the file or folder of this md5 from the project's cache, or else from its default remote, to `target`.

    `target` is complete or absent, and the md5 of every file is computed again, because DVC trusts the name of a cache
    file. Raises ValueError that names each file which is missing or damaged; FileNotFoundError if `project` is not a
    DVC project.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: name a place where nothing is")
    config = _config(project)
    target.parent.mkdir(parents=True, exist_ok=True)
    # 'dvc pull' runs in a project of its own.
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
            raise ValueError(f"{md5}: {'; '.join(problems[:_SHOWN])}{more}{complaint}. If no remote has it: "
                             "'dvc push' on the machine that made it")
        out.rename(target)
    return target


def _problems(md5: str, out: Path, cache: Path) -> list[str]:
    """One line for each file that is missing or whose bytes are not those of its md5."""
    try:
        files = files_of(md5, cache)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    problems = []
    for name, file_md5 in files.items():
        path, cached = out / name, _object(cache, file_md5)
        if path.exists() and (actual := md5_of(path)) != file_md5:
            problems.append(f"{name or cached} is damaged: md5 {actual}, must be {file_md5}: delete {cached}, then "
                            "'dvc pull'")
        elif not path.exists() and not cached.exists():  # without one file DVC writes no file of the folder
            problems.append(f"{name or 'it'} is missing: neither cache nor remote has {file_md5}")
    return problems or ([] if out.exists() else ["DVC did not lay it out"])


def _object(cache: Path, md5: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5):
        raise ValueError(f"'{md5}' is no md5 of DVC: 32 hexadecimal digits, and .dir for a folder")
    return cache / "files/md5" / md5[:2] / md5[2:]


# --- the project's settings ------------------------------------------------------------------------------------------


def _config(project: Path) -> configparser.RawConfigParser:
    """.dvc/config and .dvc/config.local with absolute paths, so that another project has the same cache and remotes."""
    home = (project / ".dvc").absolute()
    if not home.is_dir():
        raise FileNotFoundError(f"{home} not found: nothing is kept by digest here; run this in the project's folder")
    config = configparser.RawConfigParser(strict=False)
    config.optionxform = str  # type: ignore[assignment, method-assign]
    config.read_dict({"cache": {"dir": str(home / "cache")}})
    config.read([home / "config", home / "config.local"], encoding="utf-8")
    for section in config.sections():
        for key, value in config.items(section):
            path = home / value.strip("\"'")
            if "://" not in value and (key in ("url", "dir") or ("/" in value and path.exists())):
                config.set(section, key, os.path.normpath(path))
    # Links would let a change of the copy change the cache.
    config.read_dict({"core": {"no_scm": "true"}, "cache": {"type": '"reflink,copy"'}})
    return config


def cache_of(project: Path = Path()) -> Path:
    """The folder of the project's DVC cache. Raises FileNotFoundError if `project` is not a DVC project."""
    return project / _config(project).get("cache", "dir")


def _without_secrets(text: str, config: configparser.RawConfigParser) -> str:
    """Hides user, password and query of addresses, and every value of a remote's settings that may be a secret."""
    for section in config.sections():
        for key, value in config.items(section):
            if section.startswith("'remote") and key not in _PUBLIC and len(value) > 3:
                text = text.replace(value.strip("\"'"), "***")
    return re.sub(r"\?\S+", "?***", re.sub(r"//[^/@\s]+@", "//***@", text))
