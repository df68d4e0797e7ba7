"""Reads Image-Editing-Request: photographs and the requests by which they were edited. Tan et al., ACL 2019.

{train,valid,test}.json: [{"uid": "...", "img0": "a.jpg", "img1": "b.jpg", "sents": ["..."]}, ...]. The `uid` identifies
a record. Two images may occur in several records with different requests; these records form one group.
"""

from collections.abc import Iterator

from onediff.data.sources.entries import identity, part, sentences
from onediff.data.sources.published import Files, PublishedPair
from onediff.text_files import read_list

ANNOTATIONS = {"train": ("train.json",), "val": ("valid.json", "val.json"), "test": ("test.json",)}


def read(files: Files) -> Iterator[PublishedPair]:
    """Yield one pair for each record of the annotation files.

    Raises ValueError if a file is broken or contains a uid twice. Raises FileNotFoundError if there is no annotation
    file.
    """
    for split, path in files.by_split(ANNOTATIONS).items():
        seen: set[str] = set()
        for place, entry in read_list(path):
            uid = identity(entry, "uid", place)
            if uid in seen:
                raise ValueError(f"{place}: uid '{uid}' occurs a second time; download the published file again")
            seen.add(uid)
            names = (part(entry, "img0", str, place), part(entry, "img1", str, place))
            references, empty = sentences(part(entry, "sents", list, place), place)
            yield PublishedPair(uid, split, names, references, "-".join(names), num_empty=empty)
