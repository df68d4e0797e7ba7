from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from onediff.data.synthesis.render import COLORS, SHAPES, render
from onediff.data.synthesis.scenes.drawing import draw_things, draw_view
from onediff.eval.analysis.grammar import parse, parse_edit
from onediff.train.pretrain import dialogue as chat
from onediff.train.pretrain.backbones import (
    ATTRIBUTES,
    FOLDER,
    IMAGE_PX,
    PATCH_PX,
    UNKNOWN,
    make_example,
    patch_labels,
    photometry,
)

ROOT = Path(__file__).resolve().parents[3]


def test_the_labels_of_each_patch_equal_labels_computed_by_counting_pixels() -> None:
    rng = np.random.default_rng(4)
    things = draw_things(rng, 4)
    assert things
    _, ids = render(things, draw_view(rng, 1.0), IMAGE_PX)
    attributes, present, offsets = patch_labels(ids, things)
    side = IMAGE_PX // PATCH_PX
    for n in range(side * side):
        row, column = divmod(n, side)
        patch = ids[row * PATCH_PX : (row + 1) * PATCH_PX, column * PATCH_PX : (column + 1) * PATCH_PX]
        counts = [int((patch == k).sum()) for k in range(len(things))]
        best = int(np.argmax(counts))
        is_present = counts[best] > 0.12 * PATCH_PX**2
        assert present[n] == is_present
        if not is_present:
            assert (attributes[n] == UNKNOWN).all()
            continue
        assert SHAPES[attributes[n, 0]] == things[best].shape
        assert tuple(COLORS)[attributes[n, 1]] == things[best].color
        rows, columns = np.nonzero(ids == best)
        offset = [columns.mean() / PATCH_PX - column - 0.5, rows.mean() / PATCH_PX - row - 0.5]
        assert np.allclose(offsets[n], offset, atol=1e-5)
    assert present.sum() > 4


def test_the_same_seed_gives_the_same_example() -> None:
    for seed in (0, 5, 11):
        first, second = make_example(seed), make_example(seed)
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.attributes, second.attributes)
        assert first.caption == second.caption


def test_photometry_measures_brightness_contrast_and_sharpness() -> None:
    images = torch.zeros(2, 3, IMAGE_PX, IMAGE_PX)
    images[0] = 0.5
    images[1, :, :, ::2] = 1.0
    flat, striped = photometry(images)[:, 10]
    assert torch.allclose(flat[:3], torch.tensor([0.5, 0.5, 0.5]))
    assert striped[3] > flat[3] + 1
    assert striped[4] > flat[4] + 1


def test_every_chat_sentence_can_be_parsed_by_the_caption_grammar() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        _, caption = chat.sentence(rng)
        assert parse(caption).change_type or parse_edit(caption).change_type, caption


def test_rows_without_images_have_no_image_placeholders() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt = chat.text_row(rng, ["a red cube", "a blue sphere"])
        assert prompt.num_images == 0
        assert "<image>" not in prompt.question and "<delta>" not in prompt.question


def test_the_committed_backbones_contain_only_a_vision_tower_and_a_language_model() -> None:
    parts = {"vision": ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."), "language": ("model.",)}
    for part, allowed in parts.items():
        with safe_open(ROOT / FOLDER / part / "model.safetensors", framework="np") as file:
            assert all(key.startswith(allowed) for key in file.keys())  # noqa: SIM118
    figures = json.loads((ROOT / FOLDER / "figures.json").read_text())
    assert {f"{name}_accuracy" for name in ATTRIBUTES} <= figures.keys()
