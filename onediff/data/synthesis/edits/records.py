"""The source `edits`: a photograph or a rendered picture, edited by a program, with captions that request the edit.

The random numbers of a record depend only on the seed, the split and the index of the record. Therefore any process can
generate any record, and the bytes are always equal.
"""

import io

import numpy as np
from numpy.random import Generator
from PIL import Image

from onediff.config import Config
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis.edits.canvases import draw_canvas
from onediff.data.synthesis.edits.operations import OPERATIONS
from onediff.data.synthesis.edits.photographs import draw_window
from onediff.data.synthesis.edits.pictures import Pixels
from onediff.data.synthesis.phrases import EDIT_TEMPLATES, INSTRUCTIONS, phrasings, pick, say
from onediff.inputs.images import png

SEED_TAG = 4  # This number is part of every random seed, so that `edits` shares no random numbers with other sources.
NUM_REFERENCES = 3
STEP = 20  # A pixel counts as changed if one of its color values (0 to 255) changed by more than this.
# An edit is visible if at least this share of the pixels changed. Each operation has its own value.
MIN_CHANGED = {"none": 0.0, "remove": 0.02, "paste": 0.02, "black_and_white": 0.03, "blur": 0.03,
               "more_contrast": 0.06, "less_contrast": 0.06}
MIN_CHANGED_ELSEWHERE = 0.2


def edit_record(config: Config, split: str, index: int) -> Record:
    """Generate record number `index` of the split; raise ValueError if 100 attempts give no visible edit."""
    seed = [config.seed, SEED_TAG, SPLITS.index(split), index]
    rng = np.random.default_rng(seed)
    operation = pick(rng, tuple(EDIT_TEMPLATES))
    on_canvas = rng.random() < config.data.edits.shares.canvas
    image_px, folder = config.data.image_px, config.data.edits.photos
    for _ in range(100):  # If the edit is invisible, such as a blur of a clear sky, try another picture.
        size = (image_px, image_px)
        picture = draw_canvas(rng, size) if on_canvas else draw_window(rng, split, folder, size=size)
        edit = OPERATIONS[operation](rng, picture)
        difference = np.abs(picture.pixels.astype(np.int16) - edit.after).max(axis=2)
        if float((difference > STEP).mean()) >= MIN_CHANGED.get(operation, MIN_CHANGED_ELSEWHERE):
            break
    else:
        raise ValueError(
            f"data.edits.photos: the edit '{operation}' is invisible in 100 random windows of the photographs of "
            f"split '{split}'; use photographs with more color and detail"
        )
    thing = edit.thing
    return Record(
        pair_id=f"edits-{split}-{index:06d}", source="edits", split=split,
        group_id=f"canvas/{split}/{index}" if on_canvas else f"photo/{picture.name}",
        before=_encode(rng, picture.pixels), after=_encode(rng, edit.after),
        references=[template.format(old=f"{thing.color} {say(rng, thing.shape)}" if thing else "", new=edit.new)
                    for template in phrasings(rng, EDIT_TEMPLATES[operation], NUM_REFERENCES)],
        instruction=pick(rng, INSTRUCTIONS["edits"]), change_type=operation,
        provenance={"seed": seed, "photo": picture.name, "new": edit.new, "region": edit.region,
                    "object": thing and {key: getattr(thing, key) for key in ("shape", "color", "size", "material")}})


def _encode(rng: Generator, pixels: Pixels) -> bytes:
    """Return PNG bytes after a JPEG round trip of random quality.

    Without the round trip, the two images of an unchanged pair (`none`) would be recognizable by equal bytes.
    """
    lossy = io.BytesIO()
    Image.fromarray(pixels).save(lossy, "JPEG", quality=int(rng.integers(88, 98)), subsampling=0)
    return png(Image.open(lossy))
