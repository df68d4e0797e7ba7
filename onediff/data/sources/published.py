"""Finds the files of a published data set by name in any folder layout, and converts the pairs to records."""

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
from onediff.files import nfc
from onediff.inputs.formats import IMAGE_ENDINGS
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

NO_TYPE = "unlabelled"
OFFICIAL_SPLITS = ("train", "val", "test")
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
_Place = tuple[int, str]  # the index of a root folder in the list of roots, and a file path below this root


class Files:
    """An index of all files in several root folders, by file name.

    A root is the folder of a data set, or the folder of an unpacked archive. Each root has a prefix, the folder in
    which its files seem to be: for an unpacked archive, this is the folder that contains the archive. Names count as
    equal if they differ only in how accents are encoded (Unicode forms NFC and NFD). The index needs about 200 bytes of
    memory per file.
    """

    def __init__(self, roots: list[tuple[str, Path]]) -> None:
        self._roots = roots
        self._images: dict[str, list[_Place]] = defaultdict(list)  # the key is a name without ending and leading zeros
        self._others: dict[str, list[_Place]] = defaultdict(list)  # the key is the file name
        for number, (_, root) in enumerate(roots):
            for path in _walk(root):
                name = PurePosixPath(path)
                is_image = name.suffix.lower() in IMAGE_ENDINGS
                places = self._images[_key(name.stem)] if is_image else self._others[nfc(name.name)]
                places.append((number, path))

    def find(self, *names: str) -> Path | None:
        """Try the names in order, and return the first image file that matches a name, or None if no file matches.

        A file matches a name even if the file has another image ending (1.jpg for 1.png) or other leading zeros
        (0001.png for 1.png); the most similar file wins. Folders in a name must match ("after/1.png" never matches
        "before/1.png"); a name without folders matches files in any folder. Raises ValueError if files with different
        content match equally well.
        """
        for name in names:
            published = PurePosixPath(nfc(name).replace("\\", "/"))
            stem = published.stem if published.suffix.lower() in IMAGE_ENDINGS else published.name
            folders = published.parts[:-1]
            ranked: dict[int, list[Path]] = defaultdict(list)
            for place in self._images.get(_key(stem), []):
                parents = PurePosixPath(nfc(self._roots[place[0]][0]), nfc(place[1])).parts[:-1]
                if folders == parents[len(parents) - len(folders):]:
                    ranked[_unlikeness(published, self._path(place))].append(self._path(place))
            if ranked:
                return _only(ranked[min(ranked)], name)
        return None

    def at(self, name: str) -> Path | None:
        """Return the image file with exactly this path, or None. A name without folders matches a file in any folder.

        Raises ValueError if several files with different content have this name.
        """
        exact = next((root / name for _, root in self._roots if (root / name).is_file()), None)
        wanted, places = nfc(name), self._images.get(_key(PurePosixPath(name).stem), [])
        paths = [self._path(place) for place in places if nfc(place[1]) == wanted]
        if exact:
            paths = [exact, *(path for path in paths if path != exact and nfc(str(path)) == nfc(str(exact)))]
        elif len(PurePosixPath(name).parts) == 1:
            paths = [self._path(place) for place in places if nfc(PurePosixPath(place[1]).name) == wanted]
        return _only(paths, name)

    def named(self, *names: str) -> Path | None:
        """Return the annotation file with the first of `names` that exists, or None if none of them exists.

        Raises ValueError if several files have this name but different content.
        """
        return next((_only(self.all_named(name), name) for name in names if nfc(name) in self._others), None)

    def require(self, *names: str) -> Path:
        """Return the annotation file with the first of `names` that exists. Raises FileNotFoundError if none exists."""
        path = self.named(*names)
        if path is None:
            raise FileNotFoundError(f"{self._roots[0][1]}: must contain {' or '.join(names)}, directly or in a "
                                    "sub-folder: 'onediff data status' explains where to get the files")
        return path

    def by_split(self, annotations: dict[str, tuple[str, ...]]) -> dict[str, Path]:
        """Return a dict from each split that has an annotation file to the path of this file.

        `annotations` lists the possible file names of each split. Raises FileNotFoundError if no split has a file.
        """
        paths = {split: path for split, names in annotations.items() if (path := self.named(*names))}
        if not paths:
            self.require(*(names[0] for names in annotations.values()))
        return paths

    def all_named(self, name: str) -> list[Path]:
        """Return all files, except images, that have this name, in any folder."""
        return [self._path(place) for place in self._others.get(nfc(name), [])]

    def ending(self, ending: str) -> list[Path]:
        """Return all files, except images, whose name ends with `ending`, such as ".tsv"."""
        return [path for name in sorted(self._others) if name.endswith(ending) for path in self.all_named(name)]

    def _path(self, place: _Place) -> Path:
        return self._roots[place[0]][1] / place[1]


def open_files(folder: Path, scratch: Path) -> Files:
    """Return an index of the files in the folder and in its archives.

    Archives are unpacked once below `scratch`; the index treats their files as if they were in the folder that
    contains the archive. Raises FileNotFoundError if the folder does not exist, and ValueError if an archive is broken
    or not safe to unpack.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist or is not a folder: give the folder that contains your "
                                "images and pairs.csv; docs/own-pairs.md shows an example")
    roots = [("", folder)]
    for path in _walk(folder):
        if path.lower().endswith(ARCHIVE_ENDINGS):
            prefix = str(PurePosixPath(path).parent)
            roots.append(("" if prefix == "." else prefix, unpack_once(folder / path, scratch / "unpacked")))
    return Files(roots)


def _walk(root: Path) -> Iterator[str]:
    """Yield the path of each file below `root`, relative to `root`, in order.

    Symbolic links to folders are followed, but no folder is visited twice. Hidden files are skipped.
    """
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
            if not name.startswith("."):  # macOS writes metadata of 1.png into a file ._1.png, which is not an image.
                yield name if relative == "." else f"{relative}/{name}"


def _key(stem: str) -> str:
    return _LEADING_ZEROS.sub("", nfc(stem))


def _unlikeness(published: PurePosixPath, path: Path) -> int:
    """Return a number from 0 to 3 that says how much the file name of `path` differs from the published name.

    0: equal names; 1: another ending; 2: other leading zeros; 3: another ending and other leading zeros.
    """
    name = PurePosixPath(nfc(path.name))
    ending = published.suffix.lower() != name.suffix.lower()
    return 0 if name.name == published.name else ending + 2 * (name.stem not in (published.stem, published.name))


def _only(paths: list[Path], name: str) -> Path | None:
    """Return the first of the paths, or None if there is none.

    Raises ValueError if the files differ in content, or if two paths differ only in how accents are encoded.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        if (other := seen.setdefault(nfc(str(path)), path)) != path:
            raise ValueError(f"{name}: the names of two files differ only in how accents are encoded: "
                             f"{str(other)!a} and {str(path)!a}; rename or remove one of them")
    for other in paths[1:]:
        if not filecmp.cmp(paths[0], other, shallow=False):
            raise ValueError(f"{name}: {paths[0]} and {other} both match this name but have different content: keep "
                             "only one of them")
    return paths[0] if paths else None


@dataclass(frozen=True)
class PublishedPair:
    """A pair (or a single image, or a text without image) that a reader found in a published data set.

    `names` holds the published names of the images; `sought` holds, for each image, the possible file names if they
    differ from the published name. `num_records` is the number of published records that were merged into this pair,
    and `num_empty` the number of empty sentences that were removed. If `split` is None, `official_split` determines
    the split in DiffCap. If `exact` is true, the names of the image files must be equal to `names`, including the
    ending and leading zeros.
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
        """Return the path of each image of the pair, or None for an image that does not exist."""
        if self.exact:
            return [files.at(name) for name in self.names]
        paths = [files.find(*names) for names in self.sought or [(name,) for name in self.names]]
        if not self.sought and len(paths) == 2 and paths[0] == paths[1] and self.names[0] != self.names[1]:
            # If a.png does not exist, the pair (a.png, a.jpg) would match a.jpg twice: keep only the exact match.
            return [path if path and nfc(path.name) == nfc(Path(name).name) else None
                    for path, name in zip(paths, self.names, strict=True)]
        return paths


def split_of(source: str, pair: PublishedPair) -> str:
    """Return the split in DiffCap of a pair from a source.

    DiffCap keeps the published splits, but divides the published split val into `val` and `gate`. A digest of the
    group name decides between these two, so pairs of one group stay together.
    """
    if pair.split is None and pair.official_split == "val":
        return ("val", "gate")[int(digest(f"{source}-{pair.group}".encode()), 16) % 2]
    return pair.split or pair.official_split


def to_record(source: str, pair: PublishedPair, files: Files) -> Record:
    """Read the images of the pair and return the DiffCap record of the pair.

    A missing image becomes empty bytes, and provenance["missing"] lists its name. A pair outside split train whose
    sentences are all empty gets one empty reference, because papers score these pairs too.
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
    assert split in SPLITS, f"{source}: split must be one of {SPLITS}, got '{split}'"
    as_published = [""] if pair.num_empty and split != "train" and not pair.exact else []
    return Record(pair_id=f"{source}-{pair.official_split}-{pair.official_id}", source=source, split=split,
                  group_id=f"{source}-{pair.group}", before=before, after=after,
                  references=pair.references or as_published, instruction=pair.instruction,
                  change_type=pair.change_type, provenance=provenance, num_images=len(pair.names))
