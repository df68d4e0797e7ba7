"""The leak audit: finds the pairs of a benchmark whose images or captions also occur in a training set.

Two images are equal if their decoded pixels are equal. A training image is near a benchmark image if two conditions
hold. First, their perceptual hashes differ in at most NEAR_BITS bits. Second, their 32 x 32 grey thumbnails differ, on
average over the pixels, by at most `max_distance` grey levels and by at most 1 / CONTRAST of the thumbnail's standard
deviation; otherwise all dark or pale pictures would be near each other. A training image with almost no contrast, such
as a blank page, is never near another image. The rules for captions are in captions.py.

The benchmark is held in memory, and the training set is read once.
"""

import functools
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from onediff.config import Runtime
from onediff.data.overlap.captions import RULE, CaptionIndex, prepared
from onediff.data.overlap.datasets import Example, ExampleGroup
from onediff.data.parallel import spread
from onediff.data.quality.leaks import candidates
from onediff.data.quality.probe import difference_hash
from onediff.data.record import digest
from onediff.data.sources.tables import aligned
from onediff.files import write_jsonl
from onediff.inputs.images import open_image

NEAR_BITS = 8  # near images differ in at most this many of the 64 bits of their perceptual hashes
GREY_PX = 32  # width and height of the grey thumbnails
FLAT, CONTRAST = 4.0, 10  # Thumbnails whose grey levels have a standard deviation below FLAT are never near.
MEASURES = ("equal_image", "near_image", "equal_caption", "rare_caption", "near_caption", "image_and_caption", "leaks")
NUM_SHOWN = 5  # largest number of unreadable images that the result of the leak audit lists
_HASHED_PX = 128
_BLOCK = 512  # number of training examples whose images are compared with the benchmark at once


def audit(train: Iterable[Example | ExampleGroup], benchmark: Iterable[Example | ExampleGroup], *, out: Path | None,
          max_distance: float, runtime: Runtime) -> dict[str, Any]:
    """Compare a training set with benchmarks, and return the counts of leaking pairs and of unreadable images.

    Each match is written as one line of JSON to the file `out`, if it is given. A pair leaks if the training set has an
    equal or near image of the pair, or an equal or near rare caption. `near_image` counts only pairs without an equal
    image, and `near_caption` only pairs without an equal rare caption. `image_and_caption` counts the pairs for which a
    single row of the training set has both an image and a caption of the pair, rare or not.
    """
    benchmark_counts, train_counts = _ImageCounts(), _ImageCounts()
    index = _BenchmarkIndex(benchmark_counts.counted(_fingerprinted(benchmark, None, runtime)))
    scanned = train_counts.counted(_fingerprinted(train, frozenset(index.phashes.tolist()), runtime))
    findings = index.findings(iter(tqdm(scanned, desc="audit", unit="row")), max_distance)
    if out:
        write_jsonl(out, findings)
    else:
        deque(findings, maxlen=0)  # The loop only consumes the iterator, because the index counts the matches.
    counts = index.counts()
    return {"rule": {"near_bits": NEAR_BITS, "max_distance": max_distance, "flat": FLAT, "contrast": CONTRAST, **RULE},
            "train": train_counts.as_dict(), "benchmark": benchmark_counts.as_dict(), "benchmarks": counts,
            "num_pairs": sum(count["num_pairs"] for count in counts.values()),
            "leaks": sum(count["leaks"] for count in counts.values())}


def verdict(result: dict[str, Any]) -> str:
    """Return the result of the leak audit in one line: "clean" or the number of leaking pairs, then unreadable images.
    """
    pairs = f"{result['num_pairs']:,} pairs"
    outcome = f"{result['leaks']:,} of {pairs} leak" if result["leaks"] else f"clean: none of {pairs} leaks"
    numbers = {name: result[name]["missing_images"] + result[name]["corrupt_images"] for name in ("train", "benchmark")}
    unread = [f"{number:,} of {result[name]['images']:,} images of the {name.replace('train', 'training set')}"
              for name, number in numbers.items() if number]
    return outcome + (f"; but {' and '.join(unread)} could not be read and were not compared" if unread else "")


def as_text(result: dict[str, Any]) -> str:
    """Format the result of `audit` as a table with one row per benchmark, followed by the verdict."""
    rows = [[name, f"{counts['num_pairs']:,}", *(f"{counts[measure]:,}" for measure in MEASURES)]
            for name, counts in result["benchmarks"].items()]
    lines = [aligned(["benchmark", "pairs", *(name.replace("_", " ") for name in MEASURES)], rows)]
    for name in ("train", "benchmark"):
        counts = result[name]
        first = f" ({'; '.join(counts['unread'])}{' ...' if counts['more'] else ''})" if counts["unread"] else ""
        lines.append(f"{name}: {counts['rows']:,} rows, {counts['images']:,} images, of which "
                     f"{counts['missing_images']:,} are missing and {counts['corrupt_images']:,} corrupt{first}")
    return "\n".join([*lines, verdict(result)])


@dataclass(frozen=True)
class Fingerprint:
    """What the leak audit compares of an image: digest of the pixels, perceptual hash, and thumbnail.

    `pixels` is a digest of all pixels, or empty if the perceptual hash shows that no image of the benchmark is equal.
    `phash` is the perceptual hash, and `grey` the flattened grey thumbnail.
    """

    name: str
    pixels: str
    phash: int
    grey: NDArray[np.uint8]


@dataclass(frozen=True)
class FingerprintedExample:
    """An example with the fingerprints of the readable images, and a message for each missing or corrupt image."""

    name: str
    source: str
    texts: tuple[str, ...]
    images: list[Fingerprint] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)


def _fingerprinted(items: Iterable[Example | ExampleGroup], hashes: frozenset[int] | None,
                   runtime: Runtime) -> Iterator[FingerprintedExample]:
    """Compute the image fingerprints of all examples in worker processes, and yield the examples with fingerprints.

    `hashes` has the meaning that `_fingerprint` describes.
    """
    return itertools.chain.from_iterable(spread(functools.partial(_worker, hashes), items, runtime, chunk=8))


def _worker(hashes: frozenset[int] | None) -> Callable[[Example | ExampleGroup], list[FingerprintedExample]]:
    return lambda item: [_fingerprint(example, hashes)
                         for example in (item.examples() if isinstance(item, ExampleGroup) else [item])]


def _fingerprint(example: Example, hashes: frozenset[int] | None) -> FingerprintedExample:
    """Read the images of an example and compute their fingerprints.

    If `hashes` is given, the digest of all pixels is computed only for images whose perceptual hash is in it, because
    the digest takes longer than decoding the image.
    """
    result = FingerprintedExample(example.name, example.source, example.texts)
    for name, content in example.images:
        if content is None:
            result.missing.append(f"{name} is missing")
            continue
        try:
            image = open_image(content)
        except (ValueError, OSError) as error:
            result.corrupt.append(f"{name}: {str(error).partition(': ')[2]}")
            continue
        grey, size = image.convert("L"), f"{image.width}x{image.height}:"
        phash = difference_hash(_resized(grey, _HASHED_PX))
        pixels = digest(size.encode() + image.tobytes()) if hashes is None or phash in hashes else ""
        result.images.append(Fingerprint(name, pixels, phash, np.asarray(_resized(grey, GREY_PX)).ravel()))
    return result


def _resized(grey: Image.Image, px: int) -> Image.Image:
    """Resize a grey image with the bilinear filter, which gives similar thumbnails for copies of different sizes.

    Pillow's box filter, which the leak check between splits uses, takes only complete pixels: a resized copy would be 4
    grey levels away from the original.
    """
    return grey.resize((px, px), Image.Resampling.BILINEAR)


@dataclass
class _ImageCounts:
    """Counts examples and their images, and lists the first images that are missing or corrupt."""

    counts: Counter[str] = field(default_factory=lambda: Counter(rows=0, images=0, missing_images=0, corrupt_images=0))
    unread: list[str] = field(default_factory=list)

    def counted(self, examples: Iterable[FingerprintedExample]) -> Iterator[FingerprintedExample]:
        """Yield the examples unchanged, and count each example when it is yielded."""
        for example in examples:
            unread = [*example.missing, *example.corrupt]
            self.counts.update(rows=1, images=len(example.images) + len(unread), missing_images=len(example.missing),
                               corrupt_images=len(example.corrupt))
            if len(self.unread) <= NUM_SHOWN:
                self.unread += unread
            yield example

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, the first unreadable images, and whether there are more unreadable images than listed."""
        return {**self.counts, "unread": self.unread[:NUM_SHOWN], "more": len(self.unread) > NUM_SHOWN}


class _BenchmarkIndex:
    """The images and captions of all benchmarks, in a form that is fast to compare with a training set."""

    def __init__(self, examples: Iterable[FingerprintedExample]) -> None:
        self.pairs: list[tuple[str, str]] = []  # (source, pair_id)
        self.pair_of: list[int] = []  # maps the index of an image to the index of its pair
        images: list[Fingerprint] = []
        texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for example in examples:
            self.pair_of += [len(self.pairs)] * len(example.images)
            self.pairs.append((example.source, example.name))
            images += example.images
            texts[example.source] += [(example.name, text) for text in example.texts]
        self.names, self.phashes, self.greys = _arrays(images)
        # maps the digest of the pixels to the indices of the images with these pixels
        self.equal: dict[str, list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            self.equal[image.pixels].append(number)
        self.captions = {source: CaptionIndex(captions) for source, captions in texts.items()}
        self.matched: dict[tuple[str, str], set[str]] = defaultdict(set)  # (source, measure) -> pair_ids

    def findings(self, examples: Iterator[FingerprintedExample], max_distance: float) -> Iterator[dict[str, Any]]:
        """Compare a training set with the benchmarks, and yield each match as a JSON object.

        Matches of captions come last, because which captions are rare depends on the complete training set.
        """
        while block := list(itertools.islice(examples, _BLOCK)):
            # maps the index of a training example to the benchmark pairs that share an image with it
            pairs_shown: dict[int, set[tuple[str, str]]] = defaultdict(set)
            for number, image, match, distance in self._matching_images(block, max_distance):
                source, pair_id = pair = self.pairs[self.pair_of[match]]
                pairs_shown[number].add(pair)
                kind = "equal_image" if distance is None else "near_image"
                self.matched[source, kind].add(pair_id)
                yield {"benchmark": source, "pair_id": pair_id, "reason": kind.replace("_", " "),
                       "image": self.names[match], "train": block[number].name, "train_image": image.name,
                       "distance": distance or 0.0}
            for number, example in enumerate(block):
                for text, (source, index) in itertools.product(map(prepared, example.texts), self.captions.items()):
                    pair_ids = {pair_id for name, pair_id in pairs_shown[number] if name == source}
                    self.matched[source, "image_and_caption"] |= index.add_text(text, example.name) & pair_ids
        for source, index in self.captions.items():
            self.matched |= {(source, measure): pairs for measure, pairs in index.pairs().items()}
            for caption in index.matches():
                yield {"benchmark": source, "pair_id": min(caption.pairs), "num_pairs": len(caption.pairs),
                       "reason": "equal caption" if caption.equal else "near caption", "rare": caption.rare,
                       "caption": caption.caption, "train": caption.train, "train_caption": caption.train_text,
                       "contained": round(caption.contained, 3), "times": caption.times}

    def _matching_images(self, examples: list[FingerprintedExample],
                         max_distance: float) -> Iterator[tuple[int, Fingerprint, int, float | None]]:
        """Yield (index of the example, training image, index of the benchmark image, distance) for each pair of images
        that are equal or near.

        The distance is the mean difference of the thumbnails in grey levels, or None if all pixels are equal.
        """
        images = [(number, image) for number, example in enumerate(examples) for image in example.images]
        if not images or not self.names:
            return
        for number, image in images:
            yield from ((number, image, match, None) for match in self.equal.get(image.pixels, ()))
        _, phashes, greys = _arrays([image for _, image in images])
        contrast = greys.std(axis=1)
        limits = np.where(contrast < FLAT, -1, np.minimum(max_distance, contrast / CONTRAST))
        for ours, theirs in candidates(phashes, self.phashes, NEAR_BITS):
            distance = np.abs(greys[ours].astype(np.int16) - self.greys[theirs]).mean(axis=1)
            for place in np.flatnonzero(distance <= limits[ours]):
                number, image = images[ours[place]]
                if int(theirs[place]) not in self.equal.get(image.pixels, ()):
                    yield number, image, int(theirs[place]), round(float(distance[place]), 3)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return for each benchmark the number of its pairs, and how many of them occur in the training set.

        The second number is given for each way of comparing, such as equal images or rare captions.
        """
        counts = {}
        for source, num_pairs in Counter(source for source, _ in self.pairs).items():
            pairs = {measure: self.matched[source, measure] for measure in MEASURES}
            pairs["near_image"] -= pairs["equal_image"]
            pairs["leaks"] = pairs["equal_image"] | pairs["near_image"] | pairs["rare_caption"] | pairs["near_caption"]
            counts[source] = {"num_pairs": num_pairs, **{measure: len(pair_ids) for measure, pair_ids in pairs.items()}}
        return counts


def _arrays(images: list[Fingerprint]) -> tuple[list[str], NDArray[np.uint64], NDArray[np.uint8]]:
    """Return the names, the perceptual hashes (n,) and the flattened thumbnails (n, pixels) of n images."""
    greys = np.stack([image.grey for image in images]) if images else np.zeros((0, 1), np.uint8)
    return [image.name for image in images], np.array([image.phash for image in images], dtype=np.uint64), greys
