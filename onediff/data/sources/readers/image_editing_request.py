"""Image-Editing-Request: photographs edited on request. Tan et al., ACL 2019.

{train,valid,test}.json: [{"uid": "...", "img0": "a.jpg", "img1": "b.jpg", "sents": ["..."]}, ...]. A record is known by
its uid: the same two images may come with several requests, and then stay in one split together.
"""

from collections.abc import Iterator

from onediff.data.sources.entries import identity, part, read_list, sentences
from onediff.data.sources.published import Files, PublishedPair

ANNOTATIONS = {"train": ("train.json",), "val": ("valid.json", "val.json"), "test": ("test.json",)}


def read(files: Files) -> Iterator[PublishedPair]:
    """Raises ValueError for a broken file or a uid that is there twice, FileNotFoundError if there is no file."""
    for split, path in files.by_split(ANNOTATIONS).items():
        seen: set[str] = set()
        for place, entry in read_list(path):
            uid = identity(entry, "uid", place)
            if uid in seen:
                raise ValueError(f"{place}: uid '{uid}' is there a second time; take the file as published")
            seen.add(uid)
            names = (part(entry, "img0", str, place), part(entry, "img1", str, place))
            references, empty = sentences(part(entry, "sents", list, place), place)
            yield PublishedPair(uid, split, names, references, "-".join(names), num_empty=empty)
