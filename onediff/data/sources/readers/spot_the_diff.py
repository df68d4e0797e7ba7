"""Reads Spot-the-Diff: pairs of frames from surveillance cameras. Jhamtani and Berg-Kirkpatrick, EMNLP 2018.

{train,val,test}.json: [{"img_id": "1001", "sentences": ["..."]}, ...]; images <img_id>.png and <img_id>_2.png.
All entries with one img_id form one pair, and every sentence is a reference.
"""

from collections.abc import Iterator

from onediff.data.sources.entries import identity, part, sentences
from onediff.data.sources.published import Files, PublishedPair
from onediff.text_files import read_list

ANNOTATIONS = {"train": ("train.json",), "val": ("val.json", "valid.json"), "test": ("test.json",)}


def read(files: Files) -> Iterator[PublishedPair]:
    """Yield one pair for each img_id; the sentences of all entries with this img_id are its references.

    Raises ValueError if an annotation file is broken, and FileNotFoundError if no annotation file exists.
    """
    for split, path in files.by_split(ANNOTATIONS).items():
        merged: dict[str, tuple[list[str], list[int]]] = {}
        for place, entry in read_list(path):
            texts, empty = sentences(part(entry, "sentences", list, place), place)
            references, empties = merged.setdefault(identity(entry, "img_id", place), ([], []))
            references.extend(texts)
            empties.append(empty)
        for name, (references, empties) in merged.items():
            yield PublishedPair(name, split, (f"{name}.png", f"{name}_2.png"), references, name,
                                num_records=len(empties), num_empty=sum(empties))
