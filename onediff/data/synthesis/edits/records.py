"""The source `edits`: a picture that a program edits, with captions that request the edit.

A picture is a window of a photograph, a generated picture, or a canvas (a rendered table). The random numbers of a
record depend only on the seed, the split and the index of the record. Therefore any process can generate any record,
and the bytes are always equal.
"""

import io
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from onediff.config import Config
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis import nuisance
from onediff.data.synthesis.edits.canvases import draw_canvas
from onediff.data.synthesis.edits.directions import Change, draw_change
from onediff.data.synthesis.edits.generated import draw_generated
from onediff.data.synthesis.edits.photographs import SCENE_OF, augment, draw_window
from onediff.data.synthesis.edits.pictures import Picture, Pixels, draw_size
from onediff.data.synthesis.phrases import EDIT_TEMPLATES, INSTRUCTIONS, phrasings, pick, say
from onediff.inputs.images import png

SEED_TAG = 4  # This number is part of every random seed, so that `edits` shares no random numbers with other sources.
NUM_REFERENCES = 3
MAX_TRIES = 100
# Unchanged pairs are drawn twice as often as each operation, because pairs without a change are frequent in practice.
DRAWN = (*EDIT_TEMPLATES, "none")
# These disturbances would make an edit look weaker, stronger or like no edit.
_LIGHT, _SHARPNESS = ("light",), ("blur", "resampling")
CONFLICTS = {"brighten": _LIGHT, "darken": _LIGHT, "more_contrast": _LIGHT, "less_contrast": _LIGHT,
             "blur": _SHARPNESS, "sharpen": _SHARPNESS}


def edit_records(config: Config, split: str, index: int) -> list[Record]:
    """Return the pair number `index` of the split, and outside of `train` also its swapped pair.

    The swapped pair has the caption of the way back, and its provenance names the pair under `swap_of`. An unchanged
    pair has no swapped pair.
    """
    record, change = _draw_record(config, split, index)
    if split == "train" or change.operation == "none":
        return [record]
    rng = np.random.default_rng([*record.provenance["seed"], 1])
    swapped = replace(record, pair_id=f"{record.pair_id}s", before=record.after, after=record.before,
                      **_words(rng, change.inverse),
                      provenance=record.provenance | _facts(change.inverse) | {"swap_of": record.pair_id})
    return [record, swapped]


def edit_record(config: Config, split: str, index: int) -> Record:
    """Return the pair number `index` of the split; raise ValueError if 100 attempts give no visible edit."""
    return _draw_record(config, split, index)[0]


def _draw_record(config: Config, split: str, index: int) -> tuple[Record, Change]:
    seed = [config.seed, SEED_TAG, SPLITS.index(split), index]
    rng = np.random.default_rng(seed)
    operation = pick(rng, DRAWN)
    kind = _draw_kind(rng, config, operation)
    for _ in range(MAX_TRIES):  # If the edit is invisible, such as a blur of a clear sky, try another picture.
        picture = _draw_picture(rng, config, split, kind)
        change = draw_change(rng, operation, picture, config.data.nuisance)
        if change:
            break
    else:
        raise ValueError(
            f"data.edits.photos: the edit '{operation}' is invisible in {MAX_TRIES} random windows of the photographs "
            f"of split '{split}'; use photographs with more color and detail"
        )
    before, after = _disturbed(rng, config, split, change)
    group = f"photo/{SCENE_OF.get(picture.name, picture.name)}" if kind == "photograph" else f"{kind}/{split}/{index}"
    return Record(
        pair_id=f"edits-{split}-{index:06d}", source="edits", split=split, group_id=group, before=before, after=after,
        **_words(rng, change),
        provenance={"seed": seed, "kind": kind, "photo": picture.name, **_facts(change), "swap_of": None}), change


def _draw_kind(rng: Generator, config: Config, operation: str) -> str:
    """Draw the kind of the picture; a canvas is not used for `restore`, because its removed object has a name."""
    shares = config.data.edits.shares.model_dump()
    if operation == "restore" and shares["canvas"] < 1:
        shares["canvas"] = 0.0
    total, number = sum(shares.values()), float(rng.random())
    for kind, share in shares.items():
        number -= share / total
        if number < 0:
            return str(kind)
    return max(shares, key=lambda kind: shares[kind])


def _draw_picture(rng: Generator, config: Config, split: str, kind: str) -> Picture:
    """Draw a picture of this kind. In `train`, photographs and generated pictures get random colors."""
    size, folder = draw_size(rng, config.data.image_px), config.data.edits.photos
    if kind == "canvas":
        return draw_canvas(rng, size)
    draw = draw_window if kind == "photograph" else draw_generated
    picture = draw(rng, split, folder, size=size)
    return replace(picture, pixels=augment(rng, picture.pixels)) if split == "train" else picture


def _disturbed(rng: Generator, config: Config, split: str, change: Change) -> tuple[bytes, bytes]:
    """Return the PNG bytes of the images before and after, of which some are disturbed (module `nuisance`)."""
    limits, pair = config.data.nuisance, (nuisance.Disturbance(), nuisance.Disturbance())
    if rng.random() < limits.share:
        pair = nuisance.draw_pair(rng, limits, strength=1.0 if split == "train" else limits.heldout_strength,
                                  skip=CONFLICTS.get(change.operation, ()))
    before, after = (_encode(rng, nuisance.apply(rng, pixels, disturbance))
                     for pixels, disturbance in zip((change.before, change.after), pair, strict=True))
    return before, after


def _words(rng: Generator, change: Change) -> dict[str, Any]:
    """Return the fields of a record that describe the change in words."""
    thing = change.thing
    return {"references": [template.format(old=f"{thing.color} {say(rng, thing.shape)}" if thing else "",
                                           new=change.new)
                           for template in phrasings(rng, EDIT_TEMPLATES[change.operation], NUM_REFERENCES)],
            "instruction": pick(rng, INSTRUCTIONS["edits"]), "change_type": change.operation}


def _facts(change: Change) -> dict[str, Any]:
    """Return the entries of the provenance that describe the change."""
    thing = change.thing
    return {"new": change.new, "region_before": change.region_before, "region_after": change.region_after,
            "object": thing and {key: getattr(thing, key) for key in ("shape", "color", "size", "material")}}


def _encode(rng: Generator, pixels: Pixels) -> bytes:
    """Return PNG bytes after a JPEG round trip of random quality.

    Without the round trip, the two images of an unchanged pair (`none`) would be recognizable by equal bytes.
    """
    lossy = io.BytesIO()
    Image.fromarray(pixels).save(lossy, "JPEG", quality=int(rng.integers(88, 98)), subsampling=0)
    return png(Image.open(lossy))
