"""`scenes`: table tops as in CLEVR-Change: camera and light move in every pair, and at most one object changes.

Each base scene gives four frames (before and after, each from two cameras), hence changed pairs, their reversals with
the inverse caption, and distractors in which only camera and light moved. Park et al., ICCV 2019 (CLEVR-Change).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Config
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis.phrases import DIRECTIONS, INSTRUCTIONS, SCENE_TEMPLATES, phrasings, pick, say
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES, Camera, Thing, View, render, visible
from onediff.inputs.images import png

CHANGE_TYPES = ("color", "texture", "add", "drop", "move")
TABLE_REACH = 2.2  # objects stand within this distance of the middle, in x and in y
GAP = 0.45  # free table between two objects
MIN_MOVE = 1.7
MAX_TRIES = 400
_RNG_TAG = {"scenes": 1, "scenes_far": 2, "pretrain": 3}
_INVERSE = {"color": "color", "texture": "texture", "add": "drop", "drop": "add", "move": "move", "none": "none"}


@dataclass(frozen=True)
class Change:
    """What happened to which object; `before` or `after` is None where the object was added or dropped."""

    change_type: str
    before: Thing | None
    after: Thing | None
    direction: str | None = None

    @property
    def inverse(self) -> Change:
        opposite = {"left": "right", "right": "left", "front": "back", "back": "front", None: None}
        return Change(_INVERSE[self.change_type], self.after, self.before, opposite[self.direction])

    @property
    def new(self) -> str | None:
        """What the changed object has become: a color, a material or a direction."""
        if self.after is None or self.change_type in ("add", "none"):
            return None
        return {"color": self.after.color, "texture": self.after.material, "move": self.direction}[self.change_type]


@dataclass(frozen=True)
class Frame:
    png: bytes
    things: list[Thing]
    ids: NDArray[np.int8]


# --- drawing scenes ---------------------------------------------------------------------------------------------------


def draw_thing(rng: Generator, others: list[Thing]) -> Thing | None:
    """A random object that stands clear of the others, or None if no place was found."""
    thing = Thing(pick(rng, SHAPES), pick(rng, tuple(COLORS)), pick(rng, tuple(SIZES)), pick(rng, MATERIALS), 0.0, 0.0,
                  float(rng.uniform(0, math.pi / 2)))
    return place(rng, thing, others)


def place(rng: Generator, thing: Thing, others: list[Thing]) -> Thing | None:
    for _ in range(30):
        x, y = (float(value) for value in rng.uniform(-TABLE_REACH, TABLE_REACH, 2))
        if all(math.hypot(x - other.x, y - other.y) > thing.half + other.half + GAP for other in others):
            return replace(thing, x=x, y=y)
    return None


def draw_things(rng: Generator, count: int) -> list[Thing] | None:
    things: list[Thing] = []
    for _ in range(count):
        thing = draw_thing(rng, things)
        if thing is None:
            return None
        things.append(thing)
    return things


def draw_view(rng: Generator, jitter: float) -> View:
    """A camera and a light that wander around their usual places; jitter 0 is the usual place."""
    spread = rng.uniform(-1, 1, 9) * jitter
    return View(azimuth=0.19 * spread[0], elevation=0.66 + 0.05 * spread[1], distance=11.0 * (1 + 0.06 * spread[2]),
                target_x=0.45 * spread[3], target_y=0.45 * spread[4], light_azimuth=-0.6 + 0.9 * spread[5],
                light_elevation=0.9 + 0.18 * spread[6], light_power=0.75 * (1 + 0.45 * spread[7]),
                ambient=0.35 * (1 + 0.3 * spread[8]))


def draw_change(rng: Generator, things: list[Thing], change_type: str) -> Change | None:
    """A change of one object of the scene (`add`: of a new one), or None if there is no room for it."""
    old = things[int(rng.integers(len(things)))]
    rest = [thing for thing in things if thing is not old]
    if change_type == "add":
        new = draw_thing(rng, things)
        return Change("add", None, new) if new else None
    if change_type == "drop":
        return Change("drop", old, None)
    if change_type == "color":
        return Change("color", old, replace(old, color=pick(rng, tuple(c for c in COLORS if c != old.color))))
    if change_type == "texture":
        return Change("texture", old, replace(old, material=MATERIALS[1 - MATERIALS.index(old.material)]))
    moved = place(rng, old, rest)
    if moved is None:
        return None
    dx, dy = moved.x - old.x, moved.y - old.y
    if math.hypot(dx, dy) < MIN_MOVE or not (abs(dx) > 2 * abs(dy) or abs(dy) > 2 * abs(dx)):
        return None
    direction = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("back" if dy > 0 else "front")
    return Change("move", old, moved, direction)


# --- words ------------------------------------------------------------------------------------------------------------


def describe(rng: Generator, thing: Thing, scene: list[Thing]) -> str | None:
    """A noun phrase that fits no other object of the scene: attributes, plus a neighbour where needed; else None."""
    alike = [other for other in scene
             if other is not thing and (other.color, other.shape) == (thing.color, thing.shape)]
    options = [set(), {"size"}, {"material"}, {"size", "material"}]
    enough = [extra for extra in options if not any(_same(thing, other, extra) for other in alike)]
    if enough:
        return noun(rng, thing, enough[0] if rng.random() < 0.7 else enough[int(rng.integers(len(enough)))])
    for k in rng.permutation(len(scene)):
        neighbour = scene[int(k)]
        if neighbour is thing or sum((o.color, o.shape) == (neighbour.color, neighbour.shape) for o in scene) > 1:
            continue
        relation = _relation(thing, neighbour)
        if relation and all(_relation(other, neighbour) != relation for other in alike):
            return f"{noun(rng, thing, set())} {relation} the {noun(rng, neighbour, set())}"
    return None


def _same(a: Thing, b: Thing, attributes: set[str]) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in attributes)


def noun(rng: Generator, thing: Thing, extra: set[str]) -> str:
    words = [say(rng, thing.size)] if "size" in extra else []
    words.append(thing.color)
    words += [say(rng, thing.material)] if "material" in extra else []
    return " ".join([*words, say(rng, thing.shape)])


def name_objects(things: list[Thing], view: View) -> str:
    """The caption of a single frame: every object with all its attributes, from left to right."""
    camera = Camera.of(view)
    ordered = sorted(things, key=lambda thing: camera.project(thing.centre)[0])
    return ", ".join(f"a {t.size} {t.color} {t.material} {t.shape}" for t in ordered)


def _relation(thing: Thing, neighbour: Thing) -> str | None:
    dx, dy = thing.x - neighbour.x, thing.y - neighbour.y
    if max(abs(dx), abs(dy)) < 0.7:
        return None
    if abs(dx) > abs(dy):
        return "right of" if dx > 0 else "left of"
    return "behind" if dy > 0 else "in front of"


def caption(rng: Generator, change: Change, before: list[Thing], after: list[Thing], count: int) -> list[str] | None:
    """`count` references, each in another template; None if the changed object cannot be told from the others."""
    references = []
    for template in phrasings(rng, SCENE_TEMPLATES[change.change_type], count):
        new = change.new or ""
        if change.change_type == "none":
            references.append(template)
            continue
        old = describe(rng, change.before, before) if change.before else describe(rng, _known(change.after), after)
        if old is None:
            return None
        references.append(template.format(old=old, new=DIRECTIONS.get(new) or say(rng, new)))
    return references


def _known(thing: Thing | None) -> Thing:
    assert thing is not None, "a change has an object before or after"
    return thing


# --- records ----------------------------------------------------------------------------------------------------------


def scene_records(config: Config, split: str, index: int, *, source: str = "scenes") -> list[Record]:
    """All pairs of one base scene.

    Three for train (changed, reversed, distractor), else four (changed, its exact swap, two distractors).
    """
    jitter = config.data.scenes.far_jitter if source == "scenes_far" else config.data.scenes.jitter
    for attempt in range(MAX_TRIES):
        seed = [config.seed, _RNG_TAG[source], SPLITS.index(split), index, attempt]
        records = _try_scene(config, split, index, source=source, jitter=jitter, seed=seed)
        if records:
            return records
    raise ValueError(f"params.yaml: data.scenes: no decidable scene in {MAX_TRIES} tries; "
                     "lower max_objects or min_visible")


def _try_scene(config: Config, split: str, index: int, *, source: str, jitter: float,
               seed: list[int]) -> list[Record] | None:
    rng = np.random.default_rng(seed)
    scenes = config.data.scenes
    before = draw_things(rng, int(rng.integers(scenes.min_objects, scenes.max_objects + 1)))
    change = draw_change(rng, before, CHANGE_TYPES[index % len(CHANGE_TYPES)]) if before else None
    if before is None or change is None:
        return None
    after = [thing for thing in before if thing is not change.before] + ([change.after] if change.after else [])
    views = [draw_view(rng, jitter) for _ in range(4)]
    drawn = [before, before, after, after]
    if any(visible(things, view).min() < scenes.min_visible for things, view in zip(drawn, views, strict=True)):
        return None
    if change.direction and not _seen_moving(change, views):
        return None
    same = Change("none", None, None)
    b0, b1, a0, a1 = (_Shot(things, view) for things, view in zip(drawn, views, strict=True))
    if split == "train":
        plan = [("c", change, b0, a1), ("r", change.inverse, a0, b1),
                ("n", same, *((b0, b1) if rng.random() < 0.5 else (a1, a0)))]
    else:
        plan = [("c", change, b0, a1), ("s", change.inverse, a1, b0), ("n", same, b1, b0), ("m", same, a0, a1)]
    told = [caption(rng, what, left.things, right.things, 3) for _, what, left, right in plan]
    if any(references is None for references in told):
        return None
    group = f"{source}/{split}/{index:06d}"
    pairs = []
    for (letter, what, left, right), references in zip(plan, told, strict=True):
        f0, f1 = left.frame(config), right.frame(config)
        pairs.append(Record(
            pair_id=f"{source}-{split}-{index:06d}{letter}", source=source, split=split, group_id=group,
            before=f0.png, after=f1.png, references=references or [], instruction=pick(rng, INSTRUCTIONS["scenes"]),
            change_type=what.change_type,
            provenance=_provenance(what, f0, f1, seed) | _made_by(config) | {
                "swap_of": f"{source}-{split}-{index:06d}c" if letter == "s" else None,
                "captions": [name_objects(shot.things, shot.view) for shot in (left, right)]}))
    return pairs


class _Shot:
    """A frame rendered at most once."""

    def __init__(self, things: list[Thing], view: View) -> None:
        self.things, self.view = things, view
        self._frame: Frame | None = None

    def frame(self, config: Config) -> Frame:
        if self._frame is None:
            image, ids = _renderer(config)(self.things, self.view, config.data.image_px)
            self._frame = Frame(png(Image.fromarray(image)), self.things, ids)
        return self._frame


def prepare(config: Config, device: str) -> None:
    """Starts Blender, if it renders, before the first scene: so that a missing Blender is reported at once."""
    if config.data.scenes.renderer == "blender":
        from onediff.data.synthesis.scenes import blender

        blender.choose_device(device)


def _renderer(config: Config) -> Callable[[list[Thing], View, int], tuple[NDArray[np.uint8], NDArray[np.int8]]]:
    if config.data.scenes.renderer == "blender":
        from onediff.data.synthesis.scenes import blender  # heavy, and an extra

        return blender.render
    return render


def _seen_moving(change: Change, views: list[View]) -> bool:
    """Whether the way is at least a tenth of the image long on screen, in the camera of the first frame."""
    camera = Camera.of(views[0])
    u0, v0, _ = camera.project(_known(change.before).centre)
    u1, v1, _ = camera.project(_known(change.after).centre)
    return math.hypot(u1 - u0, v1 - v0) > 0.2


def _region(frame: Frame, thing: Thing | None) -> list[int] | None:
    """The object's box in pixels: left, top, right, bottom."""
    for k, other in enumerate(frame.things):
        if other is thing:
            rows, columns = np.nonzero(frame.ids == k)
            if rows.size:
                return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    return None


def _provenance(change: Change, before: Frame, after: Frame, seed: list[int]) -> dict[str, Any]:
    thing = change.before or change.after
    return {"seed": seed, "object": _attributes(thing) if thing else None, "new": change.new,
            "region_before": _region(before, change.before), "region_after": _region(after, change.after),
            "objects": [_attributes(thing) for thing in before.things]}


def _made_by(config: Config) -> dict[str, str]:
    """Said only of the renderer that is not the usual one."""
    renderer = config.data.scenes.renderer
    return {} if renderer == "raytracer" else {"renderer": renderer}


def _attributes(thing: Thing) -> dict[str, Any]:
    keep = asdict(thing)
    return {name: keep[name] for name in ("shape", "color", "size", "material")} | {
        "x": round(thing.x, 3), "y": round(thing.y, 3)}


def scenes(config: Config, split: str, *, source: str = "scenes") -> Iterator[Record]:
    """Every pair of the split, in order."""
    counts = config.data.scenes
    total = counts.num_far if source == "scenes_far" else getattr(counts.num_scenes, split)
    for index in range(total):
        yield from scene_records(config, split, index, source=source)
