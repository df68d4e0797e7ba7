"""Reads CLEVR-Change: rendered scenes of objects on a table. Park et al., ICCV 2019.

Each base image ("default") has two partners: one with a change ("semantic") and one that only shows another view
("nonsemantic"). The images are CLEVR_{default,semantic,nonsemantic}_<number>.png. splits.json lists the numbers of the
base images by split; change_captions.json and no_change_captions.json hold the sentences by base image;
type_mapping.json lists the images by type of change.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from onediff.data.sources.entries import part, sentences
from onediff.data.sources.published import NO_TYPE, OFFICIAL_SPLITS, Files, PublishedPair
from onediff.text_files import expect, read_json

ANNOTATIONS = ("splits.json", "change_captions.json", "no_change_captions.json", "type_mapping.json")
TYPES = {"material": "texture"}  # Papers call a change of the material "texture".


def read(files: Files) -> Iterator[PublishedPair]:
    """Yield two pairs for each base image, one with a change and one without.

    Raises ValueError if an annotation file is broken, and FileNotFoundError if an annotation file does not exist.
    """
    paths = [files.require(name) for name in ANNOTATIONS]
    splits, changed, same, mapping = (read_json(path, dict) for path in paths)
    types = {_number(name, paths[3]): TYPES.get(kind) or kind
             for kind, names in mapping.items() for name in expect(names, list, f"{paths[3]}, {kind}")}
    captions = {kind: ({_number(name, path): texts for name, texts in by_name.items()}, path)
                for kind, by_name, path in (("semantic", changed, paths[1]), ("nonsemantic", same, paths[2]))}
    for split in OFFICIAL_SPLITS:
        for value in part(splits, split, list, str(paths[0])):
            number = expect(value, int, f"{paths[0]}, {split}")
            for kind, (by_number, path) in captions.items():
                place = f"{path}, image {number:06d}"
                references, empty = sentences(expect(by_number.get(number, []), list, place), place)
                names = (f"CLEVR_default_{number:06d}.png", f"CLEVR_{kind}_{number:06d}.png")
                # Each published record becomes two pairs, so only the pair with a change counts as a record.
                yield PublishedPair(
                    f"{number:06d}-{kind}", split, names, references, f"{number:06d}",
                    types.get(number, NO_TYPE) if kind == "semantic" else "none",
                    num_records=int(kind == "semantic"), num_empty=empty)


def _number(name: str, place: Path) -> int:
    """Return the number at the end of an image name. Raises ValueError if the name has no number."""
    digits = PurePosixPath(expect(name, str, str(place))).stem.rpartition("_")[2]
    if not digits.isdecimal():
        raise ValueError(f"{place}: image names must be like CLEVR_default_000000.png, got '{name[:40]}'; download "
                         "the published file again")
    return int(digits)
