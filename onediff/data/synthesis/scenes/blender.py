"""The scenes of render.py in photographic quality: Cycles, Blender's path tracer, through the package `bpy`.

Same camera, light direction, shapes, sizes, colours and places. What differs is how light behaves: soft shadows,
objects that reflect each other, rounded edges. Seed and samples are fixed, so a scene gives the same bytes again on the
same kind of processor; another one, or a GPU, may round differently. Blender keeps one global scene: one frame at a
time per process.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onediff.data.synthesis.render import COLORS, FOV, TABLE, Camera, Thing, View, object_ids

SAMPLES = 64  # light paths per pixel; not denoised, because Blender's denoiser gives other bytes each time
SUN_ANGLE = 0.09  # apparent width of the light in radians: how soft shadows are
ROUNDING = 0.05  # of edges, as a share of the object's half extent
TABLE_SIZE = 80.0
CEILING = (1.3, 0.25)  # what shiny objects mirror: brightness straight above, and at the horizon


def load() -> Any:
    """The module bpy. Raises ValueError if it is not installed or lacks a library of the system."""
    try:
        with _silenced(1, 2):  # it complains about missing loudspeakers and about NumPy 2, which it is not handed here
            return importlib.import_module("bpy")
    except ModuleNotFoundError as error:
        if error.name != "bpy":
            raise
        raise ValueError("params.yaml: data.scenes.renderer 'blender' needs Blender: 'make blender', "
                         "or set renderer to raytracer") from None
    except ImportError as error:
        raise ValueError(f"params.yaml: data.scenes.renderer 'blender': bpy cannot start ({error}): install the system "
                         "libraries it names, or set renderer to raytracer") from None


def choose_device(device: str) -> None:
    """`cuda` renders on the first GPU kind that Cycles finds, `cpu` on one core, `auto` on a GPU where there is one."""
    bpy = _studio()
    kinds = ("OPTIX", "CUDA") if device == "cuda" or (device == "auto" and os.path.exists("/dev/nvidia0")) else ()
    preferences = bpy.context.preferences.addons["cycles"].preferences
    for kind in kinds:
        preferences.compute_device_type = kind
        preferences.get_devices()
        found = [entry for entry in preferences.devices if entry.type == kind]
        if found:
            for entry in preferences.devices:
                entry.use = entry in found
            bpy.context.scene.cycles.device = "GPU"
            return
    if device == "cuda":
        raise ValueError("runtime.yaml: device 'cuda': Cycles finds no GPU; set it to auto or cpu")
    bpy.context.scene.cycles.device = "CPU"


def render(things: list[Thing], view: View, image_px: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """-> image (P, P, 3) uint8, and ids (P, P) as render.py's own: which object each pixel shows, -1 for the table."""
    bpy = _studio()
    scene = bpy.context.scene
    made = [_add(bpy, thing) for thing in things]
    _aim(scene, view)
    scene.render.resolution_x = scene.render.resolution_y = image_px
    with tempfile.TemporaryDirectory(prefix="onediff-") as folder:
        path = Path(folder) / "frame.png"
        scene.render.filepath = str(path)
        with _silenced(1):
            bpy.ops.render.render(write_still=True)
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    for placed in made:
        bpy.data.meshes.remove(placed.data)  # and with it the object
    return pixels, object_ids(things, view, image_px)


@contextmanager
def _silenced(*streams: int) -> Iterator[None]:
    """Sends the process's own streams to nowhere: Blender writes past Python's."""
    kept = [(stream, os.dup(stream)) for stream in streams]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in streams:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


# --- what stays from frame to frame -----------------------------------------------------------------------------------


@functools.cache
def _studio() -> Any:
    """bpy with an empty scene in it: table, camera, sun, surroundings, and how Cycles is to work."""
    bpy = load()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    _set_up_cycles(scene)
    camera, sun = bpy.data.cameras.new("camera"), bpy.data.lights.new("sun", "SUN")
    camera.angle, sun.angle = 2 * math.atan(FOV), SUN_ANGLE
    for name, data in (("camera", camera), ("sun", sun)):
        scene.collection.objects.link(bpy.data.objects.new(name, data))
    scene.camera = bpy.data.objects["camera"]
    half = TABLE_SIZE / 2
    table = bpy.data.meshes.new("table")
    table.from_pydata([(-half, -half, 0), (half, -half, 0), (half, half, 0), (-half, half, 0)], [], [(0, 1, 2, 3)])
    table.materials.append(_material(bpy, "table", TABLE, metallic=0.0, roughness=0.85))
    scene.collection.objects.link(bpy.data.objects.new("table", table))
    _surround(bpy, scene)
    return bpy


def _set_up_cycles(scene: Any) -> None:
    scene.render.engine = "CYCLES"
    scene.cycles.samples, scene.cycles.seed = SAMPLES, 0
    scene.cycles.use_adaptive_sampling = False
    scene.cycles.use_denoising = False
    scene.cycles.max_bounces = 4
    scene.render.threads_mode, scene.render.threads = "FIXED", 1  # one process per core already
    scene.render.image_settings.file_format, scene.render.image_settings.compression = "PNG", 0
    scene.render.image_settings.color_mode = "RGB"
    scene.view_settings.view_transform = "Standard"


def _surround(bpy: Any, scene: Any) -> None:
    """Even light for matte surfaces, and for mirrors a ceiling that is brightest above: nothing else is there."""
    world = scene.world = bpy.data.worlds.new("room")
    world.use_nodes = True
    world.cycles.sampling_method = "NONE"  # a map of where its light comes from would cost a second per frame
    nodes, links = world.node_tree.nodes, world.node_tree.links
    nodes.clear()
    path, where = nodes.new("ShaderNodeLightPath"), nodes.new("ShaderNodeTexCoord")
    split, ramp = nodes.new("ShaderNodeSeparateXYZ"), nodes.new("ShaderNodeMapRange")
    even, mirrored = nodes.new("ShaderNodeBackground"), nodes.new("ShaderNodeBackground")
    even.name, mirrored.name = "even", "mirrored"
    mix, out = nodes.new("ShaderNodeMixShader"), nodes.new("ShaderNodeOutputWorld")
    ramp.interpolation_type = "SMOOTHSTEP"
    for name, value in (("From Min", 0.2), ("From Max", 0.6), ("To Min", CEILING[1]), ("To Max", CEILING[0])):
        ramp.inputs[name].default_value = value
    for start, end in ((where.outputs["Generated"], split.inputs[0]), (split.outputs["Z"], ramp.inputs["Value"]),
                       (ramp.outputs["Result"], mirrored.inputs["Color"]),
                       (path.outputs["Is Glossy Ray"], mix.inputs[0]), (even.outputs[0], mix.inputs[1]),
                       (mirrored.outputs[0], mix.inputs[2]), (mix.outputs[0], out.inputs["Surface"])):
        links.new(start, end)


def _material(bpy: Any, name: str, color: tuple[float, float, float], *, metallic: float, roughness: float) -> Any:
    material = bpy.data.materials.get(name) or bpy.data.materials.new(name)
    material.use_nodes = True
    surface = next(node for node in material.node_tree.nodes if node.type == "BSDF_PRINCIPLED")
    surface.inputs["Base Color"].default_value = (*color, 1.0)
    surface.inputs["Metallic"].default_value = metallic
    surface.inputs["Roughness"].default_value = roughness
    surface.inputs["Specular IOR Level"].default_value = 0.5 if metallic else 0.2
    return material


# --- what changes -----------------------------------------------------------------------------------------------------


def _aim(scene: Any, view: View) -> None:
    from mathutils import Matrix

    camera = Camera.of(view)
    axes = (camera.right, camera.up, tuple(-value for value in camera.forward), camera.eye)
    scene.camera.matrix_world = Matrix([[axis[i] for axis in axes] for i in range(3)] + [[0, 0, 0, 1]])
    sun = scene.objects["sun"]
    sun.rotation_euler = (math.pi / 2 - view.light_elevation, 0.0, math.pi - view.light_azimuth)
    sun.data.energy = math.pi * view.light_power  # a matte surface then gives back its colour times light_power
    nodes = scene.world.node_tree.nodes
    nodes["even"].inputs["Strength"].default_value = view.ambient
    nodes["mirrored"].inputs["Strength"].default_value = 0.5 + view.ambient


def _add(bpy: Any, thing: Thing) -> Any:
    import bmesh

    mesh, shape, half = bpy.data.meshes.new("thing"), bmesh.new(), thing.half
    if thing.shape == "sphere":
        bmesh.ops.create_uvsphere(shape, u_segments=64, v_segments=32, radius=half)
    elif thing.shape == "cylinder":
        bmesh.ops.create_cone(shape, cap_ends=True, segments=64, radius1=half, radius2=half, depth=2 * half)
    else:
        bmesh.ops.create_cube(shape, size=2 * half)
    if thing.shape != "sphere":
        sharp = [edge for edge in shape.edges if edge.calc_face_angle() > 0.5]
        bmesh.ops.bevel(shape, geom=sharp, offset=ROUNDING * half, segments=3, profile=0.5, affect="EDGES")
    for face in shape.faces:
        face.smooth = thing.shape == "sphere" or (thing.shape == "cylinder" and abs(face.normal.z) < 0.5)
    shape.to_mesh(mesh)
    shape.free()
    shiny = thing.material == "shiny"
    mesh.materials.append(_material(bpy, f"{thing.material} {thing.color}", COLORS[thing.color],
                                    metallic=1.0 if shiny else 0.0, roughness=0.18 if shiny else 0.75))
    placed = bpy.data.objects.new("thing", mesh)
    placed.location, placed.rotation_euler = thing.centre, (0.0, 0.0, thing.rotation)
    bpy.context.scene.collection.objects.link(placed)
    return placed
