"""Unpacks zip and tar archives of published data safely, even if an archive is broken or malicious."""

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
_UTF8 = 0x800  # the bit of a zip archive that marks a file name in UTF-8
_PLAIN = (0, stat.S_IFREG, stat.S_IFDIR)
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
# An archive member as (name, function that opens the file, whether the member is a link or a device).
# For a folder, the function is None or returns None.
Member = tuple[str, Callable[[], IO[bytes] | None] | None, bool]


def unpack(archive: Path, folder: Path, *, max_bytes: int, max_files: int) -> list[Path]:
    """Unpack all files of the archive into a new folder and return their paths in the order of the archive.

    If an error occurs, the folder is not created. Raises ValueError if the archive is broken, if it contains an
    absolute path, "..", a link, a device or two files with one path, or if the unpacked files exceed `max_bytes` or
    `max_files`. Raises FileExistsError if the folder already exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} already exists: remove it, if you want to unpack {archive} again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as temporary:
        target = Path(temporary) / "files"
        target.mkdir()
        try:
            names = _write(archive, target, max_bytes=max_bytes, max_files=max_files)
        except _BROKEN as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{archive}: broken or incomplete archive ({reason}); download it again") from None
        except RuntimeError as error:  # zipfile raises RuntimeError if the archive needs a password.
            raise ValueError(f"{archive}: the archive cannot be read ({error}); unpack it by hand") from None
        target.rename(folder)
    return [folder / name for name in names]


def unpack_once(archive: Path, folder: Path) -> Path:
    """Unpack the archive below `folder`, unless an earlier call did so, and return the folder of the unpacked files.

    The returned folder is folder/<digest>; the digest depends on the archive's path, size and modification time. The
    unpacked files may have at most 20 times the archive's size plus 1 GiB, and must fit on the disk. Raises ValueError
    for the reasons that `unpack` lists.
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
                raise ValueError(f"{archive}: must contain only files and folders, but the member {name!r} is a link "
                                 "or a device; unpack the archive by hand if you trust it")
            path = PurePosixPath(name.replace("\\", "/"))
            if "\0" in name or path.is_absolute() or ".." in path.parts or name[1:2] == ":":
                raise ValueError(f"{archive}: the member {name!r} would be written outside the target folder; do not "
                                 "trust this archive")
            source = opened() if opened else None
            if source is None:
                continue
            names.append(str(path))
            if len(names) > max_files:
                raise ValueError(f"{archive}: contains more than {max_files} files; if this is correct, unpack the "
                                 "archive by hand")
            try:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                file = (target / path).open("xb")
            except (FileExistsError, NotADirectoryError):
                raise ValueError(f"{archive}: contains the file name '{path.name}' twice in one folder; unpack the "
                                 "archive by hand") from None
            with source, file:
                while content := source.read(_CHUNK):
                    total += len(content)
                    if total > max_bytes:
                        raise ValueError(f"{archive}: the unpacked files are larger than {max_bytes} bytes: free some "
                                         "disk space, or unpack the archive by hand if this size is correct")
                    file.write(content)
    return names


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return the path of a file in a zip archive.

    macOS writes names in UTF-8 without the mark for UTF-8, so zipfile reads them as code page 437.
    """
    if not info.flag_bits & _UTF8:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _members(archive: Path) -> Generator[Member, None, None]:
    """Yield each member of the archive in order. Raises ValueError if the file is not a supported archive."""
    name = archive.name.lower()
    if not name.endswith(ENDINGS):
        raise ValueError(f"{archive}: only archives that end in {', '.join(ENDINGS)} can be unpacked; unpack this "
                         "archive by hand")
    if name.endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                special = stat.S_IFMT(info.external_attr >> 16) not in _PLAIN
                yield _zip_name(info), None if info.is_dir() else functools.partial(packed.open, info), special
        return
    with tarfile.open(archive, "r|*") as stream:  # The mode "r|*" reads the archive only once, as a stream.
        for member in stream:
            yield member.name, functools.partial(stream.extractfile, member), not (member.isreg() or member.isdir())
            # Clear the list in which tarfile keeps every member that was read, so that memory use does not grow.
            stream.members = []  # type: ignore[attr-defined]
