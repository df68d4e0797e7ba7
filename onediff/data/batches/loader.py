"""Turn the rows that one training step draws into the tensors that each rank receives.

`shared_out` gives every rank an equal share of the rows, `collate` turns a share into tensors, `decode` or a
`FeatureStore` supplies the images, and `stream` prepares the batches of later steps in worker processes.

Shapes:  M images in a batch, L levels of the vision tower, N patches per image, C vision width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from onediff import interrupts
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.sampling import BatchRow
from onediff.data.batches.targets import Targets
from onediff.files import key_of, new_file, waiting_lock
from onediff.inputs.images import open_image
from onediff.inputs.processing import OneDiffProcessor

FEATURE_BATCH = 64  # number of images per forward pass of the vision tower when features are computed

Batch = dict[str, Tensor]
# Maps image digests to {"images": (images, 3, height, width)}, {"states": (images, levels, patches, channels)} or both.
Pixels = Callable[[list[str]], Batch]
# Maps images (images, 3, height, width) to the states of a vision tower (images, levels, patches, channels).
VisionTower = Callable[[Tensor], Tensor]


def shared_out(rows: list[BatchRow], parts: int, *, tokens_per_image: int) -> list[list[BatchRow]]:
    """Divide the rows of one training step into `parts` lists, one for each rank.

    All lists have equal size and a similar number of tokens, so that no rank has to wait for another rank. The number
    of rows must be a multiple of `parts`. The division changes no result, because the loss of a step is a sum over all
    rows of the step.
    """
    if parts == 1:
        return [rows]
    longest_first = sorted(rows, key=lambda row: _num_tokens(row, tokens_per_image), reverse=True)
    rounds = [longest_first[start : start + parts] for start in range(0, len(rows), parts)]
    # Each round gives one row to each part; every second round is reversed, so that no part gets all longest rows.
    dealt = [one_round[::-1] if number % 2 else one_round for number, one_round in enumerate(rounds)]
    return [list(part) for part in zip(*dealt, strict=True)]


def _num_tokens(row: BatchRow, tokens_per_image: int) -> int:
    """Return the estimated length of a row in tokens, where four characters of text count as one token."""
    texts = [row.prompt.question, row.prompt.answer or "", *(text for turn in row.prompt.later for text in turn)]
    return len(row.images) * tokens_per_image + sum(map(len, texts)) // 4


def collate(rows: list[BatchRow], processor: OneDiffProcessor, pixels_of: Pixels,
            targets_of: Targets | None = None) -> Batch:
    """Tokenize the prompts of the rows, load their images, and return the keyword arguments for the model's forward.

    `targets_of` turns the facts of all pairs into the targets of the auxiliary losses; None: there are no such losses.
    """
    batch = processor.answers([row.prompt for row in rows])
    batch |= pixels_of([digest for row in rows for digest in row.images])
    if any(row.masked for row in rows):
        batch["patch_mask"] = torch.tensor([row.masked for row in rows])
    if targets_of:
        batch |= targets_of([row.facts for row in rows if len(row.images) == 2])
    return batch


def decode(corpus: Corpus, processor: OneDiffProcessor) -> Pixels:
    """Return a function that maps image digests to decoded images, for phases that train the vision tower.

    The function decodes an image again at every call.
    """
    return lambda digests: {"images": processor.pixels([open_image(corpus.files[digest]) for digest in digests])}


class FeatureStore:
    """The states of a frozen vision tower for all images of a corpus, which are computed once and stored in files.

    When this object is called with image digests, it returns {"states": (images, levels, patches, channels)}, and also
    {"images": (images, 3, height, width)} if it stores the pixels, so that no image is decoded again.
    """

    def __init__(self, arrays: dict[str, NDArray[np.float32]], location_of: dict[str, tuple[str, int]],
                 squares: dict[str, NDArray[np.uint8]], processor: OneDiffProcessor) -> None:
        """Store the arrays of states, one (images, levels, patches, channels) for each source.

        `location_of` maps an image digest to (source, index of the image in the array of this source). `squares` are
        the arrays of pixels (images, height, width, 3), which `processor` normalizes; it may be empty.
        """
        self.arrays, self.location_of, self.squares, self.processor = arrays, location_of, squares, processor

    def __call__(self, digests: list[str]) -> Batch:
        batch = {"states": torch.from_numpy(self._rows(self.arrays, digests))}
        if self.squares:
            batch["images"] = self.processor.normalized(self._rows(self.squares, digests))
        return batch

    def _rows(self, arrays: dict[str, NDArray[Any]], digests: list[str]) -> NDArray[Any]:
        """Copy the rows of some images from the arrays of their sources."""
        first = next(iter(arrays.values()))
        rows = np.empty((len(digests), *first.shape[1:]), dtype=first.dtype)
        for row, digest in zip(rows, digests, strict=True):
            source, index = self.location_of[digest]
            row[:] = arrays[source][index]
        return rows

    @classmethod
    def prepare(cls, corpus: Corpus, processor: OneDiffProcessor, tower: VisionTower, *, tower_digest: str,
                scratch: Path, with_pixels: bool = False) -> FeatureStore:
        """Open the feature file of each source below `scratch`; first compute the files that do not exist yet.

        The name of a feature file contains a hash of `tower_digest`, of the pixels that the processor makes of an image
        that is not square, and of the image digests. So there are new files if the weights of the vision tower or the
        padding of images have changed. If `with_pixels` is true, a second file of each source holds the pixels.
        """
        wide = Image.linear_gradient("L").convert("RGB").crop((0, 0, 256, 97))
        prepared = key_of(processor.squares([wide]).tolist())
        digests_of: dict[str, list[str]] = defaultdict(list)
        for digest, source in sorted(corpus.source_of.items()):
            digests_of[source].append(digest)
        arrays: dict[str, NDArray[np.float32]] = {}
        squares: dict[str, NDArray[np.uint8]] = {}
        for source, digests in digests_of.items():
            path = scratch / "features" / f"{source}-{key_of([tower_digest, prepared, digests])[:16]}.npy"
            pixels = path.with_suffix(".pixels.npy") if with_pixels else None
            with waiting_lock(path.with_suffix(".lock")):
                if not path.exists() or (pixels and not pixels.exists()):
                    write_features(path, corpus, processor, tower, digests=digests, pixels=pixels)
            arrays[source] = np.load(path, mmap_mode="r")
            if pixels:
                squares[source] = np.load(pixels, mmap_mode="r")
        return cls(arrays, {digest: (source, index) for source, digests in digests_of.items()
                            for index, digest in enumerate(digests)}, squares, processor)


def write_features(path: Path, corpus: Corpus, processor: OneDiffProcessor, tower: VisionTower, *,
                   digests: list[str], pixels: Path | None = None) -> None:
    """Compute the states of the vision tower for the images in `digests`, and write them in order to one .npy file.

    The pixels of the images, (images, height, width, 3), are written to the file `pixels` if it is given.
    """
    assert digests, "write_features needs at least one image"
    states: NDArray[np.float32] | None = None
    with (torch.inference_mode(), new_file(path) as part, new_file(pixels) if pixels else nullcontext() as pixels_part,
          tqdm(total=len(digests), desc=f"features {path.stem.split('-')[0]}", unit="image") as progress):
        squares = _array(pixels_part, np.uint8, (len(digests), *[processor.image_px] * 2, 3)) if pixels_part else None
        for start in range(0, len(digests), FEATURE_BATCH):
            chunk = digests[start : start + FEATURE_BATCH]
            images = processor.squares([open_image(corpus.files[digest]) for digest in chunk])
            new = tower(processor.normalized(images)).float().cpu().numpy()
            if states is None:
                states = _array(part, np.float32, (len(digests), *new.shape[1:]))
            states[start : start + len(chunk)] = new
            if squares is not None:
                squares[start : start + len(chunk)] = images
            progress.update(len(chunk))
        for array in (states, squares):
            if isinstance(array, np.memmap):
                array.flush()


def _array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> Any:
    """Create a .npy file of this shape, and return it as an array whose values are written to the file."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def stream(batches_of: Callable[[int], list[Batch]], steps: range, *, workers: int, pin: bool) -> Iterator[list[Batch]]:
    """Yield the batches of each training step in order, as returned by `batches_of(step)`.

    If `workers` is above 0, worker processes prepare the batches of later steps in advance. If `pin` is true, the
    tensors are copied to page-locked memory, from which transfers to a GPU are faster. Workers are forked, so
    `batches_of` need not be picklable.
    """
    def ignore_signals(worker: int) -> None:
        """Make a worker ignore stop signals, because training needs batches until a checkpoint has been written."""
        interrupts.ignore()

    # The dataset of this DataLoader is the range of step numbers, and `batches_of` gets one step number at a time.
    return iter(DataLoader(steps, batch_size=None, collate_fn=batches_of,  # type: ignore[arg-type]
                           num_workers=workers, pin_memory=pin,
                           prefetch_factor=2 if workers else None, multiprocessing_context="fork" if workers else None,
                           worker_init_fn=ignore_signals))
