"""What git has committed. A folder without git is no error; a repository that git refuses to read is one."""

from __future__ import annotations

from pathlib import Path

from onediff import git

NO_GIT, NO_COMMIT = "no git", "no commit"


def head(root: Path = Path()) -> str:
    """The commit that holds the project's folder, NO_COMMIT for a repository without one, else NO_GIT.

    Raises ValueError with git's message if git refuses to read the repository, for example because of its owner.
    """
    commit = git.head(root)
    if commit is None:
        return NO_COMMIT if (root / ".git").exists() else NO_GIT
    return commit


def committed_text(path: Path, root: Path = Path()) -> bytes | None:
    """The bytes of the file in the commit, or None if there is no commit or the commit does not have the file."""
    if git.head(root) is None or not git.git("ls-tree", "HEAD", "--", path.as_posix(), root=root):
        return None
    return git.git_bytes("show", f"HEAD:./{path.as_posix()}", root=root)


def is_committed(path: Path, root: Path = Path()) -> bool:
    """Whether the commit of the project in `root` has the file with these bytes; False without git. Line ends do not
    count.

    The bytes themselves are compared, because `git update-index` and filters can hide a change from git.
    """
    place, project = path.absolute(), root.absolute()
    if not place.is_relative_to(project):
        return False
    committed = committed_text(place.relative_to(project), root)
    return committed is not None and _unix(committed) == _unix(path.read_bytes())


def _unix(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n")
