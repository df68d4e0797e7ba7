from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onediff.config import Config
from onediff.data.synthesis.render import Thing, View, object_ids, render
from onediff.data.synthesis.scenes import blender
from onediff.data.synthesis.scenes.records import scene_records

needs_blender = pytest.mark.skipif(importlib.util.find_spec("bpy") is None,
                                   reason="bpy is not installed: 'make blender'")
PX = 96
VIEW = View(azimuth=0.15, elevation=0.66, distance=11.0, target_x=0.3, target_y=-0.2, light_azimuth=-0.6,
            light_elevation=0.9, light_power=0.75, ambient=0.35)
THINGS = [Thing("cube", "red", "big", "matte", -1.6, 0.9, 0.4), Thing("sphere", "blue", "big", "matte", 1.7, 1.2, 0.0),
          Thing("cylinder", "green", "big", "matte", 0.2, -1.6, 1.1),
          Thing("cube", "purple", "small", "matte", 2.0, -1.5, 0.9)]
CHANNEL = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 1, 0), "purple": (1, 0, 1)}


def with_blender(config: Config) -> Config:
    scenes = config.data.scenes.model_copy(update={"renderer": "blender"})
    return config.model_copy(update={"data": config.data.model_copy(update={"scenes": scenes, "image_px": 48})})


def mask(image: NDArray[np.uint8], color: str) -> NDArray[np.bool_]:
    """Where the image is saturated and nearest to the colour; the table is grey."""
    pixels = image.astype(float)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    hue = (pixels - pixels.min(axis=2, keepdims=True)) / np.maximum(spread, 1)[..., None]
    names = list(CHANNEL)
    far = np.stack([np.abs(hue - np.array(CHANNEL[name])).sum(axis=2) for name in names])
    return (spread > 45) & (far.argmin(axis=0) == names.index(color))


@needs_blender
def test_every_object_is_where_the_ray_tracer_shows_it() -> None:
    image, ids = blender.render(THINGS, VIEW, PX)
    assert np.array_equal(ids, render(THINGS, VIEW, PX)[1])
    for k, thing in enumerate(THINGS):
        ours, theirs = ids == k, mask(image, thing.color)
        apart = np.mean(np.nonzero(ours), axis=1) - np.mean(np.nonzero(theirs), axis=1)
        distance = float(np.hypot(*apart))
        assert distance < 1.0, (thing, distance)
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.85


@needs_blender
@pytest.mark.parametrize("light_azimuth", [-1.2, 1.2])
def test_the_shadow_is_where_the_ray_tracer_shows_it(light_azimuth: float) -> None:
    view = View(**(asdict(VIEW) | {"light_azimuth": light_azimuth, "light_elevation": 0.6}))
    shadows = []
    for renderer in (render, blender.render):
        (image, ids), (empty, _) = renderer(THINGS[1:2], view, PX), renderer([], view, PX)
        shadows.append((ids < 0) & (image.mean(axis=2) < 0.85 * empty.mean(axis=2)))
    ours, theirs = shadows
    assert ours.sum() > 200
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.7


@needs_blender
def test_a_scene_gives_the_same_bytes_whatever_was_rendered_before() -> None:
    first, _ = blender.render(THINGS, VIEW, PX)
    blender.render(THINGS[:1], View(**(asdict(VIEW) | {"azimuth": -0.1, "ambient": 0.2})), 48)
    second, _ = blender.render(THINGS, VIEW, PX)
    assert np.array_equal(first, second)
    bpy = blender.load()
    assert {thing.name for thing in bpy.context.scene.objects} == {"camera", "sun", "table"}


@needs_blender
def test_shiny_differs_from_matte_and_more_light_is_brighter() -> None:
    matte, ids = blender.render(THINGS[1:2], VIEW, PX)
    shiny, _ = blender.render([Thing(**(vars(THINGS[1]) | {"material": "shiny"}))], VIEW, PX)
    assert np.abs(matte.astype(int) - shiny)[ids == 0].mean() > 10
    bright, _ = blender.render(THINGS[1:2], View(**(asdict(VIEW) | {"light_power": 1.0})), PX)
    assert bright.mean() > matte.mean() + 5


@needs_blender
def test_the_renderer_changes_only_the_images_and_the_provenance_of_a_record(micro: Config) -> None:
    config = with_blender(micro)
    tracers = config.data.model_copy(update={"scenes": micro.data.scenes})
    ours = scene_records(config.model_copy(update={"data": tracers}), "train", 1)
    for record, other in zip(scene_records(config, "train", 1), ours, strict=True):
        assert record.provenance == other.provenance | {"renderer": "blender"}
        assert (record.before, record.after) != (other.before, other.after)
        rest: dict[str, Any] = {"before": b"", "after": b"", "provenance": {}}
        assert vars(record) | rest == vars(other) | rest


@needs_blender
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_an_error_and_auto_uses_the_cpu() -> None:
    with pytest.raises(ValueError, match="device 'cuda': Cycles finds no GPU; set device to auto or cpu"):
        blender.choose_device("cuda")
    blender.choose_device("auto")
    assert blender.load().context.scene.cycles.device == "CPU"


def test_object_ids_equal_the_ids_of_a_rendered_image() -> None:
    assert np.array_equal(object_ids(THINGS, VIEW, 53), render(THINGS, VIEW, 53)[1])


def test_the_error_for_missing_blender_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bpy", None)
    with pytest.raises(ValueError, match=r"renderer 'blender' needs the package bpy, .*; run 'make blender'"):
        blender.load()


def test_the_error_for_a_missing_system_library_contains_the_name(monkeypatch: pytest.MonkeyPatch,
                                                                  tmp_path: Any) -> None:
    (tmp_path / "bpy.py").write_text("raise ImportError('libXi.so.6: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bpy", raising=False)
    with pytest.raises(ValueError, match=r"bpy cannot be imported \(libXi.so.6: cannot open .*; install the missing"):
        blender.load()
