"""A small ray tracer that renders spheres, cubes and cylinders of two materials on a table under one hard light.

The pixel arithmetic uses float64 and only + - * / sqrt and comparisons, whose results IEEE 754 defines exactly.
Therefore one seed gives identical bytes on every machine. In world coordinates, z points up and the table is the plane
z = 0. The unit of length is such that a big object is about 1.6 wide.

Shapes:  P pixels per image side, S rays per image side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Vector = tuple[float, float, float]

COLORS: dict[str, Vector] = {  # linear RGB
    "gray": (0.30, 0.30, 0.30), "red": (0.62, 0.03, 0.03), "blue": (0.03, 0.12, 0.70), "green": (0.04, 0.36, 0.05),
    "brown": (0.26, 0.10, 0.03), "purple": (0.36, 0.04, 0.55), "cyan": (0.05, 0.55, 0.60), "yellow": (0.85, 0.68, 0.03),
}
SHAPES = ("cube", "sphere", "cylinder")
SIZES = {"small": 0.48, "big": 0.82}  # half the width of an object, before multiplication by the factor of the shape
MATERIALS = ("matte", "shiny")
TABLE: Vector = (0.42, 0.40, 0.38)
FOV = 0.31  # half the width of the image plane at distance 1 from the camera


@dataclass(frozen=True)
class Thing:
    """One object on the table.

    The x axis points right and the y axis away from the camera; `rotation` is the angle about the vertical axis in
    radians.
    """

    shape: str
    color: str
    size: str
    material: str
    x: float
    y: float
    rotation: float

    @property
    def half(self) -> float:
        """Half the height of the object, which is also half the edge of a cube and the radius of other shapes."""
        return SIZES[self.size] * {"cube": 0.78, "sphere": 1.0, "cylinder": 0.84}[self.shape]

    @property
    def bound(self) -> float:
        """The radius of the smallest sphere around the centre of the object that contains the object."""
        return self.half * {"cube": math.sqrt(3.0), "sphere": 1.0, "cylinder": math.sqrt(2.0)}[self.shape]

    @property
    def centre(self) -> Vector:
        return (self.x, self.y, self.half)


@dataclass(frozen=True)
class View:
    """The camera and the light of one image: angles in radians, distance and target in world units."""

    azimuth: float
    elevation: float
    distance: float
    target_x: float
    target_y: float
    light_azimuth: float
    light_elevation: float
    light_power: float
    ambient: float


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: the position `eye` and three orthogonal unit vectors, all in world coordinates."""

    eye: Vector
    right: Vector
    up: Vector
    forward: Vector

    @classmethod
    def of(cls, view: View) -> Camera:
        """Return the camera of a view, which looks at a point 0.4 above the table."""
        ca, sa = math.cos(view.azimuth), math.sin(view.azimuth)
        ce, se = math.cos(view.elevation), math.sin(view.elevation)
        forward = (sa * ce, ca * ce, -se)
        eye = (view.target_x - view.distance * forward[0], view.target_y - view.distance * forward[1],
               0.4 - view.distance * forward[2])
        return cls(eye, (ca, -sa, 0.0), (sa * se, ca * se, ce), forward)

    def project(self, point: Vector) -> Vector:
        """Project a world point to (u, v, depth).

        u is -1 at the left border of the image and 1 at the right border, v is -1 at the bottom and 1 at the top.
        """
        offset = tuple(p - e for p, e in zip(point, self.eye, strict=True))
        depth = _dot(offset, self.forward)
        return _dot(offset, self.right) / (depth * FOV), _dot(offset, self.up) / (depth * FOV), depth


def _dot(a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _hit(thing: Thing, o: tuple, d: tuple[Array, ...]) -> Array:
    """Return the distance t at which each ray o + t d hits the object, or inf for rays that miss it.

    `o` is one common origin (three scalars) or an origin per ray (three arrays); `d` holds unit vectors.
    """
    ox, oy, oz = (axis - centre for axis, centre in zip(o, thing.centre, strict=True))
    dx, dy, dz = d
    half = thing.half
    with np.errstate(divide="ignore", invalid="ignore"):
        if thing.shape == "sphere":
            b = ox * dx + oy * dy + oz * dz
            disc = b * b - (ox * ox + oy * oy + oz * oz - half * half)
            t = -b - np.sqrt(disc)
            return np.where((disc > 0) & (t > 1e-6), t, np.inf)
        if thing.shape == "cylinder":
            a = dx * dx + dy * dy
            b = ox * dx + oy * dy
            disc = b * b - a * (ox * ox + oy * oy - half * half)
            root = np.sqrt(disc)
            near, far = (-b - root) / a, (-b + root) / a
            missed = ~(disc > 0)
        else:
            c, s = math.cos(thing.rotation), math.sin(thing.rotation)
            ox, oy, dx, dy = ox * c + oy * s, oy * c - ox * s, dx * c + dy * s, dy * c - dx * s
            tx1, tx2 = (-half - ox) / dx, (half - ox) / dx
            ty1, ty2 = (-half - oy) / dy, (half - oy) / dy
            near = np.maximum(np.minimum(tx1, tx2), np.minimum(ty1, ty2))
            far = np.minimum(np.maximum(tx1, tx2), np.maximum(ty1, ty2))
            missed = np.zeros(near.shape, dtype=bool)
        tz1, tz2 = (-half - oz) / dz, (half - oz) / dz
        near = np.maximum(near, np.minimum(tz1, tz2))
        far = np.minimum(far, np.maximum(tz1, tz2))
        return np.where(~missed & (near < far) & (near > 1e-6), near, np.inf)


def _normal(thing: Thing, p: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the outward unit normals of the object at the surface points `p`, both as three arrays."""
    x, y, z = (axis - centre for axis, centre in zip(p, thing.centre, strict=True))
    half = thing.half
    if thing.shape == "sphere":
        return x / half, y / half, z / half
    top = np.abs(z) > half * (1 - 1e-6)
    lid = np.where(z > 0, 1.0, -1.0)
    if thing.shape == "cylinder":
        return np.where(top, 0.0, x / half), np.where(top, 0.0, y / half), np.where(top, lid, 0.0)
    c, s = math.cos(thing.rotation), math.sin(thing.rotation)
    lx, ly = x * c + y * s, y * c - x * s
    side_x = np.abs(lx) >= np.abs(ly)
    nx = np.where(side_x, np.where(lx > 0, 1.0, -1.0), 0.0)
    ny = np.where(side_x, 0.0, np.where(ly > 0, 1.0, -1.0))
    return np.where(top, 0.0, nx * c - ny * s), np.where(top, 0.0, nx * s + ny * c), np.where(top, lid, 0.0)


def _window(thing: Thing, camera: Camera, side: int) -> tuple[slice, slice]:
    """Return the rows and columns of the image that contain the bounding sphere of the object, as two slices.

    `side` is the number of rays along each side of the image.
    """
    u, v, depth = camera.project(thing.centre)
    reach = thing.bound / math.sqrt(max(depth * depth - thing.bound**2, 1e-6)) / FOV * 1.2
    columns = slice(max(0, int((u - reach + 1) / 2 * side) - 1), min(side, int((u + reach + 1) / 2 * side) + 2))
    rows = slice(max(0, int((1 - v - reach) / 2 * side) - 1), min(side, int((1 - v + reach) / 2 * side) + 2))
    return rows, columns


def _trace(things: list[Thing], camera: Camera, side: int) -> tuple[tuple[Array, ...], Array, NDArray[np.int8]]:
    """Trace one ray per cell of a square grid with `side` rows and columns.

    Returns for each ray the direction (three arrays: x, y, z), the distance to the first surface that the ray hits, and
    the index of the object that was hit, which is -1 for the table.
    """
    axis = (np.arange(side) + 0.5) * (2.0 * FOV / side) - FOV
    u, v = axis[None, :], -axis[:, None]
    raw = tuple(camera.forward[i] + u * camera.right[i] + v * camera.up[i] for i in range(3))
    length = np.sqrt(_dot(raw, raw))
    d = tuple(component / length for component in raw)
    depth = np.where(d[2] < -1e-3, -camera.eye[2] / np.minimum(d[2], -1e-3), 60.0)
    ids = np.full((side, side), -1, dtype=np.int8)
    for k, thing in enumerate(things):
        window = _window(thing, camera, side)
        t = _hit(thing, camera.eye, (d[0][window], d[1][window], d[2][window]))
        nearer = t < depth[window]
        depth[window][nearer] = t[nearer]
        ids[window][nearer] = k
    return d, depth, ids


def _lit(things: list[Thing], p: tuple[Array, ...], light: Vector) -> NDArray[np.bool_]:
    """Return a mask of the points `p` that are not in the shadow of an object.

    `light` is the unit vector that points towards the light.
    """
    lit = np.ones(p[0].shape, dtype=bool)
    for thing in things:
        offset = tuple(centre - axis for centre, axis in zip(thing.centre, p, strict=True))
        along = _dot(offset, light)
        near = (_dot(offset, offset) - along * along < thing.bound**2) & (along > -thing.bound)
        where = np.nonzero(near & lit)
        o = tuple(axis[where] + 1e-4 * towards for axis, towards in zip(p, light, strict=True))
        towards = tuple(np.full(o[0].shape, value) for value in light)
        lit[where] = ~np.isfinite(_hit(thing, o, towards))
    return lit


def visible(things: list[Thing], view: View) -> NDArray[np.float64]:
    """Return the share of the image that each object fills, measured on a coarse grid without shading."""
    _, _, ids = _trace(things, Camera.of(view), 48)
    return np.bincount(ids.ravel() + 1, minlength=len(things) + 1)[1:] / ids.size


def object_ids(things: list[Thing], view: View, image_px: int, *, samples: int = 2) -> NDArray[np.int8]:
    """Return the index of the object that each pixel shows, as `render` does, without computing the image."""
    _, _, ids = _trace(things, Camera.of(view), image_px * samples)
    return np.ascontiguousarray(ids[::samples, ::samples])


def bounding_box(mask: NDArray[np.bool_]) -> list[int] | None:
    """Return [left, top, right, bottom] of the true pixels, right and bottom excluded; None if no pixel is true."""
    rows, columns = np.nonzero(mask)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1] if rows.size else None


def render(things: list[Thing], view: View, image_px: int, *,
           samples: int = 2) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Render a scene to an image (P, P, 3) and ids (P, P), where P is `image_px`.

    The ids contain the index of the object that each pixel shows, or -1 for the table. The color of a pixel is the mean
    of `samples` x `samples` rays, and the id comes from the first of these rays.
    """
    side = image_px * samples
    camera = Camera.of(view)
    d, depth, ids = _trace(things, camera, side)
    ce = math.cos(view.light_elevation)
    light = (math.sin(view.light_azimuth) * ce, math.cos(view.light_azimuth) * ce, math.sin(view.light_elevation))
    p = tuple(camera.eye[i] + depth * d[i] for i in range(3))
    lit = _lit(things, p, light)
    fade = 1.0 / (1.0 + 0.02 * (p[0] * p[0] + p[1] * p[1]))
    ground = (view.ambient + view.light_power * light[2] * lit) * fade
    image = np.stack([ground * TABLE[i] for i in range(3)])
    for k, thing in enumerate(things):
        where = ids == k
        if where.any():
            image[:, where] = _shade(thing, view, light, tuple(a[where] for a in p), tuple(a[where] for a in d),
                                     lit[where])
    # Adding the slices is much faster than a mean over two axes.
    first, *others = [image[:, row::samples, column::samples] for row in range(samples) for column in range(samples)]
    mean = sum(others, first) / samples**2
    pixels = np.floor(np.sqrt(np.clip(mean, 0.0, 1.0)) * 255.0 + 0.5).astype(np.uint8)  # gamma 2
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), np.ascontiguousarray(ids[::samples, ::samples])


def _shade(thing: Thing, view: View, light: Vector, p: tuple, d: tuple, lit: NDArray[np.bool_]) -> list[Array]:
    n = _normal(thing, p)
    facing = np.maximum(_dot(n, light), 0.0) * lit
    diffuse = view.ambient * (0.7 + 0.3 * n[2]) + view.light_power * facing
    base = COLORS[thing.color]
    if thing.material == "matte":
        return [diffuse * base[i] for i in range(3)]
    cosine = 2.0 * _dot(d, n)
    # The reflected ray r meets a bright ceiling, a dark wall or the table, depending on its direction.
    r = tuple(d[i] - cosine * n[i] for i in range(3))
    table = 0.75 / (1.0 + 2.0 * p[2] / np.maximum(-r[2], 0.05))
    room = np.where(r[2] > 0.4, 1.3, np.where(r[2] > 0.0, 0.1, table)) * (0.5 + view.ambient)
    glint = np.maximum(_dot(r, light), 0.0)
    for _ in range(4):  # Squaring four times gives the 16th power; `**` may round differently on other machines.
        glint = glint * glint
    white = 0.9 * view.light_power * glint * lit
    return [0.35 * diffuse * base[i] + room * (0.7 * base[i] + 0.12) + white for i in range(3)]
