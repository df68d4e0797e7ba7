"""CLEVR-Change: rendered table tops; each base image with a change, and with another view only. Park et al., ICCV 2019.

splits.json: numbers of base images by split; change_captions.json and no_change_captions.json: sentences by default
image; type_mapping.json: images by type of change. Images CLEVR_{default,semantic,nonsemantic}_<number>.png.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from onediff.data.sources.entries import expect, part, read_json, sentences
from onediff.data.sources.published import NO_TYPE, OFFICIAL_SPLITS, Files, PublishedPair

ANNOTATIONS = ("splits.json", "change_captions.json", "no_change_captions.json", "type_mapping.json")
TYPES = {"material": "texture"}  # the papers' word


def read(files: Files) -> Iterator[PublishedPair]:
    """Two pairs for each base image. Raises ValueError for a broken file, FileNotFoundError if one is not there."""
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
                yield PublishedPair(
                    f"{number:06d}-{kind}", split, names, references, f"{number:06d}",
                    types.get(number, NO_TYPE) if kind == "semantic" else "none",
                    num_records=int(kind == "semantic"), num_empty=empty)  # one entry of splits.json, two pairs


def _number(name: str, place: Path) -> int:
    digits = PurePosixPath(expect(name, str, str(place))).stem.rpartition("_")[2]
    if not digits.isdecimal():
        raise ValueError(f"{place}: '{name[:40]}' is no image of CLEVR-Change, such as CLEVR_default_000000.png")
    return int(digits)
