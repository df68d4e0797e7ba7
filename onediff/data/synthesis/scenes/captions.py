"""Writes the captions of generated scenes and of the changes in them."""

from numpy.random import Generator

from onediff.data.synthesis.phrases import DIRECTIONS, SCENE_TEMPLATES, phrasings, say
from onediff.data.synthesis.render import Camera, Thing, View
from onediff.data.synthesis.scenes.drawing import Change

NUM_REFERENCES = 3


def caption(rng: Generator, change: Change, before: list[Thing], after: list[Thing]) -> list[str] | None:
    """Return the references of a change, each from a different template.

    Returns None if no phrase describes the changed object and no other object of the scene.
    """
    templates = phrasings(rng, SCENE_TEMPLATES[change.change_type], NUM_REFERENCES)
    if change.change_type == "none":
        return templates
    thing, scene = (change.before, before) if change.before else (change.after, after)
    assert thing is not None, "a change other than 'none' must have an object before or after"
    references, new = [], change.new or ""
    for template in templates:
        old = describe(rng, thing, scene)
        if old is None:
            return None
        references.append(template.format(old=old, new=DIRECTIONS.get(new) or say(rng, new)))
    return references


def describe(rng: Generator, thing: Thing, scene: list[Thing]) -> str | None:
    """Return a noun phrase that describes this object and no other object of the scene, or None if there is none.

    The phrase consists of attributes, and of the position relative to another object if attributes are not enough.
    """
    alike = [other for other in scene
             if other is not thing and (other.color, other.shape) == (thing.color, thing.shape)]
    options = [set(), {"size"}, {"material"}, {"size", "material"}]
    enough = [extra for extra in options
              if not any(all(getattr(thing, name) == getattr(other, name) for name in extra) for other in alike)]
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


def noun(rng: Generator, thing: Thing, extra: set[str]) -> str:
    """Return a noun phrase with the color and shape of the object, and with size and material if `extra` has them."""
    size = [say(rng, thing.size)] if "size" in extra else []
    material = [say(rng, thing.material)] if "material" in extra else []
    return " ".join([*size, thing.color, *material, say(rng, thing.shape)])


def _relation(thing: Thing, neighbour: Thing) -> str | None:
    """Return where the object is relative to the neighbour; None if both are too close to tell."""
    dx, dy = thing.x - neighbour.x, thing.y - neighbour.y
    if max(abs(dx), abs(dy)) < 0.7:
        return None
    if abs(dx) > abs(dy):
        return "right of" if dx > 0 else "left of"
    return "behind" if dy > 0 else "in front of"


def name_objects(things: list[Thing], view: View) -> str:
    """Return the caption of a single image: every object with all attributes, from left to right as the camera sees it.
    """
    camera = Camera.of(view)
    ordered = sorted(things, key=lambda thing: camera.project(thing.centre)[0])
    return ", ".join(f"a {t.size} {t.color} {t.material} {t.shape}" for t in ordered)
