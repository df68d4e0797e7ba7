"""Which pairs of a benchmark a training set shows or tells: equal and near-duplicate images, equal and near captions.

The benchmark is held in memory, the training set passes by once. An image is equal if its decoded pixels are, near if
its perceptual hash is within NEAR_BITS and its 32 x 32 grey thumbnail at most `max_distance` grey levels away on
average, and at most a CONTRAST-th of its grey levels' standard deviation: dark and pale pictures look alike. A flat one
is never near, as white pages are. Captions: overlap.py.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from onediff.config import Runtime
from onediff.data.overlap.captions import RULE, Captions, prepared
from onediff.data.overlap.datasets import Row, RowGroup
from onediff.data.parallel import spread
from onediff.data.quality.leaks import candidates
from onediff.data.quality.probe import difference_hash
from onediff.data.record import digest
from onediff.data.sources.tables import aligned
from onediff.inputs.images import open_image

NEAR_BITS, GREY_PX = 8, 32  # of 64 bits
FLAT, CONTRAST = 4.0, 10  # standard deviation of a thumbnail's grey levels
MEASURES = ("equal_image", "near_image", "equal_caption", "rare_caption", "near_caption", "image_and_caption", "leaks")
SHOWN = 5  # images that cannot be read which are printed
_HASHED_PX = 128
_BLOCK = 512  # rows whose images are compared at once

Finding = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What is kept of an image; `pixels`: a digest of all of them, empty where none of the others can be equal."""

    name: str
    pixels: str
    phash: int
    grey: NDArray[np.uint8]


@dataclass(frozen=True)
class Seen:
    """A row whose images were looked at: those that could be read, and what is wrong with the others."""

    row: str
    source: str
    texts: tuple[str, ...]
    looks: list[Look]
    missing: list[str]
    corrupt: list[str]


def audit_to(out: Path | None, train: Iterable[Row | RowGroup], benchmark: Iterable[Row | RowGroup], *,
             max_distance: float, runtime: Runtime) -> dict[str, Any]:
    """As `audit`; the findings become lines of `out`, which takes its name at the end."""
    if out is None:
        return audit(train, benchmark, max_distance=max_distance, runtime=runtime, note=lambda finding: None)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            result = audit(train, benchmark, max_distance=max_distance, runtime=runtime,
                           note=lambda finding: file.write(json.dumps(finding, ensure_ascii=False) + "\n"))
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    return result


def audit(train: Iterable[Row | RowGroup], benchmark: Iterable[Row | RowGroup], *, max_distance: float,
          runtime: Runtime, note: Callable[[Finding], object]) -> dict[str, Any]:
    """Counts of pairs by benchmark, of the images that could not be read, and the verdict; `note` gets every finding.

    near_image: pairs without an equal one; near_caption: pairs without an equal rare one. A pair leaks if the training
    set has an image of it, equal or near, or a rare caption of it. image_and_caption: pairs of which one row of the
    training set has an image and any caption.
    """
    tested = _Benchmark(_looked_at(benchmark, None, runtime))
    rows = _looked_at(train, frozenset(tested.phashes.tolist()), runtime)
    passing, unread = _Passing(tested, max_distance, note), _Unread()
    with tqdm(rows, desc="audit", unit="row") as shown:
        for block in _blocks(shown):
            unread.add(block)
            passing.block(block)
    passing.captions()
    counts = passing.counts()
    return {"rule": {"near_bits": NEAR_BITS, "max_distance": max_distance, "flat": FLAT, "contrast": CONTRAST,
                     **RULE},
            "train": unread.told(), "benchmark": tested.unread.told(), "benchmarks": counts,
            "num_pairs": sum(its["num_pairs"] for its in counts.values()),
            "leaks": sum(its["leaks"] for its in counts.values())}


def verdict(result: dict[str, Any]) -> str:
    """One line: clean, or how many pairs leak; and how much could not be seen."""
    pairs = f"{result['num_pairs']:,} pairs"
    said = f"{result['leaks']:,} of {pairs} leak" if result["leaks"] else f"clean: none of {pairs} leaks"
    unread = []
    for name, called in (("train", "training set"), ("benchmark", "benchmark")):
        its = result[name]
        number = its["missing_images"] + its["corrupt_images"]
        if number:
            unread.append(f"{number:,} of {its['images']:,} images of the {called}")
    return said + (f"; but {' and '.join(unread)} could not be read, and nothing is known of them" if unread else "")


def as_text(result: dict[str, Any]) -> str:
    rows = [[name, f"{its['num_pairs']:,}", *(f"{its[measure]:,}" for measure in MEASURES)]
            for name, its in result["benchmarks"].items()]
    lines = [aligned(["benchmark", "pairs", *(name.replace("_", " ") for name in MEASURES)], rows)]
    for name in ("train", "benchmark"):
        its = result[name]
        lines.append(f"{name}: {its['rows']:,} rows, {its['images']:,} images, of which {its['missing_images']:,} are "
                     f"missing and {its['corrupt_images']:,} corrupt"
                     + (f" ({'; '.join(its['unread'])}{' ...' if its['more'] else ''})" if its["unread"] else ""))
    return "\n".join([*lines, verdict(result)])


# --- looking ----------------------------------------------------------------------------------------------------------


def _looked_at(items: Iterable[Row | RowGroup], hashes: frozenset[int] | None, runtime: Runtime) -> Iterator[Seen]:
    return itertools.chain.from_iterable(spread(functools.partial(_looker, hashes), items, runtime, chunk=8))


def _looker(hashes: frozenset[int] | None) -> Callable[[Row | RowGroup], list[Seen]]:
    return lambda item: [_seen(row, hashes) for row in (item.rows() if isinstance(item, RowGroup) else [item])]


def _seen(row: Row, hashes: frozenset[int] | None) -> Seen:
    """All pixels are digested, which takes longer than decoding them, only of images that have one of the hashes."""
    seen = Seen(row.name, row.source, row.texts, [], [name for name, where in row.images if where is None], [])
    for name, where in row.images:
        if where is None:
            continue
        try:
            image = open_image(where)
        except (ValueError, OSError) as error:
            seen.corrupt.append(f"{name}: {str(error).partition(': ')[2]}")
            continue
        grey, size = image.convert("L"), f"{image.width}x{image.height}:"
        phash = difference_hash(_small(grey, _HASHED_PX))
        pixels = digest(size.encode() + image.tobytes()) if hashes is None or phash in hashes else ""
        seen.looks.append(Look(name, pixels, phash, np.asarray(_small(grey, GREY_PX)).ravel()))
    return seen


def _small(grey: Image.Image, px: int) -> Image.Image:
    """Not by boxes, as the leak check: Pillow's take whole pixels, so that a copy of another size is 4 levels away."""
    return grey.resize((px, px), Image.Resampling.BILINEAR)


@dataclass
class _Unread:
    """Counts of rows and images, and the first of those that are missing or corrupt."""

    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, rows: Iterable[Seen]) -> None:
        for row in rows:
            self.num_rows += 1
            self.counts.update(images=len(row.looks) + len(row.missing) + len(row.corrupt),
                               missing_images=len(row.missing), corrupt_images=len(row.corrupt))
            if len(self.first) < SHOWN:
                self.first += [*(f"{name} is missing" for name in row.missing), *row.corrupt]

    def told(self) -> dict[str, Any]:
        names = ("images", "missing_images", "corrupt_images")
        unread = self.counts["missing_images"] + self.counts["corrupt_images"]
        return {"rows": self.num_rows, **{name: self.counts[name] for name in names}, "unread": self.first[:SHOWN],
                "more": unread > SHOWN}


class _Benchmark:
    """Its pairs, their images as arrays, their captions by benchmark."""

    def __init__(self, rows: Iterable[Seen]) -> None:
        self.unread, looks = _Unread(), list[Look]()
        self.pairs: list[tuple[str, str]] = []  # (source, pair_id)
        self.pair_of: list[int] = []  # of each image
        texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for row in rows:
            self.unread.add([row])
            self.pair_of += [len(self.pairs)] * len(row.looks)
            self.pairs.append((row.source, row.row))
            looks += row.looks
            texts[row.source] += [(row.row, text) for text in row.texts]
        self.names = [look.name for look in looks]
        self.phashes = np.array([look.phash for look in looks], dtype=np.uint64)
        self.greys = np.stack([look.grey for look in looks]) if looks else np.zeros((0, 1), np.uint8)
        self.equal: dict[str, list[int]] = defaultdict(list)
        for number, look in enumerate(looks):
            self.equal[look.pixels].append(number)
        self.captions = {source: Captions(its) for source, its in texts.items()}


# --- comparing --------------------------------------------------------------------------------------------------------


class _Passing:
    """The training set on its way past the benchmark."""

    def __init__(self, tested: _Benchmark, max_distance: float, note: Callable[[Finding], object]) -> None:
        self.tested, self.max_distance, self.note = tested, max_distance, note
        self.found: dict[tuple[str, str], set[str]] = defaultdict(set)  # (source, measure) -> pairs

    def block(self, rows: list[Seen]) -> None:
        shown: dict[int, set[tuple[str, str]]] = defaultdict(set)  # row -> pairs that it has an image of
        for row, look, image, distance in self._images(rows):
            source, pair_id = pair = self.tested.pairs[self.tested.pair_of[image]]
            shown[row].add(pair)
            kind = "near_image" if distance is not None else "equal_image"
            self.found[source, kind].add(pair_id)
            self.note({"benchmark": source, "pair_id": pair_id, "reason": kind.replace("_", " "),
                       "image": self.tested.names[image], "train": rows[row].row, "train_image": look.name,
                       "distance": distance or 0.0})
        for number, told in enumerate(rows):
            for text in map(prepared, told.texts):
                for source, captions in self.tested.captions.items():
                    both = captions.look(text, told.row) & {name for its, name in shown[number] if its == source}
                    self.found[source, "image_and_caption"] |= both

    def captions(self) -> None:
        """What the captions came to, once all texts are by: only then it is known which are rare."""
        for source, captions in self.tested.captions.items():
            for name, pairs in captions.pairs().items():
                self.found[source, name] = pairs
            for match in captions.matches():
                self.note({"benchmark": source, "pair_id": min(match.pairs), "num_pairs": len(match.pairs),
                           "reason": "equal caption" if match.equal else "near caption", "rare": match.rare,
                           "caption": match.caption, "train": match.train, "train_caption": match.train_text,
                           "contained": round(match.contained, 3), "times": match.times})

    def counts(self) -> dict[str, dict[str, int]]:
        sizes = Counter(source for source, _ in self.tested.pairs)
        return {source: {"num_pairs": size, **_counted({name: self.found[source, name] for name in MEASURES})}
                for source, size in sizes.items()}

    def _images(self, rows: list[Seen]) -> Iterator[tuple[int, Look, int, float | None]]:
        """(row, its image, image of the benchmark, distance in grey levels; None: equal pixels)."""
        looks = [(number, look) for number, row in enumerate(rows) for look in row.looks]
        if not looks or not self.tested.names:
            return
        for number, look in looks:
            yield from ((number, look, image, None) for image in self.tested.equal.get(look.pixels, ()))
        phashes = np.array([look.phash for _, look in looks], dtype=np.uint64)
        greys = np.stack([look.grey for _, look in looks])
        contrast = greys.std(axis=1)
        limits = np.where(contrast < FLAT, -1, np.minimum(self.max_distance, contrast / CONTRAST))
        for mine, theirs in candidates(phashes, self.tested.phashes, NEAR_BITS):
            distance = np.abs(greys[mine].astype(np.int16) - self.tested.greys[theirs]).mean(axis=1)
            for place in np.flatnonzero(distance <= limits[mine]):
                number, look = looks[mine[place]]
                if int(theirs[place]) not in self.tested.equal.get(look.pixels, ()):
                    yield number, look, int(theirs[place]), round(float(distance[place]), 3)


def _counted(pairs: dict[str, set[str]]) -> dict[str, int]:
    pairs["near_image"] -= pairs["equal_image"]
    pairs["leaks"] = pairs["equal_image"] | pairs["near_image"] | pairs["rare_caption"] | pairs["near_caption"]
    return {name: len(pairs[name]) for name in MEASURES}


def _blocks(rows: Iterable[Seen]) -> Iterator[list[Seen]]:
    rest = iter(rows)
    while block := list(itertools.islice(rest, _BLOCK)):
        yield block

