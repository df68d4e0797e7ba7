"""Runs git commands and reads what a checkout holds. A folder without git is no error; if git refuses a command, the
error quotes git's message.

`python -m onediff.git` sets DVC up for a folder with or without git.
"""

import configparser
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

CURE = "'git init && git add . && git commit -m start' puts it under git"
_ENV = {"GIT_TERMINAL_PROMPT": "0", "GIT_NO_REPLACE_OBJECTS": "1"}  # "git replace" shows other files than a commit has


def git(*arguments: str, root: Path = Path(), env: Mapping[str, str] | None = None) -> str:
    """The output of `git ARGUMENTS` in the folder, without the last line break. Raises ValueError in git's words."""
    return git_bytes(*arguments, root=root, env=env).decode().rstrip("\n")


def git_bytes(*arguments: str, root: Path = Path(), env: Mapping[str, str] | None = None) -> bytes:
    """The output of `git ARGUMENTS` in the folder. Raises ValueError in git's words."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False,
                          env={**os.environ, **_ENV, **(env or {})})
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout


def git_paths(*arguments: str, root: Path = Path()) -> list[str]:
    """The paths that `git ARGUMENTS` prints, also those with spaces or letters outside ASCII."""
    return list(filter(None, git(arguments[0], "-z", *arguments[1:], root=root).split("\0")))


def head(root: Path = Path()) -> str | None:
    """The commit that is checked out, if it holds this folder. None for a folder without git, before the first commit,
    and for a folder inside another project's checkout.

    Raises ValueError in git's words if git refuses to read the checkout, as it does for another owner's.
    """
    try:
        done = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD:./"], cwd=root, capture_output=True,
                              text=True, check=False,
                              env={**os.environ, **_ENV, "LC_ALL": "C"})  # the message is compared below
    except FileNotFoundError:  # git is not installed
        return None
    if done.returncode == 1 or "not a git repository (or any" in done.stderr:
        return None
    if done.returncode:
        raise ValueError(f"git: {' '.join(done.stderr.split())}")
    return git("rev-parse", "HEAD", root=root)


def current_branch(root: Path = Path()) -> str:
    """The branch that is checked out; empty if there is none."""
    return git("branch", "--show-current", root=root) if head(root) else ""


def committed(path: Path, root: Path = Path()) -> bytes | None:
    """The bytes of the file in the commit, or None if there is no commit or the commit does not have the file."""
    if head(root) is None or not git("ls-tree", "HEAD", "--", path.as_posix(), root=root):
        return None
    return git_bytes("show", f"HEAD:./{path.as_posix()}", root=root)


def is_committed(path: Path) -> bool:
    """Whether the commit of the project in this folder has the file with these bytes. Line ends do not count.

    The bytes themselves are compared, because `git update-index` and filters can hide a change from git.
    """
    project, place = Path.cwd(), path.absolute()
    content = committed(place.relative_to(project)) if place.is_relative_to(project) else None
    return content is not None and content.replace(b"\r\n", b"\n") == path.read_bytes().replace(b"\r\n", b"\n")


def changed_files(root: Path = Path()) -> list[str]:
    """The files that differ from the commit: changed files, untracked code, and files whose changes git overlooks or
    hides by a filter. dvc.lock and data do not count, because the pipeline writes them.
    """
    if head(root) is None:
        return []
    outside = ("--", ".", ":!dvc.lock", ":!data")
    changed = git_paths("diff", "--relative", "--name-only", "HEAD", *outside, root=root)
    untracked = git_paths("ls-files", "--others", "--exclude-standard", "--", "onediff/*.py", "flows/*.py", root=root)
    overlooked = [line[2:] for line in git_paths("ls-files", "-v", *outside, root=root)
                  if (line[0].islower() or line[0] == "S") and (root / line[2:]).exists()]
    code = git_paths("ls-files", "--", "*.py", "*.yaml", root=root)
    # The output of check-attr repeats: path, "filter", value.
    attributes = git_paths("check-attr", "filter", "--", *code, root=root) if code else []
    hidden = [path for path, value in zip(attributes[::3], attributes[2::3], strict=True)
              if value not in ("unspecified", "unset") and (root / path).exists()
              and (root / path).read_bytes() != git_bytes("show", f":./{path}", root=root)]
    return list(dict.fromkeys([*changed, *untracked, *overlooked, *hidden]))


def configure_dvc(root: Path = Path()) -> None:
    """Sets core.no_scm in .dvc/config.local of a folder without git, which DVC refuses otherwise; removes it with git.

    With git it must go, because `dvc gc --all-branches` would take the data of other branches for unused.
    """
    local = root / ".dvc/config.local"
    if not local.parent.is_dir():
        return
    config = configparser.RawConfigParser()
    config.read(local, encoding="utf-8")
    no_scm = config.getboolean("core", "no_scm", fallback=False)
    has_git = any((folder / ".git").exists() for folder in (root.absolute(), *root.absolute().parents))
    if no_scm == has_git:
        change = ("--unset", "core.no_scm") if has_git else ("core.no_scm", "true")
        subprocess.run([sys.executable, "-m", "dvc", "config", "--quiet", "--local", *change], cwd=root, check=True)


if __name__ == "__main__":
    configure_dvc()
