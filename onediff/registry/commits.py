"""What git has committed. A folder without git is an answer; a repository that git refuses to read is an error."""

from __future__ import annotations

from pathlib import Path

from onediff import git

NO_GIT, NO_COMMIT = "no git", "no commit"


def head(root: Path = Path()) -> str:
    """The commit that holds the project's folder, NO_COMMIT for a repository without one, else NO_GIT.

    Raises ValueError in git's words for a repository that it does not read, such as one of another owner.
    """
    commit = git.head(root)
    if commit is None:
        return NO_COMMIT if (root / ".git").exists() else NO_GIT
    return commit


def committed_text(path: Path, root: Path = Path()) -> bytes | None:
    """The file of the commit, or None if the commit has none of this name or there is no commit."""
    if git.head(root) is None or not git.git("ls-tree", "HEAD", "--", path.as_posix(), root=root):
        return None
    return git.git_bytes("show", f"HEAD:./{path.as_posix()}", root=root)


def is_committed(path: Path) -> bool:
    """Whether a file's bytes are those of the commit; False without git. What the index says does not count:
    `git update-index` can hide a change from `git status`.
    """
    if git.head(path.parent) is None:
        return False
    entry = git.git("ls-tree", "HEAD", "--", path.name, root=path.parent).split()  # mode, type, blob, name
    return len(entry) > 2 and entry[2] == git.git("hash-object", path.name, root=path.parent)
