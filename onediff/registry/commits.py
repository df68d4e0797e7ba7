"""What git has committed. A folder without a repository is no error; a repository that git does not read is one."""

from __future__ import annotations

import subprocess
from pathlib import Path

NO_GIT, NO_COMMIT = "no git", "no commit"


def head(root: Path = Path()) -> str:
    """The commit, NO_COMMIT or NO_GIT. Raises ValueError in git's words for a repository that it does not read, such as
    one of another owner.
    """
    if not any((folder / ".git").exists() for folder in (root.absolute(), *root.absolute().parents)):
        return NO_GIT
    _git(root, "rev-parse", "--git-dir")
    return _run(root, "rev-parse", "--verify", "--quiet", "HEAD").stdout.decode().strip() or NO_COMMIT


def committed_text(path: Path, root: Path = Path()) -> bytes | None:
    """The file of the commit, or None if the commit has none of this name or there is no commit."""
    if head(root) in (NO_GIT, NO_COMMIT) or not _git(root, "ls-tree", "HEAD", "--", path.as_posix()):
        return None
    return _git(root, "show", f"HEAD:./{path.as_posix()}")


def is_committed(path: Path) -> bool:
    """Whether a file's bytes are those of the commit; False without git. What the index says does not count:
    `git update-index` can hide a change from `git status`.
    """
    if head(path.parent) in (NO_GIT, NO_COMMIT):
        return False
    entry = _git(path.parent, "ls-tree", "HEAD", "--", path.name).split()  # mode, type, blob, name
    return len(entry) > 2 and entry[2] == _git(path.parent, "hash-object", path.name).strip()


def _git(root: Path, *arguments: str) -> bytes:
    done = _run(root, *arguments)
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[:400]
        raise ValueError(f"git {arguments[0]} in {root.absolute()}: {reason or 'failed'}; 'git status' says what is "
                         "wrong")
    return done.stdout


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        raise ValueError(f"{root.absolute()} is in a git repository, but git is not installed: install it") from None
