from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onediff.config import Config, Stress
from onediff.data.record import Record
from onediff.data.synthesis.edits.records import edit_record
from onediff.data.synthesis.scenes.records import scene_records
from onediff.eval.analysis.behaviour import scene_behaviour
from onediff.eval.analysis.grammar import Change, parse, truth, undone
from onediff.eval.analysis.stress import (
    NUISANCES,
    WEAR,
    choose,
    compressed,
    curve_points,
    disturbed,
    figures,
    is_stressed,
    noise,
    num_trials,
    trials,
    unrelated,
)
from onediff.eval.floors import oracle
from onediff.eval.metrics.compute import score
from onediff.inputs.images import open_image, png

SEED = 7


@pytest.fixture(scope="module")
def scenes(micro: Config) -> list[Record]:
    return [record for index in range(5) for record in scene_records(micro, "test", index)]


@pytest.fixture(scope="module")
def edits(micro: Config) -> list[Record]:
    return [edit_record(micro, "train", index) for index in range(90)]


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(open_image(image), dtype=np.int64)


def captions_of(benchmark: str, records: list[Record], settings: Stress, text: Any) -> dict[str, dict[str, str]]:
    """Return the captions of every trial by pair_id; `text` is a function from a trial and a pair to the caption."""
    return {trial: {pair.pair_id: text(trial, pair) for pair in pairs}
            for trial, pairs in trials(benchmark, records, settings, seed=SEED)}


def test_equal_seeds_choose_equal_pairs_in_the_order_of_the_data() -> None:
    rows = [{"pair_id": f"p{i:03d}"} for i in range(50)]
    chosen = choose(rows, 11, seed=3)
    assert chosen == choose(rows, 11, seed=3) == sorted(chosen) and len(set(chosen)) == 11
    assert chosen != choose(rows, 11, seed=4)
    assert choose(rows, 99, seed=3) == [row["pair_id"] for row in rows]


def test_scenes_far_gets_no_stress_test_because_it_is_one() -> None:
    assert [name for name in ("scenes", "scenes_far", "edits", "street") if is_stressed(name)] == ["scenes", "edits",
                                                                                                "street"]


def test_each_trial_contains_every_pair_in_order(micro: Config, scenes: list[Record], edits: list[Record]) -> None:
    for benchmark, records in (("scenes", scenes), ("edits", edits), ("street", edits)):
        made = {trial: list(pairs) for trial, pairs in trials(benchmark, records, micro.stress, seed=SEED)}
        assert len(made) == num_trials(benchmark, micro.stress)
        assert all([pair.pair_id for pair in pairs] == [record.pair_id for record in records]
                   for pairs in made.values())
        assert made["plain"] == records
        assert all(pair.before == pair.after == record.after
                   for pair, record in zip(made["identical/after"], records, strict=True))
        assert [dataclasses.replace(pair, before=pair.after, after=pair.before) for pair in made["swapped"]] == records
        assert ("shift_percent/5" in made) == (benchmark == "scenes")
        # Pairs that are read only after all trials were started are the same.
        again = {trial: list(pairs) for trial, pairs in list(trials(benchmark, records, micro.stress, seed=SEED))}
        assert again == made


def test_the_images_of_unrelated_pairs_belong_to_two_groups(scenes: list[Record]) -> None:
    group_of = {image: record.group_id for record in scenes for image in record.images}
    pairs = unrelated(scenes, seed=SEED)
    assert len(pairs) == len(scenes)
    assert all(group_of[pair.before] == pair.group_id != group_of[pair.after] for pair in pairs)
    assert unrelated(scenes[:4], seed=SEED) == []


@pytest.mark.parametrize("perturbation", ["noise", "shift_percent", "scale_percent", "brightness_percent"])
def test_strength_0_changes_no_pixel_and_higher_strengths_change_more(scenes: list[Record], perturbation: str) -> None:
    record = scenes[0]
    assert all((pixels(new) == pixels(old)).all()
               for new, old in zip(disturbed(record, perturbation, 0, seed=SEED).images, record.images, strict=True))
    errors = [np.abs(pixels(disturbed(record, perturbation, strength, seed=SEED).after) - pixels(record.after)).mean()
              for strength in (2, 10, 30)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_noise_and_jpeg_give_the_bytes_of_a_plain_implementation(scenes: list[Record]) -> None:
    image = open_image(scenes[0].before)
    values = np.asarray(image, np.float64)
    values = values + 10 * np.random.default_rng(SEED).standard_normal(values.shape)
    expected = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    assert noise(image, 10, np.random.default_rng(SEED)) == png(expected)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    assert compressed(image, 20, np.random.default_rng(SEED)) == file.getvalue()


def test_a_lower_jpeg_quality_changes_the_image_more(scenes: list[Record]) -> None:
    image = pixels(scenes[0].before)
    errors = [np.abs(pixels(disturbed(scenes[0], "jpeg_quality", quality, seed=SEED).before) - image).mean()
              for quality in (95, 50, 10)]
    assert 0 < errors[0] < errors[1] < errors[2] < 20


def test_noise_and_jpeg_change_both_images_and_other_perturbations_only_one(scenes: list[Record]) -> None:
    record = scenes[0]
    assert {name for name in NUISANCES if disturbed(record, name, 20, seed=SEED).before != record.before} == set(WEAR)
    noisy = disturbed(record, "noise", 10, seed=SEED)
    first, second = (pixels(new) - pixels(old) for new, old in zip(noisy.images, record.images, strict=True))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05 and 9 < first.std() < 10.5
    other = disturbed(dataclasses.replace(record, pair_id="another"), "noise", 10, seed=SEED)
    assert other.before != noisy.before


def test_a_shift_moves_the_image_and_fills_the_border_with_edge_pixels(scenes: list[Record]) -> None:
    old, new = pixels(scenes[0].after), pixels(disturbed(scenes[0], "shift_percent", 10, seed=SEED).after)
    shifts = [(y, x) for y in range(-10, 11) for x in range(-10, 11)
              if (np.roll(old, (y, x), (0, 1))[10:-10, 10:-10] == new[10:-10, 10:-10]).all()]
    assert len(shifts) == 1 and 8 < np.hypot(*shifts[0]) < 11
    assert np.abs(new[:, 0] - new[:, -1]).max() > 0  # The shift does not wrap around to the opposite edge.


def test_scale_enlarges_the_center_of_the_image(scenes: list[Record]) -> None:
    dot = np.zeros((100, 100, 3), dtype=np.uint8)
    dot[40:60, 40:60] = 255
    record = dataclasses.replace(scenes[0], after=_encoded(dot))
    for percent in (-50, 50, 100):
        num_bright = (pixels(disturbed(record, "scale_percent", percent, seed=SEED).after)[..., 0] > 127).sum()
        assert num_bright == pytest.approx(400 * (1 + percent / 100) ** 2, rel=0.1)


def _encoded(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("perturbation", NUISANCES)
def test_a_broken_image_is_an_error(scenes: list[Record], perturbation: str) -> None:
    with pytest.raises(ValueError, match="corrupt or truncated image"):
        disturbed(dataclasses.replace(scenes[0], after=scenes[0].after[:300]), perturbation, 5, seed=SEED)


def test_only_noise_and_jpeg_are_tried_if_brightness_may_be_the_change(micro: Config) -> None:
    assert {name for name, _ in curve_points("scenes", micro.stress)} == set(NUISANCES)
    assert {name for name, _ in curve_points("edits", micro.stress)} == set(WEAR)
    assert {name for name, _ in curve_points("street", micro.stress)} == set(WEAR)


def test_true_captions_of_every_trial_get_the_best_figures(micro: Config, scenes: list[Record]) -> None:
    words = {"drop": "the {} is gone", "add": "a {} was added", "color": "the {} became {}",
             "texture": "the {} became {}", "move": "the {} moved to the {}"}

    def true_caption(trial: str, pair: Record) -> str:
        row = vars(pair)
        if trial.startswith("identical") or pair.change_type == "none":
            return "nothing has changed"
        back = undone(truth(row))
        if trial != "swapped" or back is None:
            return oracle(row)
        return words[back.change_type or ""].format(f"{back.color} {back.shape}", back.new or back.direction)

    rows = [vars(record) for record in scenes]
    got = figures("scenes", captions_of("scenes", scenes, micro.stress, true_caption), rows, micro.stress)
    assert got["identical"]["false_alarm_rate"] == got["identical"]["unreadable_rate"] == 0
    assert got["identical"]["same_caption_rate"] == got["swapped"]["same_caption_rate"] == 0
    assert got["swapped"]["num_pairs"] == 10
    assert got["swapped"]["swap_accuracy"] == got["swapped"]["swap_consistency"] == 1
    assert got["swapped"]["by_change_type"]["move"]["swap_accuracy"] == 1
    assert got["unrelated"]["no_change_rate"] == 0.5  # The captions describe the original pair of each record.


def test_captions_that_ignore_the_images_get_the_worst_figures(micro: Config, scenes: list[Record]) -> None:
    rows = [vars(record) for record in scenes]
    captions = captions_of("scenes", scenes, micro.stress,
                           lambda _, pair: f"the red cube is gone {pair.pair_id[-1]}"[:20])
    got = figures("scenes", captions, rows, micro.stress)
    assert got["identical"]["false_alarm_rate"] == got["identical"]["same_caption_rate"] == 1
    assert got["identical"]["by_change_type"]["none"]["num_pairs"] == 20
    assert got["unrelated"]["no_change_rate"] == got["swapped"]["swap_consistency"] == 0
    assert got["swapped"]["false_alarm_rate"] == 1
    assert parse(captions["plain"][scenes[0].pair_id]) == Change("drop", color="red", shape="cube")


def test_each_curve_begins_with_the_figures_of_the_unperturbed_pairs(micro: Config, scenes: list[Record]) -> None:
    rows = [vars(record) for record in scenes]
    captions = captions_of("scenes", scenes, micro.stress,
                           lambda trial, pair: oracle(vars(pair)) if trial == "plain" else "nothing was changed")
    got = figures("scenes", captions, rows, micro.stress)["curves"]
    plain = scene_behaviour(captions["plain"], rows)
    references = {row["pair_id"]: row["references"] for row in rows}
    cider = score(captions["plain"], references, metrics=["CIDEr"]).corpus["CIDEr"]
    assert set(got) == set(NUISANCES)
    for curve in got.values():
        assert next(iter(curve)) == "none" and len(curve) == 2
        assert curve["none"]["CIDEr"] == cider
        assert curve["none"]["false_alarm_rate"] == plain["false_alarm_rate"] == 0
        assert curve["none"]["changed_object_accuracy"] == plain["changed_object_accuracy"] == 1
        assert curve["none"]["intervals"]["change_type_accuracy"] == plain["intervals"]["change_type_accuracy"]
        worse = curve[list(curve)[1]]
        assert worse["change_type_accuracy"] == 0 and worse["CIDEr"] < cider


def test_swapped_edits_are_judged_by_the_operation_that_leads_back(micro: Config, edits: list[Record]) -> None:
    rows = [vars(record) for record in edits]
    got = figures("edits", captions_of("edits", edits, micro.stress, lambda _, pair: pair.references[0]), rows,
                  micro.stress)
    kinds = [record.change_type for record in edits]
    assert got["swapped"]["num_pairs"] == len(edits) - kinds.count("none")
    assert {kind: part["num_pairs"] for kind, part in got["swapped"]["by_change_type"].items()} == {
        kind: kinds.count(kind) for kind in sorted({*kinds} - {"none"})}
    assert got["swapped"]["swap_accuracy"] == got["swapped"]["swap_consistency"] == 0
    assert got["swapped"]["same_caption_rate"] == 1 and got["swapped"]["false_alarm_rate"] == 0
    assert got["curves"]["noise"]["20"]["operation_accuracy"] == 1
    assert got["identical"]["by_change_type"]["none"]["false_alarm_rate"] == 0
    assert got["identical"]["false_alarm_rate"] == pytest.approx(1 - kinds.count("none") / len(edits))


def test_captions_that_no_grammar_can_read_are_counted_apart_and_are_no_false_alarms(micro: Config,
                                                                                    scenes: list[Record]) -> None:
    rows = [vars(record) for record in scenes]
    got = figures("scenes", captions_of("scenes", scenes, micro.stress, lambda trial, _: "cubes cubes"), rows,
                  micro.stress)
    assert got["identical"]["unreadable_rate"] == got["unrelated"]["unreadable_rate"] == 1
    assert got["identical"]["false_alarm_rate"] == got["swapped"]["false_alarm_rate"] == 0
    assert got["unrelated"]["no_change_rate"] == got["swapped"]["swap_accuracy"] == 0
    assert got["curves"]["noise"]["20"]["unreadable_rate"] == 1


def test_captions_of_a_source_without_grammar_are_only_compared_with_each_other(micro: Config,
                                                                                edits: list[Record]) -> None:
    rows = [vars(record) | {"change_type": "unlabelled"} for record in edits]
    captions = captions_of("street", edits, micro.stress, lambda trial, _: "a car" if trial == "plain" else "a van")
    got = figures("street", captions, rows, micro.stress)
    for part in ("identical", "unrelated", "swapped"):
        assert set(got[part]) == {"same_caption_rate", "intervals"} and got[part]["same_caption_rate"] == 0
    assert set(got["curves"]["jpeg_quality"]["20"]) == {"CIDEr", "intervals"}
