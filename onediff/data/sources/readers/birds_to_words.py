"""Reads Birds-to-Words: pairs of bird photographs and up to five paragraphs about their differences.

The annotations are a TSV file with a header and one paragraph per row; the images are given as URLs of iNaturalist.
The photograph with the URL ".../photos/647514/large.jpg?..." may be stored as 647514.jpg, as 647514_large.jpg or as
large.jpg in a folder 647514. Forbes et al., EMNLP 2019.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from onediff.data.record import digest
from onediff.data.sources.entries import sentences
from onediff.data.sources.published import OFFICIAL_SPLITS, Files, PublishedPair
from onediff.text_files import read_published_tsv

ANNOTATIONS = "birds-to-words-v1.0.tsv"
COLUMNS = ("img1ObservationURL", "img1ImgURL", "img1Species", "img1Selection", "img2ObservationURL", "img2ImgURL",
           "img2Species", "img2Selection", "split", "annN", "description")
_PHOTO = re.compile(r"/photos/(\d+)/")


def read(files: Files) -> Iterator[PublishedPair]:
    """Yield one pair for every two photographs; its references are the descriptions in all rows about these two.

    Raises ValueError if the annotation file is broken, and FileNotFoundError if it does not exist.
    """
    tables = files.ending(".tsv")
    path = tables[0] if len(tables) == 1 else files.require(ANNOTATIONS)
    merged: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for place, row in read_published_tsv(path, COLUMNS):
        if row["split"] not in OFFICIAL_SPLITS:
            raise ValueError(f"{place}: split must be one of {', '.join(OFFICIAL_SPLITS)}, got '{row['split'][:40]}'; "
                             "download the published file again")
        key = (row["split"], row["img1ImgURL"].strip(), row["img2ImgURL"].strip())
        merged.setdefault(key, []).append(row)
    for (split, *names), rows in merged.items():
        references, empty = sentences([row["description"] for row in rows], str(path))
        either_way = digest("\n".join(sorted(names)).encode())[:16]
        yield PublishedPair(digest("\n".join(names).encode())[:16], split, tuple(names), references, either_way,
                            provenance={"species": [rows[-1]["img1Species"], rows[-1]["img2Species"]]},
                            sought=tuple(_file_names(name) for name in names), num_records=len(rows), num_empty=empty)


def _file_names(url: str) -> tuple[str, ...]:
    """Return the file names under which users may have stored the photograph with this URL."""
    path = PurePosixPath(urlsplit(url).path)
    photo = _PHOTO.search(str(path))
    if not photo:
        return (path.name,)
    number = photo.group(1)
    return f"{number}{path.suffix}", f"{number}_{path.name}", f"{number}/{path.name}"
