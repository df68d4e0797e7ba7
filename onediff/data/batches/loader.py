"""Turn the rows that one training step draws into the tensors that each rank receives.

`shared_out` gives every rank an equal share of the rows, `collate` turns a share into tensors, `decode` or a
`FeatureStore` supplies the images, and `stream` prepares the batches of later steps in worker processes.

Shapes:  M images in a batch, L levels of the vision tower, N patches per image, C vision width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from onediff import interrupts
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.sampling import BatchRow
from onediff.files import key_of, new_file, waiting_lock
from onediff.inputs.images import open_image
from onediff.inputs.processing import OneDiffProcessor

FEATURE_BATCH = 64  # number of images per forward pass of the vision tower when features are computed

Batch = dict[str, Tensor]
# Maps image digests to {"images": (images, 3, height, width)} or {"states": (images, levels, patches, channels)}.
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


def collate(rows: list[BatchRow], processor: OneDiffProcessor, pixels_of: Pixels) -> Batch:
    """Tokenize the prompts of the rows, load their images, and return the keyword arguments for the model's forward."""
    batch = processor.answers([row.prompt for row in rows])
    batch |= pixels_of([digest for row in rows for digest in row.images])
    if any(row.masked for row in rows):
        batch["patch_mask"] = torch.tensor([row.masked for row in rows])
    return batch


def decode(corpus: Corpus, processor: OneDiffProcessor) -> Pixels:
    """Return a function that maps image digests to decoded images, for phases that train the vision tower.

    The function decodes an image again at every call.
    """
    return lambda digests: {"images": processor.pixels([open_image(corpus.files[digest]) for digest in digests])}


class FeatureStore:
    """The states of a frozen vision tower for all images of a corpus, which are computed once and stored in files.

    When this object is called with image digests, it returns {"states": (images, levels, patches, channels)}.
    """

    def __init__(self, arrays: dict[str, NDArray[np.float32]], location_of: dict[str, tuple[str, int]]) -> None:
        """Store the arrays of states, one (images, levels, patches, channels) for each source.

        `location_of` maps an image digest to (source, index of the image in the array of this source).
        """
        self.arrays, self.location_of = arrays, location_of

    def __call__(self, digests: list[str]) -> Batch:
        shape = next(iter(self.arrays.values())).shape[1:]
        states = np.empty((len(digests), *shape), dtype=np.float32)
        for state, digest in zip(states, digests, strict=True):
            source, index = self.location_of[digest]
            state[:] = self.arrays[source][index]
        return {"states": torch.from_numpy(states)}

    @classmethod
    def prepare(cls, corpus: Corpus, processor: OneDiffProcessor, tower: VisionTower, *, tower_digest: str,
                scratch: Path) -> FeatureStore:
        """Open the feature file of each source below `scratch`; first compute the files that do not exist yet.

        The name of a feature file contains a hash of `tower_digest` and of the image digests, so a vision tower with
        changed weights gets new files.
        """
        digests_of: dict[str, list[str]] = defaultdict(list)
        for digest, source in sorted(corpus.source_of.items()):
            digests_of[source].append(digest)
        arrays: dict[str, NDArray[np.float32]] = {}
        for source, digests in digests_of.items():
            path = scratch / "features" / f"{source}-{key_of([tower_digest, digests])[:16]}.npy"
            with waiting_lock(path.with_suffix(".lock")):
                if not path.exists():
                    write_features(path, corpus, processor, tower, digests=digests)
            arrays[source] = np.load(path, mmap_mode="r")
        return cls(arrays, {digest: (source, index) for source, digests in digests_of.items()
                            for index, digest in enumerate(digests)})


def write_features(path: Path, corpus: Corpus, processor: OneDiffProcessor, tower: VisionTower, *,
                   digests: list[str]) -> None:
    """Compute the states of the vision tower for the images in `digests`, and write them in order to one .npy file."""
    store = None
    with (torch.inference_mode(), new_file(path) as part,
          tqdm(total=len(digests), desc=f"features {path.stem.split('-')[0]}", unit="image") as progress):
        for start in range(0, len(digests), FEATURE_BATCH):
            chunk = digests[start : start + FEATURE_BATCH]
            pixels = processor.pixels([open_image(corpus.files[digest]) for digest in chunk])
            states = tower(pixels).float().cpu().numpy()
            if store is None:
                store = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32,
                                                  shape=(len(digests), *states.shape[1:]))
            store[start : start + len(chunk)] = states
            progress.update(len(chunk))
        assert store is not None, "write_features needs at least one image"
        store.flush()


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
