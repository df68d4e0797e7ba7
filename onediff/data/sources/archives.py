"""Archives of published data, unpacked without trust in what they say."""

import contextlib
import functools
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from pathlib import Path, PurePosixPath
from typing import IO

from onediff.data.record import digest

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_FILES = 5_000_000
_CHUNK = 1 << 20
_PLAIN = (0, stat.S_IFREG, stat.S_IFDIR)
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
# (name, how to open it or None for a folder, whether it is a link or a device) of a member
Member = tuple[str, Callable[[], IO[bytes] | None] | None, bool]


def unpack(archive: Path, folder: Path, *, max_bytes: int, max_files: int) -> list[Path]:
    """All its files into the new folder, or nothing at all; returns them in order.

    Raises ValueError for a broken archive, one with an absolute path, "..", a link, a device or a name twice, and one
    that is larger than allowed, counted while writing; FileExistsError if the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is already there: remove it to unpack {archive} again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as temporary:
        target = Path(temporary) / "files"
        target.mkdir()
        try:
            names = _write(archive, target, max_bytes=max_bytes, max_files=max_files)
        except _BROKEN as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{archive}: broken or not a whole archive ({reason}); get it again") from None
        except RuntimeError as error:  # zipfile's word for a password
            raise ValueError(f"{archive}: cannot be read ({error}); unpack it yourself") from None
        target.rename(folder)
    return [folder / name for name in names]


def unpack_once(archive: Path, folder: Path) -> Path:
    """The archive's files below folder/<digest of its path, size and time>, unpacked when first asked for.

    At most 20 times the archive's size and 1 GiB, and what the disk can hold. Raises ValueError as `unpack`.
    """
    facts = archive.stat()
    target = folder / digest(f"{archive.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
        unpack(archive, target, max_bytes=min(room, 20 * facts.st_size + 2**30), max_files=MAX_FILES)
    return target


def _write(archive: Path, target: Path, *, max_bytes: int, max_files: int) -> list[str]:
    names: list[str] = []
    total = 0
    with contextlib.closing(_members(archive)) as members:
        for name, opened, special in members:
            if special:
                raise ValueError(f"{archive}: the member {name!r} is a link or a device; unpack it yourself if you "
                                 "trust it")
            path = PurePosixPath(name.replace("\\", "/"))
            if "\0" in name or path.is_absolute() or ".." in path.parts or name[1:2] == ":":
                raise ValueError(f"{archive}: the member {name!r} would be written outside its folder; do not trust "
                                 "this file")
            source = opened() if opened else None
            if source is None:
                continue
            names.append(str(path))
            if len(names) > max_files:
                raise ValueError(f"{archive}: more than {max_files} files; unpack it yourself if that is right")
            try:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                file = (target / path).open("xb")
            except (FileExistsError, NotADirectoryError):
                raise ValueError(f"{archive}: holds '{path.name}' twice; unpack it yourself") from None
            with source, file:
                while content := source.read(_CHUNK):
                    total += len(content)
                    if total > max_bytes:
                        raise ValueError(f"{archive}: unpacked it is larger than {max_bytes} bytes: a bomb, or a disk "
                                         "too small; unpack it yourself if that is right")
                    file.write(content)
    return names


def _members(archive: Path) -> Generator[Member, None, None]:
    """Each member, in order. Raises ValueError for a file that is no archive."""
    name = archive.name.lower()
    if not name.endswith(ENDINGS):
        raise ValueError(f"{archive}: {', '.join(ENDINGS)} can be unpacked; unpack it yourself")
    if name.endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                special = stat.S_IFMT(info.external_attr >> 16) not in _PLAIN
                yield info.filename, None if info.is_dir() else functools.partial(packed.open, info), special
        return
    with tarfile.open(archive, "r|*") as stream:  # one pass, whatever the size
        for member in stream:
            yield member.name, functools.partial(stream.extractfile, member), not (member.isreg() or member.isdir())
            stream.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
