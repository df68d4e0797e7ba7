"""What every reader gives: a pair as published, its images by name; and the record that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onediff.data.record import SPLITS, Record, digest
from onediff.data.sources.file_index import Files
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

NO_TYPE, GENERAL = "unlabelled", "general"
OFFICIAL_SPLITS = ("train", "val", "test")


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
