"""Run git commands and read the state of the checkout. The project also works in a folder without git.

If a git command fails, the error quotes the message of git. `python -m onediff.git` configures DVC for a folder with
or without git.
"""

import configparser
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

CURE = "'git init && git add . && git commit -m start' creates a git repository with a first commit"
# GIT_NO_REPLACE_OBJECTS disables "git replace", with which git shows other content than a commit really contains.
_ENV = {"GIT_TERMINAL_PROMPT": "0", "GIT_NO_REPLACE_OBJECTS": "1"}


def git(*arguments: str, root: Path = Path(), env: Mapping[str, str] | None = None) -> str:
    """Return the output of a git command in folder `root`, without the last line break.

    Raises ValueError with the message of git if the command fails.
    """
    return git_bytes(*arguments, root=root, env=env).decode().rstrip("\n")


def git_bytes(*arguments: str, root: Path = Path(), env: Mapping[str, str] | None = None) -> bytes:
    """Return the output of a git command in folder `root` as bytes.

    Raises ValueError with the message of git if the command fails.
    """
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False,
                          env={**os.environ, **_ENV, **(env or {})})
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout


def git_paths(*arguments: str, root: Path = Path()) -> list[str]:
    """Return the paths that a git command prints, unquoted even if they contain spaces or non-ASCII letters."""
    return list(filter(None, git(arguments[0], "-z", *arguments[1:], root=root).split("\0")))


def head(root: Path = Path()) -> str | None:
    """Return the hash of the checked-out commit, or None if there is no commit that contains the folder `root`.

    The result is also None if git is not installed. Raises ValueError with the message of git if git refuses to read
    the repository, for example because another user owns it.
    """
    try:
        done = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD:./"], cwd=root, capture_output=True,
                              text=True, check=False,
                              env={**os.environ, **_ENV, "LC_ALL": "C"})  # English messages, compared below
    except FileNotFoundError:  # git is not installed
        return None
    if done.returncode == 1 or "not a git repository (or any" in done.stderr:
        return None
    if done.returncode:
        raise ValueError(f"git: {' '.join(done.stderr.split())}")
    return git("rev-parse", "HEAD", root=root)


def current_branch(root: Path = Path()) -> str:
    """Return the name of the checked-out branch, or an empty text if no branch is checked out."""
    return git("branch", "--show-current", root=root) if head(root) else ""


def committed(path: Path, root: Path = Path()) -> bytes | None:
    """Return the content of the file in the checked-out commit, or None if the commit does not contain the file."""
    if head(root) is None or not git("ls-tree", "HEAD", "--", path.as_posix(), root=root):
        return None
    return git_bytes("show", f"HEAD:./{path.as_posix()}", root=root)


def is_committed(path: Path) -> bool:
    """Return whether the file has the same content in the checked-out commit, apart from LF or CRLF line ends.

    The function compares the bytes, because `git update-index` and git filters can hide a change from `git status`.
    """
    project, absolute = Path.cwd(), path.absolute()
    content = committed(absolute.relative_to(project)) if absolute.is_relative_to(project) else None
    return content is not None and content.replace(b"\r\n", b"\n") == path.read_bytes().replace(b"\r\n", b"\n")


def changed_files(root: Path = Path()) -> list[str]:
    """Return the files whose content differs from the checked-out commit, and all untracked Python files.

    The function also finds changes that `git update-index` or a git filter hides from `git status`. dvc.lock and the
    folder data are not included, because the pipeline writes them.
    """
    if head(root) is None:
        return []
    not_data = ("--", ".", ":!dvc.lock", ":!data")
    changed = git_paths("diff", "--relative", "--name-only", "HEAD", *not_data, root=root)
    untracked = git_paths("ls-files", "--others", "--exclude-standard", "--", "onediff/*.py", "flows/*.py", root=root)
    overlooked = [line[2:] for line in git_paths("ls-files", "-v", *not_data, root=root)
                  if (line[0].islower() or line[0] == "S") and (root / line[2:]).exists()]
    code = git_paths("ls-files", "--", "*.py", "*.yaml", root=root)
    # `git check-attr` prints three fields for each file: its path, the word "filter", and the filter of this file.
    attributes = git_paths("check-attr", "filter", "--", *code, root=root) if code else []
    hidden = [path for path, value in zip(attributes[::3], attributes[2::3], strict=True)
              if value not in ("unspecified", "unset") and (root / path).exists()
              and (root / path).read_bytes() != git_bytes("show", f":./{path}", root=root)]
    return list(dict.fromkeys([*changed, *untracked, *overlooked, *hidden]))


def configure_dvc(root: Path = Path()) -> None:
    """Set core.no_scm in .dvc/config.local if the folder `root` is in no git repository; otherwise remove the setting.

    Without git, DVC runs only with this setting. With git, the setting is dangerous, because then
    `dvc gc --all-branches` deletes the data of all other branches.
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
