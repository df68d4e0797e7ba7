from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from parts import CHANNELS, FUSION, SIDE, WIDTH, small
from PIL import Image

from onediff.config import Config
from onediff.data.record import Record
from onediff.model.assemble import build
from onediff.model.attention import attention_maps, attention_weights, heat_maps, per_image, recorded
from onediff.model.captioner import Captioner
from onediff.model.delta import Attention

B, N = 3, SIDE**2
VARIANTS = [{}, {"delta_inputs": "pair_and_difference"}, {"delta_inputs": "pair_and_matched_difference"},
            {"delta_cross_attention_every": 2}, {"delta_image_ids": False}, {"delta_num_tokens": 1}, FUSION]


def captioner(micro: Config, *, reading: str = "C", pool: int = 2, **delta: Any) -> Captioner:
    """Return the untrained model of the micro preset with the given settings of the Visual Delta Module."""
    settings = micro.model.model_copy(update={"reading": reading, "patch_pool": pool,
                                              "delta": micro.model.delta.model_copy(update=delta)})
    return Captioner(*build(settings, seed=7))


@pytest.fixture(scope="module")
def pair(scene_pairs: list[Record]) -> tuple[Image.Image, Image.Image]:
    return tuple(Image.open(io.BytesIO(image)).convert("RGB") for image in scene_pairs[0].images)


@pytest.mark.parametrize("num_queries", [3, 5, 11])
def test_recomputed_attention_weights_give_the_output_of_the_module(num_queries: int) -> None:
    torch.manual_seed(1)
    attention = Attention(12, 3).eval()
    queries, context = torch.randn(B, num_queries, 12), 3 * torch.randn(B, 7, 12)
    weights = attention_weights(attention, queries, context)
    value = attention.value(context).unflatten(-1, (3, -1)).transpose(1, 2)
    mixed = attention.out((weights @ value).transpose(1, 2).flatten(2))
    assert weights.shape == (B, 3, num_queries, 7)
    assert torch.allclose(attention.norm(queries + mixed), attention(queries, context), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_cross_attention_is_recorded_and_the_output_stays_equal(variant: dict[str, Any]) -> None:
    delta = small(**variant).delta
    before, after = torch.randn(2, B, 4, N, CHANNELS, generator=torch.Generator().manual_seed(2))
    fused = torch.randn(B, N, WIDTH) if variant is FUSION else None
    plain = delta(before, after, fused)
    with recorded(delta) as weights:
        while_recorded = delta(before, after, fused)
    views = 3 if variant.get("delta_inputs") == "pair_and_difference" or variant is FUSION else 2
    assert torch.equal(plain, while_recorded)
    assert [each.shape for each in weights] == [(B, views * N)] * 3
    assert all(torch.allclose(each.sum(-1), torch.ones(B), atol=1e-5) for each in weights)
    delta(before, after)
    assert len(weights) == 3  # Recording ended with the `with` block.


@pytest.mark.parametrize(("reading", "pool", "changes"), [
    ("A", 2, {"fusion": None}), ("B", 1, {"fusion": None}), ("C", 2, {"fusion": None}), ("A", 2, {}), ("C", 2, {})])
@pytest.mark.parametrize("inputs", ["pair", "pair_and_difference", "pair_and_matched_difference"])
def test_both_maps_of_a_pair_sum_to_1(micro: Config, pair: tuple[Image.Image, Image.Image], reading: str, pool: int,
                                      changes: dict[str, Any], inputs: str) -> None:
    maps = attention_maps(captioner(micro, reading=reading, pool=pool, inputs=inputs, **changes), [pair])[0]
    assert maps.before.shape == maps.after.shape == maps.change.shape == (8, 8)
    assert maps.before.sum() + maps.after.sum() == pytest.approx(1, abs=1e-5)
    assert set(maps.levels) == {2, 4}
    assert all(grids.sum() == pytest.approx(1, abs=1e-5) for grids in maps.levels.values())
    assert np.allclose(sum(maps.levels.values()) / 2, [maps.before, maps.after])


@pytest.mark.parametrize("inputs", ["pair", "pair_and_matched_difference"])
def test_without_image_ids_swapping_the_images_swaps_the_maps(micro: Config, inputs: str,
                                                              pair: tuple[Image.Image, Image.Image]) -> None:
    without_ids = captioner(micro, inputs=inputs, image_ids=False, fusion=None)
    maps, swapped = attention_maps(without_ids, [pair])[0], attention_maps(without_ids, [pair[::-1]])[0]
    assert np.allclose(maps.before, swapped.after, atol=1e-6) and np.allclose(maps.after, swapped.before, atol=1e-6)
    plain = attention_maps(captioner(micro, inputs=inputs), [pair])[0]
    other = attention_maps(captioner(micro, inputs=inputs), [pair[::-1]])[0]
    assert not np.allclose(plain.before, other.after, atol=1e-5)
    assert np.array_equal(plain.change, other.change)


def test_maps_of_a_model_without_delta_tokens_are_refused(micro: Config, pair: tuple[Image.Image, Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"num_tokens is 0, but attention maps need"):
        attention_maps(captioner(micro, reading="A", num_tokens=0, fusion=None), [pair])


def test_the_heat_maps_share_one_scale_from_0_to_1(micro: Config, pair: tuple[Image.Image, Image.Image]) -> None:
    model = captioner(micro)
    maps, heat = attention_maps(model, [pair])[0], np.stack(heat_maps(model, *pair))
    assert heat.max() == 1 and heat.min() >= 0
    assert np.allclose(heat / heat.sum(), [maps.before, maps.after])


def test_attention_to_the_difference_counts_half_for_each_image() -> None:
    weights = np.arange(12, dtype=np.float64).reshape(1, 1, 12)
    maps = per_image(weights, side=2)
    assert maps[0, 0, 0].tolist() == [[4, 5.5], [7, 8.5]] and maps[0, 0, 1].tolist() == [[8, 9.5], [11, 12.5]]
    assert maps.sum() == weights.sum()
