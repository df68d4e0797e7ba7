"""Draws the random content of a pair of scenes: objects on a table, cameras, lights, and a change of one object."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from numpy.random import Generator

from onediff.data.synthesis.phrases import pick
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES, Thing, View

TABLE_REACH = 2.2  # largest distance of an object from the middle of the table, in x and in y
GAP = 0.45  # smallest distance between the edges of two objects
MIN_MOVE = 1.7  # smallest distance by which a moved object moves
OPPOSITE = {"add": "drop", "drop": "add", "left": "right", "right": "left", "front": "back", "back": "front"}


@dataclass(frozen=True)
class Change:
    """A change of one object: `before` is None if the object was added, `after` is None if it was removed."""

    change_type: str
    before: Thing | None
    after: Thing | None
    direction: str | None = None

    @property
    def inverse(self) -> Change:
        """The change that undoes this change."""
        direction = OPPOSITE[self.direction] if self.direction else None
        return Change(OPPOSITE.get(self.change_type, self.change_type), self.after, self.before, direction)

    @property
    def new(self) -> str | None:
        """The new color or material of the object, or the direction in which it moved; None for other changes."""
        if self.after is None:
            return None
        return {"color": self.after.color, "texture": self.after.material, "move": self.direction}.get(self.change_type)


def draw_things(rng: Generator, count: int) -> list[Thing] | None:
    """Draw `count` random objects that do not touch each other, or return None if one of them does not fit."""
    things: list[Thing] = []
    for _ in range(count):
        thing = _draw_thing(rng, things)
        if thing is None:
            return None
        things.append(thing)
    return things


def _draw_thing(rng: Generator, others: list[Thing]) -> Thing | None:
    thing = Thing(pick(rng, SHAPES), pick(rng, tuple(COLORS)), pick(rng, tuple(SIZES)), pick(rng, MATERIALS), 0.0, 0.0,
                  float(rng.uniform(0, math.pi / 2)))
    return _place(rng, thing, others)


def _place(rng: Generator, thing: Thing, others: list[Thing]) -> Thing | None:
    """Return the object at a random position away from `others`; None if 30 random positions are all too close."""
    for _ in range(30):
        x, y = (float(value) for value in rng.uniform(-TABLE_REACH, TABLE_REACH, 2))
        if all(math.hypot(x - other.x, y - other.y) > thing.half + other.half + GAP for other in others):
            return replace(thing, x=x, y=y)
    return None


def draw_view(rng: Generator, jitter: float) -> View:
    """Draw a random camera and light; `jitter` is how far both may be from their default positions (0: not at all)."""
    spread = rng.uniform(-1, 1, 9) * jitter
    return View(azimuth=0.19 * spread[0], elevation=0.66 + 0.05 * spread[1], distance=11.0 * (1 + 0.06 * spread[2]),
                target_x=0.45 * spread[3], target_y=0.45 * spread[4], light_azimuth=-0.6 + 0.9 * spread[5],
                light_elevation=0.9 + 0.18 * spread[6], light_power=0.75 * (1 + 0.45 * spread[7]),
                ambient=0.35 * (1 + 0.3 * spread[8]))


def draw_change(rng: Generator, things: list[Thing], change_type: str) -> Change | None:
    """Draw a change of the given type to one random object, or return None if no clear change was found.

    For `add` the object is new. A move must be long enough, and mainly left, right, front or back.
    """
    old = things[int(rng.integers(len(things)))]
    if change_type == "add":
        new = _draw_thing(rng, things)
        return Change("add", None, new) if new else None
    if change_type == "drop":
        return Change("drop", old, None)
    if change_type == "color":
        return Change("color", old, replace(old, color=pick(rng, tuple(c for c in COLORS if c != old.color))))
    if change_type == "texture":
        return Change("texture", old, replace(old, material=MATERIALS[1 - MATERIALS.index(old.material)]))
    moved = _place(rng, old, [thing for thing in things if thing is not old])
    if moved is None:
        return None
    dx, dy = moved.x - old.x, moved.y - old.y
    if math.hypot(dx, dy) < MIN_MOVE or not (abs(dx) > 2 * abs(dy) or abs(dy) > 2 * abs(dx)):
        return None
    direction = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("back" if dy > 0 else "front")
    return Change("move", old, moved, direction)
