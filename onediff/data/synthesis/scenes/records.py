"""The source `scenes`: pairs of rendered table tops, as in CLEVR-Change (Park et al., ICCV 2019).

Camera and light move in every pair, and at most one object changes. Each base scene gives four images: before and after
the change, each from two cameras. They are combined to changed pairs, reversed pairs with the inverse caption, and
distractors, in which only camera and light moved. The images of a part of the scenes are disturbed (module `nuisance`).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Config, Data, Nuisance, Scenes
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis import nuisance
from onediff.data.synthesis.phrases import INSTRUCTIONS, pick
from onediff.data.synthesis.render import Camera, Thing, View, bounding_box, render, visible
from onediff.data.synthesis.scenes.captions import caption, name_objects
from onediff.data.synthesis.scenes.drawing import Change, draw_change, draw_things, draw_view
from onediff.inputs.images import png

CHANGE_TYPES = ("color", "texture", "add", "drop", "move")
MAX_TRIES = 400
# These numbers are part of every random seed, so that no two sources share random numbers; the source `edits` has 4.
SEED_TAGS = {"scenes": 1, "scenes_far": 2}


@dataclass
class Shot:
    """A scene seen from one camera; the image is rendered when a pair first needs it, and then kept."""

    things: list[Thing]
    view: View
    data: Data
    disturbance: nuisance.Disturbance
    noise: Generator

    @cached_property
    def frame(self) -> tuple[bytes, NDArray[np.int8]]:
        """The PNG bytes of the disturbed image, and the index of the object that each pixel shows (-1: the table)."""
        if self.data.scenes.renderer == "blender":
            from onediff.data.synthesis.scenes import blender  # optional and slow to import

            image, ids = blender.render(self.things, self.view, self.data.image_px)
        else:
            image, ids = render(self.things, self.view, self.data.image_px)
        return png(Image.fromarray(nuisance.apply(self.noise, image, self.disturbance))), ids

    def region(self, thing: Thing | None) -> list[int] | None:
        """Return the bounding box [left, top, right, bottom] of the object in pixels; None if no pixel shows it."""
        numbers = [number for number, other in enumerate(self.things) if other is thing]
        return bounding_box(np.isin(self.frame[1], numbers))


Pair = tuple[str, Change, Shot, Shot, list[str]]  # last letter of the pair_id, change, before, after, references


def scene_records(config: Config, split: str, index: int, *, source: str = "scenes") -> list[Record]:
    """Return the pairs of base scene number `index`.

    In the split `train`, a scene gives three pairs: changed, reversed and one distractor (an unchanged pair with
    another camera and light). In other splits, it gives four pairs: changed, the two images of this pair swapped, and
    two distractors. Raises ValueError if random drawing gives no scene with a clearly visible change.
    """
    for attempt in range(MAX_TRIES):
        seed = [config.seed, SEED_TAGS[source], SPLITS.index(split), index, attempt]
        rng = np.random.default_rng(seed)
        jitter = _draw_jitter(rng, config.data.scenes, split, source)
        pairs = _draw_pairs(rng, config.data, split, CHANGE_TYPES[index % len(CHANGE_TYPES)], jitter)
        if pairs:
            break
    else:
        raise ValueError(f"params.yaml: data.scenes: {MAX_TRIES} random scenes have no clearly visible change; "
                         "lower max_objects or min_visible")
    name, renderer = f"{source}-{split}-{index:06d}", config.data.scenes.renderer
    return [Record(pair_id=f"{name}{letter}", source=source, split=split, group_id=f"{source}/{split}/{index:06d}",
                   before=left.frame[0], after=right.frame[0], references=references,
                   instruction=pick(rng, INSTRUCTIONS["scenes"]), change_type=change.change_type,
                   provenance={"seed": seed, "object": _attributes(change.before or change.after), "new": change.new,
                               "region_before": left.region(change.before), "region_after": right.region(change.after),
                               "objects": [_attributes(thing) for thing in left.things],
                               "captions": [name_objects(shot.things, shot.view) for shot in (left, right)],
                               "swap_of": f"{name}c" if letter == "s" else None,
                               **({} if renderer == "raytracer" else {"renderer": renderer})})
            for letter, change, left, right, references in pairs]


def _draw_jitter(rng: Generator, scenes: Scenes, split: str, source: str) -> float:
    """Return the jitter of a scene; in `train`, it is drawn up to `train_jitter`, and its mean is 2/3 of the limit."""
    if source == "scenes_far":
        return scenes.far_jitter
    return scenes.train_jitter * math.sqrt(float(rng.random())) if split == "train" else scenes.jitter


def _draw_disturbances(rng: Generator, limits: Nuisance,
                       split: str) -> tuple[nuisance.Disturbance, nuisance.Disturbance]:
    """Draw the disturbances of the images of both cameras, of which every pair has one image each."""
    if rng.random() >= limits.share:
        return nuisance.Disturbance(), nuisance.Disturbance()
    return nuisance.draw_pair(rng, limits, strength=1.0 if split == "train" else limits.heldout_strength)


def _draw_pairs(rng: Generator, data: Data, split: str, change_type: str, jitter: float) -> list[Pair] | None:
    """Draw a scene and a change, and return the pairs; None if the change would be hard to see in one of the pairs."""
    scenes = data.scenes
    before = draw_things(rng, int(rng.integers(scenes.min_objects, scenes.max_objects + 1)))
    change = draw_change(rng, before, change_type) if before else None
    if before is None or change is None:
        return None
    after = [thing for thing in before if thing is not change.before] + ([change.after] if change.after else [])
    cameras = _draw_disturbances(rng, data.nuisance, split) * 2
    shots = [Shot(things, draw_view(rng, jitter), data, disturbance, noise) for things, disturbance, noise
             in zip((before, before, after, after), cameras, rng.spawn(4), strict=True)]
    if any(visible(shot.things, shot.view).min() < scenes.min_visible for shot in shots):
        return None
    b0, b1, a0, a1 = shots
    if change.before and change.after and change.direction:
        camera = Camera.of(b0.view)
        (u0, v0, _), (u1, v1, _) = camera.project(change.before.centre), camera.project(change.after.centre)
        # u and v run from -1 to 1, so a distance of 0.2 is a tenth of the width of the image.
        if math.hypot(u1 - u0, v1 - v0) <= 0.2:
            return None
    same = Change("none", None, None)
    if split == "train":
        plan = [("c", change, b0, a1), ("r", change.inverse, a0, b1),
                ("n", same, *((b0, b1) if rng.random() < 0.5 else (a1, a0)))]
    else:
        plan = [("c", change, b0, a1), ("s", change.inverse, a1, b0), ("n", same, b1, b0), ("m", same, a0, a1)]
    captions = [caption(rng, what, left.things, right.things) for _, what, left, right in plan]
    pairs = [(*pair, references) for pair, references in zip(plan, captions, strict=True) if references]
    return pairs if len(pairs) == len(plan) else None


def _attributes(thing: Thing | None) -> dict[str, Any] | None:
    return {"shape": thing.shape, "color": thing.color, "size": thing.size, "material": thing.material,
            "x": round(thing.x, 3), "y": round(thing.y, 3)} if thing else None
