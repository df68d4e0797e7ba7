"""Renders the scenes of render.py realistically with Cycles, the path tracer of Blender (package `bpy`).

Camera, light direction, shapes, sizes, colors and positions equal those of render.py. Only this renderer has soft
shadows, rounded edges, and objects that reflect each other. Seed and number of samples are fixed, so a scene gives
identical bytes on processors of one kind; a GPU or another kind of processor may round differently. Blender has one
global scene, so each process can render only one image at a time.
"""

import functools
import importlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onediff.data.synthesis.render import COLORS, FOV, TABLE, Camera, Thing, View, object_ids

SAMPLES = 64  # number of light paths per pixel; Blender's denoiser is not used, because its results differ each time
SUN_ANGLE = 0.09  # The apparent width of the light in radians; a wider light makes softer shadows.
ROUNDING = 0.05  # width of the rounded edges of an object, divided by half of the object's height
TABLE_SIZE = 80.0
CEILING = (1.3, 0.25)  # brightness of the surroundings that shiny objects reflect: straight above, and at the side


def load() -> Any:
    """Import and return Blender's module bpy; raise ValueError if bpy or a system library for it is not installed."""
    try:
        with _silenced(1, 2):  # bpy prints warnings about audio devices and NumPy 2, which do not matter here.
            return importlib.import_module("bpy")
    except ModuleNotFoundError as error:
        if error.name != "bpy":
            raise
        raise ValueError("params.yaml: data.scenes.renderer 'blender' needs the package bpy, which is not installed; "
                         "run 'make blender', or set renderer to raytracer") from None
    except ImportError as error:
        raise ValueError(f"params.yaml: data.scenes.renderer 'blender': bpy cannot be imported ({error}); install the "
                         "missing system libraries, or set renderer to raytracer") from None


def choose_device(device: str) -> None:
    """Choose where Cycles renders: `cuda` on a GPU, `cpu` on one core, `auto` on a GPU if the machine has one.

    Raises ValueError for `cuda` if Cycles finds no GPU.
    """
    bpy = _studio()
    kinds = ("OPTIX", "CUDA") if device == "cuda" or (device == "auto" and os.path.exists("/dev/nvidia0")) else ()
    preferences = bpy.context.preferences.addons["cycles"].preferences
    for kind in kinds:
        preferences.compute_device_type = kind
        preferences.get_devices()
        if any(entry.type == kind for entry in preferences.devices):
            for entry in preferences.devices:
                entry.use = entry.type == kind
            bpy.context.scene.cycles.device = "GPU"
            return
    if device == "cuda":
        raise ValueError("runtime.yaml: device 'cuda': Cycles finds no GPU; set device to auto or cpu")
    bpy.context.scene.cycles.device = "CPU"


def render(things: list[Thing], view: View, image_px: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Render a scene with Blender to an image (P, P, 3) and ids (P, P), where P is `image_px`.

    The ids contain the index of the object that each pixel shows, or -1 for the table.
    """
    bpy = _studio()
    scene = bpy.context.scene
    objects = [_add(bpy, thing) for thing in things]
    _aim(scene, view)
    with tempfile.TemporaryDirectory(prefix="onediff-") as folder:
        path = Path(folder) / "frame.png"
        _set(scene.render, resolution_x=image_px, resolution_y=image_px, filepath=str(path))
        with _silenced(1):
            bpy.ops.render.render(write_still=True)
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    for placed in objects:
        bpy.data.meshes.remove(placed.data)  # Removing the mesh also removes the object that uses it.
    return pixels, object_ids(things, view, image_px)


@contextmanager
def _silenced(*streams: int) -> Iterator[None]:
    """Redirect file descriptors to /dev/null during the `with` block, because Blender does not print to sys.stdout."""
    copies = {stream: os.dup(stream) for stream in streams}
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in streams:
            os.dup2(null, stream)
        yield
    finally:
        for stream, copy in copies.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)


def _set(target: Any, **values: Any) -> None:
    """Set several attributes of a Blender object."""
    for name, value in values.items():
        setattr(target, name, value)


def _set_inputs(node: Any, values: Mapping[str, Any]) -> None:
    """Set several inputs of a shader node."""
    for name, value in values.items():
        node.inputs[name].default_value = value


@functools.cache
def _studio() -> Any:
    """Return bpy with a scene that all images share: table, camera, sun, surroundings, and the settings of Cycles."""
    bpy = load()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    # One thread is enough, because one rendering process per CPU core is running.
    _set(scene.render, engine="CYCLES", threads_mode="FIXED", threads=1)
    _set(scene.cycles, samples=SAMPLES, seed=0, use_adaptive_sampling=False, use_denoising=False, max_bounces=4)
    _set(scene.render.image_settings, file_format="PNG", compression=0, color_mode="RGB")
    scene.view_settings.view_transform = "Standard"
    camera, sun = bpy.data.cameras.new("camera"), bpy.data.lights.new("sun", "SUN")
    camera.angle, sun.angle = 2 * math.atan(FOV), SUN_ANGLE
    table, half = bpy.data.meshes.new("table"), TABLE_SIZE / 2
    table.from_pydata([(-half, -half, 0), (half, -half, 0), (half, half, 0), (-half, half, 0)], [], [(0, 1, 2, 3)])
    table.materials.append(_material(bpy, "table", TABLE, metallic=0.0, roughness=0.85))
    for name, data in (("camera", camera), ("sun", sun), ("table", table)):
        scene.collection.objects.link(bpy.data.objects.new(name, data))
    scene.camera = bpy.data.objects["camera"]
    _surround(bpy, scene)
    return bpy


def _surround(bpy: Any, scene: Any) -> None:
    """Surround the scene with even light for matte surfaces, and with a ceiling that shiny surfaces reflect.

    The ceiling is brightest straight above the table.
    """
    world = scene.world = bpy.data.worlds.new("room")
    world.use_nodes = True
    world.cycles.sampling_method = "NONE"  # Sampling the surroundings by brightness would cost a second per image.
    nodes, links = world.node_tree.nodes, world.node_tree.links
    nodes.clear()
    path, position, split, ramp, even, mirrored, mix, out = (nodes.new(f"ShaderNode{kind}") for kind in (
        "LightPath", "TexCoord", "SeparateXYZ", "MapRange", "Background", "Background", "MixShader", "OutputWorld"))
    even.name, mirrored.name = "even", "mirrored"
    ramp.interpolation_type = "SMOOTHSTEP"
    _set_inputs(ramp, {"From Min": 0.2, "From Max": 0.6, "To Min": CEILING[1], "To Max": CEILING[0]})
    for start, end in ((position.outputs["Generated"], split.inputs[0]), (split.outputs["Z"], ramp.inputs["Value"]),
                       (ramp.outputs["Result"], mirrored.inputs["Color"]),
                       (path.outputs["Is Glossy Ray"], mix.inputs[0]), (even.outputs[0], mix.inputs[1]),
                       (mirrored.outputs[0], mix.inputs[2]), (mix.outputs[0], out.inputs["Surface"])):
        links.new(start, end)


def _material(bpy: Any, name: str, color: tuple[float, float, float], *, metallic: float, roughness: float) -> Any:
    """Return the Blender material `name` with this color, metallic share and roughness; create it if necessary."""
    material = bpy.data.materials.get(name) or bpy.data.materials.new(name)
    material.use_nodes = True
    surface = next(node for node in material.node_tree.nodes if node.type == "BSDF_PRINCIPLED")
    _set_inputs(surface, {"Base Color": (*color, 1.0), "Metallic": metallic, "Roughness": roughness,
                          "Specular IOR Level": 0.5 if metallic else 0.2})
    return material


def _aim(scene: Any, view: View) -> None:
    """Move the camera and the sun of the Blender scene, and set the brightness of the lights, as the view describes."""
    from mathutils import Matrix

    camera = Camera.of(view)
    axes = (camera.right, camera.up, tuple(-value for value in camera.forward), camera.eye)
    scene.camera.matrix_world = Matrix([[axis[i] for axis in axes] for i in range(3)] + [[0, 0, 0, 1]])
    sun, nodes = scene.objects["sun"], scene.world.node_tree.nodes
    sun.rotation_euler = (math.pi / 2 - view.light_elevation, 0.0, math.pi - view.light_azimuth)
    # With the factor pi, a matte surface that faces the sun reflects its color times light_power, as in render.py.
    sun.data.energy = math.pi * view.light_power
    _set_inputs(nodes["even"], {"Strength": view.ambient})
    _set_inputs(nodes["mirrored"], {"Strength": 0.5 + view.ambient})


def _add(bpy: Any, thing: Thing) -> Any:
    """Add an object to the scene as a mesh with a material, and return the Blender object."""
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
    metallic, roughness = (1.0, 0.18) if thing.material == "shiny" else (0.0, 0.75)
    mesh.materials.append(_material(bpy, f"{thing.material} {thing.color}", COLORS[thing.color], metallic=metallic,
                                    roughness=roughness))
    placed = bpy.data.objects.new("thing", mesh)
    placed.location, placed.rotation_euler = thing.centre, (0.0, 0.0, thing.rotation)
    bpy.context.scene.collection.objects.link(placed)
    return placed
