"""A published set as its folder holds it: the files by name, wherever they lie, and the pairs that a reader gives."""

import filecmp
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from onediff.data.record import SPLITS, Record, digest
from onediff.data.sources.archives import ENDINGS as ARCHIVE_ENDINGS
from onediff.data.sources.archives import unpack_once
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

NO_TYPE, GENERAL = "unlabelled", "general"
OFFICIAL_SPLITS = ("train", "val", "test")
IMAGE_ENDINGS = (".png", ".jpeg", ".jpg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
_Place = tuple[int, str]  # number of the folder, path below it


class Files:
    """An index by name over folders; each folder has a prefix, under which its files are known.

    Memory grows with the number of files (about 200 bytes each), not with their size.
    """

    def __init__(self, roots: list[tuple[str, Path]]) -> None:
        self._roots = roots
        self._images: dict[str, list[_Place]] = defaultdict(list)  # by stem without leading zeros
        self._others: dict[str, list[_Place]] = defaultdict(list)  # by file name
        for number, (_, root) in enumerate(roots):
            for path in _walk(root):
                name = PurePosixPath(path)
                is_image = name.suffix.lower() in IMAGE_ENDINGS
                places = self._images[_unpadded(name.stem)] if is_image else self._others[name.name]
                places.append((number, path))

    def find(self, *names: str) -> Path | None:
        """The image of the first name that is there: so called, with another ending, or with its ids padded otherwise.

        Folders in a name are binding ("after/1.png" is never "before/1.png"); none means anywhere.
        Raises ValueError if different images fit equally well.
        """
        for name in names:
            published = PurePosixPath(name.replace("\\", "/"))
            stem = published.stem if published.suffix.lower() in IMAGE_ENDINGS else published.name
            folders = published.parts[:-1]
            ranked: dict[int, list[Path]] = defaultdict(list)
            for place in self._images.get(_unpadded(stem), []):
                parents = PurePosixPath(self._roots[place[0]][0], place[1]).parts[:-1]
                if folders == parents[len(parents) - len(folders):]:
                    ranked[_unlikeness(published, self._path(place))].append(self._path(place))
            if ranked:
                return _only(ranked[min(ranked)], name)
        return None

    def at(self, name: str) -> Path | None:
        """The file of exactly this path below the folder; a bare name may lie anywhere in it.

        Raises ValueError if different files share the bare name.
        """
        exact = next((root / name for _, root in self._roots if (root / name).is_file()), None)
        if exact or len(PurePosixPath(name).parts) > 1:
            return exact
        paths = map(self._path, self._images.get(_unpadded(PurePosixPath(name).stem), []))
        return _only([path for path in paths if path.name == name], name)

    def named(self, *names: str) -> Path | None:
        """The annotation file of the first name that is there. Raises ValueError if unlike files share the name."""
        return next((_only(self.all_named(name), name) for name in names if name in self._others), None)

    def require(self, *names: str) -> Path:
        """As `named`. Raises FileNotFoundError if there is none."""
        path = self.named(*names)
        if path is None:
            raise FileNotFoundError(f"{self._roots[0][1]}: no {' or '.join(names)} in it or in its folders: "
                                    "'onediff data status' says what to put where")
        return path

    def by_split(self, annotations: dict[str, tuple[str, ...]]) -> dict[str, Path]:
        """The annotation file of each split, by the names that it may have. Raises FileNotFoundError if none is there.
        """
        paths = {split: path for split, names in annotations.items() if (path := self.named(*names))}
        if not paths:
            self.require(*(names[0] for names in annotations.values()))
        return paths

    def all_named(self, name: str) -> list[Path]:
        return [self._path(place) for place in self._others.get(name, [])]

    def ending(self, ending: str) -> list[Path]:
        """Every file, images aside, that ends so, such as ".tsv"."""
        return [path for name in sorted(self._others) if name.endswith(ending) for path in self.all_named(name)]

    def _path(self, place: _Place) -> Path:
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


def _unlikeness(published: PurePosixPath, path: Path) -> int:
    """0: the very name; 1: another ending; 2 and 3: the same with ids padded otherwise."""
    ending = published.suffix.lower() != path.suffix.lower()
    return 0 if path.name == published.name else ending + 2 * (path.stem not in (published.stem, published.name))


def _only(paths: list[Path], name: str) -> Path | None:
    """The first path; None if there is none. Raises ValueError if the files differ."""
    for other in paths[1:]:
        if not filecmp.cmp(paths[0], other, shallow=False):
            raise ValueError(f"{name}: {paths[0]} and {other} both fit and differ: leave only one of them there")
    return paths[0] if paths else None


@dataclass(frozen=True)
class PublishedPair:
    """One pair (or single image, or text) of a published set.

    `names` are its images as published; `sought` names under which each may lie, where those differ. `num_records`
    official entries were merged into it and `num_empty` empty sentences were set aside. `split` is None where only the
    published one is known. `exact`: the images are called as they are named, with no other ending or padding.
    """

    official_id: str
    official_split: str
    names: tuple[str, ...]
    references: list[str]
    group: str
    change_type: str = NO_TYPE
    instruction: str = DEFAULT_INSTRUCTION
    provenance: dict[str, Any] = field(default_factory=dict)
    sought: tuple[tuple[str, ...], ...] = ()
    num_records: int = 1
    num_empty: int = 0
    split: str | None = None
    exact: bool = False

    def locate(self, files: Files) -> list[Path | None]:
        """Where each image lies; None: nowhere."""
        if self.exact:
            return [files.at(name) for name in self.names]
        paths = [files.find(*names) for names in self.sought or [(name,) for name in self.names]]
        if not self.sought and len(paths) == 2 and paths[0] == paths[1] and self.names[0] != self.names[1]:
            # "a.png" is not there, and "a.jpg", the other image of the pair, was matched instead of it.
            return [path if path and path.name == Path(name).name else None
                    for path, name in zip(paths, self.names, strict=True)]
        return paths


def split_of(source: str, pair: PublishedPair) -> str:
    """The published split; published val is halved into val and gate by digest, so that a group stays together."""
    if pair.split is None and pair.official_split == "val":
        return ("val", "gate")[int(digest(f"{source}-{pair.group}".encode()), 16) % 2]
    return pair.split or pair.official_split


def to_record(source: str, pair: PublishedPair, files: Files) -> Record:
    """Reads the images. One that is not there is empty, and provenance["missing"] names it.

    A val or test pair whose every sentence is empty keeps one of them: papers score it so, and no pair may vanish.
    """
    paths = pair.locate(files)
    before, after, *_ = [*(path.read_bytes() if path else b"" for path in paths), b"", b""]
    provenance: dict[str, Any] = {"official_id": pair.official_id, "official_split": pair.official_split,
                                  "names": list(pair.names)}
    provenance |= pair.provenance
    missing = [name for name, path in zip(pair.names, paths, strict=True) if path is None]
    provenance |= {"missing": missing} if missing else {}
    provenance |= {"empty_references": pair.num_empty} if pair.num_empty else {}
    split = split_of(source, pair)
    assert split in SPLITS, f"{source}: split '{split}' is none of {SPLITS}"
    as_published = [""] if pair.num_empty and split != "train" and not pair.exact else []
    return Record(pair_id=f"{source}-{pair.official_split}-{pair.official_id}", source=source, split=split,
                  group_id=f"{source}-{pair.group}", before=before, after=after,
                  references=pair.references or as_published, instruction=pair.instruction,
                  change_type=pair.change_type, provenance=provenance, num_images=len(pair.names))
