"""What DVC keeps, by digest: a file or folder that a dvc.lock names comes out as it was, whatever the workspace holds.

    for name, stage in locked().items(): ...             # digest of every dep and out
    fetch("b3b470bb...dir", Path("scratch/diffcap"))     # from the cache or the default remote, every byte checked

DVC is asked as a command, in a throw-away project that has the cache and the remotes of this one.
"""

from __future__ import annotations

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

LOCK = Path("dvc.lock")
_IGNORED = {"__pycache__", ".gitignore"}
_SHOWN = 3  # files in a message
_PLAIN = ("url", "region", "type", "profile", "version_aware", "worktree")  # what a remote's settings may show


@dataclass(frozen=True)
class Stage:
    """What a stage ran with and left: path -> md5, ending in .dir for a folder; keys of params.yaml by full name."""

    deps: dict[str, str]
    outs: dict[str, str]
    params: dict[str, Any]


def locked(path: Path = LOCK) -> dict[str, Stage]:
    """Stage -> its digests and parameters. Raises FileNotFoundError, or ValueError for what is no dvc.lock."""
    try:
        return parse_lock(path.read_bytes(), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: 'dvc repro' writes it") from None


def parse_lock(content: bytes, path: Path) -> dict[str, Stage]:
    """The content of a dvc.lock. Raises ValueError, naming the path, for what is none."""
    try:
        stages = YAML(typ="safe").load(content.decode("utf-8"))["stages"]
        return {name: Stage(_digests(stage, "deps"), _digests(stage, "outs"),
                            dict(stage.get("params", {}).get("params.yaml", {})))
                for name, stage in stages.items()}
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no dvc.lock ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                         "'git checkout' brings it back") from None


@contextmanager
def lock_kept(path: Path = LOCK) -> Iterator[None]:
    """Brings the old dvc.lock back if DVC spoils it: DVC writes it in place, and a full disk leaves an empty file."""
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


def _digests(stage: Mapping[str, Any], kind: str) -> dict[str, str]:
    return {item["path"]: item["md5"] for item in stage.get(kind, ())}


def outs_of(stages: Mapping[str, Stage]) -> dict[str, str]:
    """Path -> md5 of everything that the stages left."""
    return {path: md5 for stage in stages.values() for path, md5 in stage.outs.items()}


def md5_of(path: Path) -> str:
    """The md5 by which DVC knows a file, or a folder (with .dir at its end)."""
    if path.is_dir():
        listing = [{"md5": md5, "relpath": name} for name, md5 in tree(path).items()]
        return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> md5 of every file below the folder that DVC counts, in its order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"
                   and not _IGNORED & {*path.relative_to(folder).parts})
    return {path.relative_to(folder).as_posix(): md5_of(path) for path in files}


def files_of(md5: str, *, project: Path = Path()) -> dict[str, str]:
    """Relative path -> md5 of the files in a `.dir`, as the cache lists them.

    Raises FileNotFoundError if the cache has no such listing, ValueError if it was damaged.
    """
    return _listing(md5, _cache(project, _config(project)))


def _listing(md5: str, cache: Path) -> dict[str, str]:
    path = _object(cache, md5)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: it lists the files of {md5}; 'dvc pull', after a 'dvc push' on the "
                                "machine that made them")
    if md5_of(path) != md5.removesuffix(".dir"):
        raise ValueError(f"{path}: its bytes are not those of its name, so it was damaged: delete it, then 'dvc pull'")
    return {item["relpath"]: item["md5"] for item in json.loads(path.read_text(encoding="utf-8"))}


def restore_outs(stage: str, *, project: Path = Path()) -> list[Path]:
    """Puts the outs of the stage's last run back where the workspace lacks them; gives their paths.

    DVC removes them before it runs the stage, so without this a run that fails would leave nothing. The files are hard
    links to DVC's cache, or copies where the cache is on another file system. An out that dvc.lock or the cache does
    not have is left out.
    """
    lock = project / LOCK
    outs = locked(lock).get(stage, Stage({}, {}, {})).outs if lock.exists() else {}
    missing = {path: md5 for path, md5 in outs.items() if not os.path.lexists(project / path)}
    cache = _cache(project, _config(project)) if missing else project
    return [Path(path) for path, md5 in missing.items() if _link_out(md5, project / path, cache)]


def uncached_outs(stage: str, *, project: Path = Path()) -> list[Path]:
    """The outs that dvc.lock names for the stage and the cache does not have, those with `cache: false` among them.

    When the disk is full after a stage has run, DVC prints an error, writes dvc.lock and ends with status 0.
    """
    lock = project / LOCK
    outs = locked(lock).get(stage, Stage({}, {}, {})).outs if lock.exists() else {}
    cache = _cache(project, _config(project)) if outs else project
    if not (cache / "files/md5").is_dir():  # DVC's settings outside the project name another cache
        return []
    return [Path(path) for path, md5 in outs.items() if not _cached_files(md5, cache)]


def _cached_files(md5: str, cache: Path) -> dict[str, str]:
    """Relative path -> md5 of the file, or of every file of the folder; empty if the cache lacks any of them."""
    try:
        files = _listing(md5, cache) if md5.endswith(".dir") else {"": md5}
    except (FileNotFoundError, ValueError):  # absent, or damaged: as good as absent
        return {}
    return files if all(_object(cache, digest).exists() for digest in files.values()) else {}


def _link_out(md5: str, out: Path, cache: Path) -> bool:
    """True if the cache had the file or every file of the folder, so that `out` exists now."""
    files = _cached_files(md5, cache)
    if not files:
        return False
    with (new_folder if md5.endswith(".dir") else new_file)(out) as part:
        for name, digest in files.items():
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(_object(cache, digest), target)
    return True


def fetch(md5: str, target: Path, *, project: Path = Path()) -> Path:
    """Brings the file or folder of this md5 out of the project's cache, or else of its default remote, to `target`.

    Whole or not at all, and every file is read again: DVC itself takes a cache file by its name. Raises ValueError
    that names each file which is missing or damaged; FileNotFoundError if `project` is none of DVC's.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: name a place where nothing is")
    config = _config(project)
    cache = _cache(project, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        got = Path(scratch) / "out"
        said = _pull(md5, got, config=config, cache=cache)
        wrong = _wrong(md5, got, cache)
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ValueError(f"{md5}: {'; '.join(wrong[:_SHOWN])}{more}{said}. If no remote has it: "
                             "'dvc push' on the machine that made it")
        got.rename(target)
    return target


def _pull(md5: str, got: Path, *, config: configparser.RawConfigParser, cache: Path) -> str:
    """Asks DVC; gives what it complained of, without secrets."""
    root = got.parent
    (root / ".dvc").mkdir()
    with (root / ".dvc/config").open("w", encoding="utf-8") as file:
        config.write(file)
    (root / "out.dvc").write_text(f"outs:\n- md5: {md5}\n  hash: md5\n  path: {got.name}\n", encoding="utf-8")
    environ = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(root / ".dvc/site")}
    done = subprocess.run([sys.executable, "-m", "dvc", "pull"], cwd=root, env=environ, capture_output=True, text=True,
                          check=False)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines()
             if line.startswith("ERROR") or "remote" in line]
    return f" (dvc: {without_secrets(' '.join(dict.fromkeys(lines)), config)})" if lines else ""


def _wrong(md5: str, got: Path, cache: Path) -> list[str]:
    """Each file that is missing or not what its digest says."""
    if not md5.endswith(".dir"):
        return _amiss({"": md5}, got, cache)
    try:
        return _amiss(_listing(md5, cache), got, cache)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]


def _amiss(files: Mapping[str, str], got: Path, cache: Path) -> list[str]:
    wrong = []
    for name, md5 in files.items():
        path, kept = got / name, _object(cache, md5)
        if path.exists() and (is_now := md5_of(path)) != md5:
            wrong.append(f"{name or kept} is damaged: md5 {is_now}, must be {md5}: delete {kept}, then 'dvc pull'")
        elif not path.exists() and not kept.exists():  # without one file DVC lays out none of the folder
            wrong.append(f"{name or 'it'} is missing: neither cache nor remote has {md5}")
    return wrong or ([] if got.exists() else ["DVC did not lay it out"])


def _object(cache: Path, md5: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5):
        raise ValueError(f"'{md5}' is no md5 of DVC: 32 hexadecimal digits, and .dir for a folder")
    return cache / "files/md5" / md5[:2] / md5[2:]


# --- the project's settings ------------------------------------------------------------------------------------------


def _config(project: Path) -> configparser.RawConfigParser:
    """.dvc/config and .dvc/config.local with paths made absolute: cache and remotes as the project has them."""
    home = (project / ".dvc").absolute()
    if not home.is_dir():
        raise FileNotFoundError(f"{home} not found: nothing is kept by digest here; run this in the project's folder")
    config = configparser.RawConfigParser(strict=False)
    config.optionxform = str  # type: ignore[assignment, method-assign]
    config.read([home / "config", home / "config.local"], encoding="utf-8")
    for section in config.sections():
        for key, value in config.items(section):
            path = home / value.strip("\"'")
            if "://" not in value and (key in ("url", "dir") or ("/" in value and path.exists())):
                config.set(section, key, os.path.normpath(path))
    for section in ("core", "cache"):
        if not config.has_section(section):
            config.add_section(section)
    config.set("core", "no_scm", "true")
    if not config.has_option("cache", "dir"):
        config.set("cache", "dir", str(home / "cache"))
    config.set("cache", "type", '"reflink,copy"')  # a link would let a change of the copy change the cache
    return config


def _cache(project: Path, config: configparser.RawConfigParser) -> Path:
    return project / config.get("cache", "dir")


def without_secrets(text: str, config: configparser.RawConfigParser) -> str:
    """Addresses without user, password and query, and no value that a remote's settings keep to themselves."""
    for section in config.sections():
        for key, value in config.items(section):
            if section.startswith("'remote") and key not in _PLAIN and len(value) > 3:
                text = text.replace(value.strip("\"'"), "***")
    return re.sub(r"\?\S+", "?***", re.sub(r"//[^/@\s]+@", "//***@", text))
