"""The image and annotation files of a published set, wherever in its folder they lie and however they are called."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from onediff.data.sources.archives import ENDINGS as ARCHIVE_ENDINGS
from onediff.data.sources.archives import unpack_once

IMAGE_ENDINGS = (".png", ".jpeg", ".jpg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")


class Files:
    """An index by name over folders; each folder has a prefix, under which its files are known.

    Memory grows with the number of files (about 200 bytes each), not with their size.
    """

    def __init__(self, roots: list[tuple[str, Path]]) -> None:
        self._roots = roots
        self._images: dict[str, list[tuple[int, str]]] = {}  # stem without leading zeros -> (root, path below it)
        self._others: dict[str, list[tuple[int, str]]] = {}  # file name -> the same
        for number, (_, root) in enumerate(roots):
            for path in _walk(root):
                name = PurePosixPath(path)
                if name.suffix.lower() in IMAGE_ENDINGS:
                    self._images.setdefault(_unpadded(name.stem), []).append((number, path))
                else:
                    self._others.setdefault(name.name, []).append((number, path))

    def find(self, *names: str) -> Path | None:
        """The image of the first name that is there: so called, with another ending, or with its ids padded otherwise.

        Folders in a name are binding ("after/1.png" is never "before/1.png"); none means anywhere.
        Raises ValueError if different images fit equally well.
        """
        return next((path for path in map(self._match, names) if path), None)

    def at(self, name: str) -> Path | None:
        """The file of exactly this path below the folder; a bare name may lie anywhere in it.

        Raises ValueError if different files share the bare name.
        """
        exact = [root / name for _, root in self._roots if (root / name).is_file()]
        if exact or len(PurePosixPath(name).parts) > 1:
            return exact[0] if exact else None
        places = self._images.get(_unpadded(PurePosixPath(name).stem), [])
        found = [path for path in map(self._path, places) if path.name == name]
        return _only(found, name) if found else None

    def named(self, *names: str) -> Path | None:
        """The annotation file of the first name that is there. Raises ValueError if unlike files share the name."""
        for name in names:
            if name in self._others:
                return _only([self._path(place) for place in self._others[name]], name)
        return None

    def require(self, *names: str) -> Path:
        """As `named`. Raises FileNotFoundError if there is none."""
        found = self.named(*names)
        if found is None:
            raise FileNotFoundError(f"{self._roots[0][1]}: no {' or '.join(names)} in it or in its folders: "
                                    "'onediff data status' says what to put where")
        return found

    def all_named(self, name: str) -> list[Path]:
        return [self._path(place) for place in self._others.get(name, [])]

    def ending(self, ending: str) -> list[Path]:
        """Every file, images aside, that ends so, such as ".tsv"."""
        return [path for name in sorted(self._others) if name.endswith(ending) for path in self.all_named(name)]

    def _match(self, name: str) -> Path | None:
        wanted = PurePosixPath(name.replace("\\", "/"))
        stem = wanted.stem if wanted.suffix.lower() in IMAGE_ENDINGS else wanted.name
        folders = wanted.parts[:-1]
        ranked: dict[int, list[Path]] = {}
        for place in self._images.get(_unpadded(stem), []):
            path = self._path(place)
            parents = PurePosixPath(self._roots[place[0]][0], place[1]).parts[:-1]
            if folders == parents[len(parents) - len(folders):]:
                ranked.setdefault(_unlikeness(wanted, path), []).append(path)
        return _only(ranked[min(ranked)], name) if ranked else None

    def _path(self, place: tuple[int, str]) -> Path:
        return self._roots[place[0]][1] / place[1]


def open_files(folder: Path, scratch: Path) -> Files:
    """The folder and what its archives hold, unpacked once below `scratch`; an archive's files stand where it lies.

    Raises FileNotFoundError if there is no such folder, ValueError for an archive that is broken or not safe.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found, or no folder: 'onediff data status' says what to put there")
    roots = [("", folder)]
    for path in _walk(folder):
        if path.lower().endswith(ARCHIVE_ENDINGS):
            prefix = str(PurePosixPath(path).parent)
            roots.append(("" if prefix == "." else prefix, unpack_once(folder / path, scratch / "unpacked")))
    return Files(roots)


def _walk(root: Path) -> Iterator[str]:
    """Paths below root, in order; links to folders are followed, but none twice."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if name != "__MACOSX" and not name.startswith("."))
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        relative = os.path.relpath(folder, root)
        for name in sorted(names):
            if not name.startswith("."):  # ._1.png is a Mac's note about 1.png
                yield name if relative == "." else f"{relative}/{name}"


def _unpadded(stem: str) -> str:
    return _LEADING_ZEROS.sub("", stem)


def _unlikeness(wanted: PurePosixPath, path: Path) -> int:
    """0: the very name; 1: another ending; 2 and 3: the same with ids padded otherwise."""
    ending = wanted.suffix.lower() != path.suffix.lower()
    return 0 if path.name == wanted.name else int(ending) + 2 * int(path.stem not in (wanted.stem, wanted.name))


def _only(paths: list[Path], name: str) -> Path:
    for other in paths[1:]:
        if not filecmp.cmp(paths[0], other, shallow=False):
            raise ValueError(f"{name}: {paths[0]} and {other} both fit and differ: leave only one of them there")
    return paths[0]
