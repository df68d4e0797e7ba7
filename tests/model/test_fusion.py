"""Tests of Fusion with the small random model of parts.py.

Shapes:  P pairs, S cells per side of the stem's map, G places per side, Q = G * G places, N patches per image,
         L levels of the vision tower, F channels of the stem, C width of the vision tower, W width of the joined map.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import CHANNELS, FUSION, SIDE, WIDTH, batch_of, small
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from onediff.inputs.processing import IGNORED
from onediff.model.fusion import CELL_PX, Comparison, Fusion

P, C, N = 3, CHANNELS, SIDE**2
F, W = FUSION["delta_fusion"]["channels"], FUSION["delta_fusion"]["width"]
NUM_TOKENS = 2 + len(FUSION["delta_classes"])


def fusion() -> Fusion:
    """Return the Fusion of a small model whose 12 x 12 pixels have 3 x 3 patches, cells and places."""
    module = small(**FUSION).fusion
    assert module is not None
    return module


def pairs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (P, 2, 3, 12, 12) and the hidden states of both images (P, L, N, C)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(P, 2, 3, 12, 12, generator=generator), torch.randn(P, 4, N, C, generator=generator),
            torch.randn(P, 4, N, C, generator=generator))


def test_the_views_of_a_comparison_equal_a_loop_over_places() -> None:
    side, channels, spacing = 3, 5, 2 / 3
    torch.manual_seed(2)
    compare = Comparison(channels, side, spacing=spacing)
    before, after = torch.randn(2, P, side * side, channels)
    seen, views = compare(before, after)
    sharpness, nearness = compare.match.sharpness, compare.match.nearness
    for pair in range(P):
        b, a = compare.norm(before[pair]), compare.norm(after[pair])
        assert_close(seen[pair], torch.stack([b, a]))
        for here in range(side * side):
            similar = {"after": [], "before": []}
            for there in range(side * side):
                rows, columns = here // side - there // side, here % side - there % side
                penalty = nearness * (rows**2 + columns**2) * spacing**2  # in patches of the vision tower
                similar["after"].append(sharpness * (b[here] @ a[there]) / channels**0.5 - penalty)
                similar["before"].append(sharpness * (a[here] @ b[there]) / channels**0.5 - penalty)
            matches = [torch.stack([each.squeeze() for each in similar[name]]).softmax(0) @ other
                       for name, other in (("after", a), ("before", b))]
            expected = [b[here], a[here], a[here] - b[here], b[here] - matches[0], a[here] - matches[1]]
            assert_close(views[pair, here], torch.cat(expected))


def test_the_joined_map_is_a_linear_function_of_all_views_of_a_place() -> None:
    module, (images, before, after) = fusion(), pairs()
    mixed: list[Tensor] = []
    module.mix.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
    fused = module(images, before, after)
    _, views = module.compare_pixels(images, fused.cells)
    tower = torch.cat([compare(before[:, level], after[:, level])[1]
                       for level, compare in zip(module.levels, module.compare_tower, strict=True)], -1)
    for place in range(SIDE * SIDE):  # Here places and patches have equal positions.
        row, column = divmod(place, SIDE)
        both = torch.cat([views[:, place], tower[:, place]], -1)
        weight = torch.cat([module.join_stem.weight, module.join_tower.weight], 1)
        expected = both @ weight.T + module.join_stem.bias + module.positions[:, row, column]
        expected = expected + module.join_camera(module.registration(images).flatten(1))
        assert_close(mixed[0][:, :, row, column], functional.gelu(expected))


def test_the_output_has_the_documented_shapes_and_a_pair_does_not_depend_on_the_other_pairs() -> None:
    module, (images, before, after) = fusion(), pairs()
    fused, alone = module(images, before, after), module(images[1:2], before[1:2], after[1:2])
    shapes = {"cells": (P, 2, F, 3, 3), "joined": (P, W, 3, 3), "keys": (P, N, WIDTH), "patches": (P, N, W),
              "tokens": (P, 2, WIDTH), "places": (P, 2, 3, 3), "changed": (P,)}
    for name, shape in shapes.items():
        assert getattr(fused, name).shape == shape
        assert_close(getattr(fused, name)[1:2], getattr(alone, name))
    assert [each.shape for each in fused.attributes] == [(P, 6), (P, 4)]


@pytest.mark.parametrize(("image_px", "places"), [(24, 6), (24, 3), (36, 9), (36, 3)])
def test_images_and_maps_of_other_sizes_are_resampled_between_places_and_patches(image_px: int, places: int) -> None:
    config = small(**FUSION).config
    config.vision_config.image_size = image_px
    config.delta_fusion = config.delta_fusion | {"places": places}
    side, cells = config.patches_per_side, image_px // CELL_PX
    module, images = Fusion(config), torch.randn(P, 2, 3, image_px, image_px)
    before, after = torch.randn(2, P, 4, side**2, C)
    fused = module(images, before, after)
    assert fused.cells.shape == (P, 2, F, cells, cells)
    assert fused.places.shape == (P, 2, places, places)
    assert_close(fused.patches, functional.adaptive_avg_pool2d(fused.joined, side).flatten(2).transpose(1, 2))
    by_patch = torch.randn(P, C, side, side)
    expected = functional.interpolate(by_patch, size=(places, places), mode="bilinear", align_corners=False)
    assert_close(module.to_places @ by_patch.flatten(2).transpose(1, 2), expected.flatten(2).transpose(1, 2))


def test_swapping_the_images_swaps_what_both_sides_see() -> None:
    module, (images, before, after) = fusion(), pairs()
    fused, swapped = module(images, before, after), module(images.flip(1), after, before)
    assert_close(swapped.cells, fused.cells.flip(1))
    (seen, views), (seen_swapped, views_swapped) = (
        module.compare_pixels(pixels, each.cells) for pixels, each in ((images, fused), (images.flip(1), swapped)))
    assert_close(seen_swapped, seen.flip(1))
    assert_close(module.registration(images.flip(1)), module.registration(images).flip(1))
    one, two, change, lost, new = views[..., : 5 * F].split(F, -1)
    assert_close(views_swapped[..., : 5 * F], torch.cat([two, one, -change, new, lost], -1))
    assert not torch.allclose(swapped.joined, fused.joined, atol=1e-3)


def test_brighter_pixels_have_a_higher_mean_and_more_contrast_has_more_spread() -> None:
    images, _, _ = pairs()
    mean, spread = fusion().colors(images).split(3, -1)
    brighter_mean, brighter_spread = fusion().colors(images + 0.7).split(3, -1)
    assert_close(brighter_mean, mean + 0.7)
    assert_close(brighter_spread, spread, atol=1e-4, rtol=0)
    assert_close(fusion().colors(2 * images).split(3, -1)[1], 2 * spread, atol=1e-4, rtol=0)


def test_the_contrast_of_bright_pixels_is_exact_in_bfloat16() -> None:
    images = (2.5 + 0.1 * pairs()[0]).bfloat16()
    spread = fusion().colors(images)[..., 3:]
    assert_close(spread.float(), fusion().colors(images.float())[..., 3:], atol=1e-3, rtol=0)


def targets(num_pairs: int = 1) -> dict[str, Tensor]:
    return {"place_targets": torch.rand(num_pairs, 2, 9), "changed_targets": torch.ones(num_pairs),
            "object_targets": torch.tensor([[3, 1]] * num_pairs)}


@pytest.mark.parametrize("reading", ["A", "C"])
@pytest.mark.parametrize("name", ["loss", "place", "changed", "object"])
def test_the_gradient_of_each_loss_reaches_the_stem(name: str, reading: str) -> None:
    model = small(**FUSION, reading=reading).train()
    batch = batch_of(model, [2])
    labels = batch["input_ids"].clamp(max=96)
    model(**batch, labels=labels, **targets())[name].backward()
    assert model.fusion.stem.first[0].weight.grad.abs().max() > 0


def test_without_known_targets_the_auxiliary_losses_are_0() -> None:
    model = small(**FUSION)
    batch = batch_of(model, [2, 2])
    unknown = {key: torch.full_like(value, IGNORED) for key, value in targets(2).items()}
    output = model(**batch, labels=batch["input_ids"].clamp(max=96), **unknown)
    assert (output.place, output.changed, output.object) == (0, 0, 0)


def test_the_auxiliary_losses_of_micro_batches_add_up_to_those_of_the_batch() -> None:
    model, known = small(**FUSION), targets(2)
    batch = batch_of(model, [2, 0, 2])
    labels = batch["input_ids"].clamp(max=96)
    complete = model(**batch, labels=labels, **known)
    parts: dict[str, Any] = {"place": 0, "changed": 0, "object": 0}
    for rows, images, part in ((slice(0, 1), slice(0, 2), slice(0, 1)), (slice(1, 3), slice(2, 4), slice(1, 2))):
        micro = {key: value[images if key == "images" else rows] for key, value in batch.items()}
        output = model(**micro, labels=labels[rows], num_rows=torch.tensor(3.0),
                       **{key: value[part] for key, value in known.items()})
        parts = {name: parts[name] + output[name] for name in parts}
    for name, total in parts.items():
        assert_close(total, complete[name])


@pytest.mark.parametrize("reading", ["A", "C"])
def test_cached_states_give_the_losses_and_gradients_of_images_for_rows_of_0_1_and_2_images(reading: str) -> None:
    model = small(**FUSION, reading=reading).train()
    batch = batch_of(model, [1, 2, 0, 2])
    batch |= targets(2) | {"labels": batch["input_ids"].clamp(max=96)}
    states = model.vision(batch["images"]).detach()
    results = []
    for known in ({}, {"states": states}):
        model.zero_grad()
        output = model(**batch, **known)
        (output.loss + output.place + output.changed + output.object).backward()
        results.append([output.loss, output.place, output.changed, output.object,
                        *(p.grad for name, p in model.named_parameters() if not name.startswith("vision."))])
    for computed, cached in zip(*results, strict=True):
        assert_close(cached, computed)
    assert len(results[0]) > 50


def test_targets_of_too_few_pairs_are_refused() -> None:
    model = small(**FUSION)
    batch = batch_of(model, [2, 2])
    with pytest.raises(AssertionError, match="targets of every pair"):
        model(**batch, labels=batch["input_ids"].clamp(max=96), **targets(1))


def test_a_batch_without_pairs_has_auxiliary_losses_of_0_although_training_adds_a_blank_pair() -> None:
    model = small(**FUSION).train()
    batch = batch_of(model, [1, 0])
    output = model(**batch, labels=batch["input_ids"].clamp(max=96), **targets(0) | {
        "object_targets": torch.zeros(0, 2, dtype=torch.long)})
    assert (output.place, output.changed, output.object) == (0, 0, 0)


def test_the_language_model_reads_the_tokens_of_fusion_behind_the_delta_tokens() -> None:
    model = small(**FUSION)
    assert model.config.delta_tokens_read == model.config.delta_num_tokens + NUM_TOKENS
    states, counts = torch.randn(2, 4, N, C), torch.tensor([2])
    fused = model.fuse(torch.randn(2, 3, 12, 12), states, counts)
    _, delta = model.project_visual_tokens(states, counts, fused)
    num_words = len(FUSION["delta_classes"])
    assert_close(delta[:, -NUM_TOKENS:-num_words], model.delta_projector(fused.tokens))
    words = model.attribute_tokens(fused.attributes, model.language.get_input_embeddings())
    assert_close(delta[:, -num_words:], words)


def test_a_row_with_one_image_has_zeros_instead_of_the_joined_map() -> None:
    model = small(**FUSION, reading="C")
    patches, counts = torch.randn(3, N, C), torch.tensor([1, 0, 2])
    fused = model.fuse(torch.randn(3, 3, 12, 12), torch.randn(3, 4, N, C), counts)
    joined = model.join(patches, counts, fused)
    assert joined.shape == (2, N, 2 * C + W)
    assert not joined[0, :, 2 * C :].any()
    assert_close(joined[1, :, 2 * C :], fused.patches[0])
