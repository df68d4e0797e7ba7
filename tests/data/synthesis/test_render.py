from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from onediff.data.synthesis import render as module
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES, Camera, Thing, View, render, visible

VIEW = View(0.1, 0.66, 11.0, 0.2, -0.1, -0.6, 0.9, 0.75, 0.35)
THINGS = [Thing("cube", "red", "big", "matte", -1.1, 0.3, 0.4),
          Thing("sphere", "blue", "small", "shiny", 1.0, -0.7, 0.0),
          Thing("cylinder", "green", "big", "shiny", 0.6, 1.3, 0.0)]


def inside(thing: Thing, x: float, y: float, z: float) -> bool:
    """Whether a point is in the solid, from its definition."""
    cx, cy, cz = thing.centre
    dx, dy, dz = x - cx, y - cy, z - cz
    if thing.shape == "sphere":
        return dx * dx + dy * dy + dz * dz <= thing.half**2
    if thing.shape == "cylinder":
        return math.hypot(dx, dy) <= thing.half and abs(dz) <= thing.half
    c, s = math.cos(thing.rotation), math.sin(thing.rotation)
    return max(abs(dx * c + dy * s), abs(dy * c - dx * s), abs(dz)) <= thing.half


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.shape)
def test_a_ray_hits_where_small_steps_along_it_first_enter_the_object(thing: Thing) -> None:
    rng = np.random.default_rng(3)
    origin = (0.5, -9.0, 5.0)
    hits = 0
    for _ in range(60):
        target = np.array(thing.centre) + rng.normal(0, 0.5, 3)
        direction = target - np.array(origin)
        direction /= np.linalg.norm(direction)
        t = float(module._hit(thing, origin, tuple(np.array([d]) for d in direction))[0])
        steps = np.arange(8.0, 14.0, 0.004)
        entered = next((s for s in steps if inside(thing, *(np.array(origin) + s * direction))), math.inf)
        if math.isinf(entered):
            assert math.isinf(t) or inside(thing, *(np.array(origin) + (t + 1e-6) * direction))  # thinner than a step
        else:
            hits += 1
            assert t == pytest.approx(entered, abs=0.005)
    assert hits > 20


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.shape)
def test_normals_have_length_one_and_point_outward(thing: Thing) -> None:
    camera = Camera.of(VIEW)
    towards = np.array(thing.centre) - np.array(camera.eye)
    directions = towards / np.linalg.norm(towards) + np.random.default_rng(1).normal(0, 0.02, (40, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    t = module._hit(thing, camera.eye, tuple(directions.T))
    points = (np.array(camera.eye) + t[:, None] * directions)[np.isfinite(t)]
    normals = np.stack(module._normal(thing, tuple(points.T)), axis=1)
    assert len(points) > 20
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    for point, normal in zip(points, normals, strict=True):
        assert inside(thing, *(point - 1e-3 * normal))
        assert not inside(thing, *(point + 1e-3 * normal))


def test_the_window_contains_every_pixel_of_an_object() -> None:
    alone = [render([thing], VIEW, 64, samples=1)[1] for thing in THINGS]
    whole = module._window
    try:
        module._window = lambda thing, camera, side: (slice(0, side), slice(0, side))
        for thing, ids in zip(THINGS, alone, strict=True):
            assert np.array_equal(render([thing], VIEW, 64, samples=1)[1], ids)
    finally:
        module._window = whole


def test_a_near_object_hides_a_far_object() -> None:
    front = Thing("cube", "red", "big", "matte", 0.0, -1.5, 0.0)
    back = Thing("cube", "blue", "small", "matte", 0.0, 0.2, 0.0)
    level = View(0.0, 0.25, 11.0, 0.0, 0.0, -0.6, 0.9, 0.75, 0.35)
    share = visible([front, back], level)
    assert share[1] < 0.2 * visible([back], level)[0]
    assert share[0] == visible([front], level)[0]


def test_a_scene_gives_these_bytes_on_every_machine() -> None:
    image, ids = render(THINGS, VIEW, 64)
    assert hashlib.sha256(image.tobytes() + ids.tobytes()).hexdigest()[:16] == "4a646b84040b08a5"


def test_every_attribute_of_an_object_is_visible() -> None:
    base = render([THINGS[0]], VIEW, 48)[0].astype(float)
    for name, options in (("shape", SHAPES), ("color", COLORS), ("size", SIZES), ("material", MATERIALS)):
        for option in options:
            if option != getattr(THINGS[0], name):
                other = Thing(**(vars(THINGS[0]) | {name: option}))
                assert np.abs(render([other], VIEW, 48)[0] - base).max() > 40, (name, option)


def test_a_shadow_points_away_from_the_light() -> None:
    view = View(0.0, 1.2, 11.0, 0.0, 0.0, -math.pi / 2, 0.7, 0.75, 0.35)  # light from the left
    image, ids = render([Thing("cylinder", "gray", "big", "matte", 0.0, 0.0, 0.0)], view, 64)
    row = int(np.nonzero(ids == 0)[0].mean()) + 4
    columns = np.nonzero(ids[row] == 0)[0]
    assert image[row, columns.max() + 4].mean() < image[row, columns.min() - 4].mean() - 25
