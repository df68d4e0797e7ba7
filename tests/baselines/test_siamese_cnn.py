from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from onediff.baselines.siamese_cnn import (
    BEGIN,
    END,
    PAD,
    UNKNOWN,
    Architecture,
    Comparison,
    FeatureMatch,
    SiameseCaptioner,
    SiameseCNN,
    Vocabulary,
)
from onediff.baselines.siamese_training import Pairs, Training, draws, fit, rate_factor
from onediff.data.record import Record, write_shards

SMALL = Architecture(image_px=32, channels=(7, 11, 13), width=34, heads=2, layers=2, max_words=17)
OFTEN = Training(steps=260, batch_size=8, rate=3e-3, validate_every=130)


def no_log(step: int, values: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def pairs(scene_pairs: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Eight training pairs, of which some are changed and some are unchanged."""
    folder = tmp_path_factory.mktemp("diffcap")
    write_shards(scene_pairs[:8], folder, "train", shard_pairs=5)
    return Pairs.read(folder, "train", image_px=SMALL.image_px)


@pytest.fixture(scope="module")
def captioner(pairs: Pairs) -> Iterator[SiameseCaptioner]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fit(Pairs(pairs.images, pairs.places, [texts[:1] for texts in pairs.references]), SMALL, OFTEN,
              validate=lambda captioner: 0.0 if captioner.model.training else 1.0, log=no_log)
    torch.set_num_threads(threads)


def untrained(comparison: Comparison = "matched") -> SiameseCNN:
    torch.manual_seed(3)
    shape = Architecture(**vars(SMALL) | {"comparison": comparison})
    return SiameseCNN(shape, 29).eval()


def test_the_match_equals_a_loop_over_all_positions() -> None:
    B, C, S = 1, 5, 3
    match = FeatureMatch(S, C)
    before, after = torch.randn(2, B, C, S, S)
    differences = match(before, after)
    normed = [match.norm(x.movedim(1, -1)) for x in (before, after)]
    for (first, second), difference in zip((normed, normed[::-1]), differences, strict=True):
        for b in range(B):
            for row in range(S):
                for column in range(S):
                    feature = first[b, row, column]
                    similarity = torch.stack([
                        feature @ second[b, i, j] / C**0.5 - 0.3 * ((row - i) ** 2 + (column - j) ** 2)
                        for i in range(S) for j in range(S)])
                    expected = feature - similarity.softmax(0) @ second[b].flatten(0, 1)
                    torch.testing.assert_close(difference[b, :, row, column], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("comparison", ["matched", "same_place"])
def test_the_features_of_a_pair_do_not_depend_on_the_batch(comparison: Comparison) -> None:
    model = untrained(comparison)
    images = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    alone = torch.cat([model.encode(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model.encode(images), alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.encode(images.flip(1)), alone, atol=1e-3)


def test_the_prediction_of_a_word_does_not_depend_on_later_words() -> None:
    model = untrained()
    images, words = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8), torch.randint(4, 29, (3, 11))
    other = words.clone()
    other[:, 7:] = 5
    torch.testing.assert_close(model(images, words)[:, :7], model(images, other)[:, :7])


def test_captions_of_a_batch_equal_greedy_decoding_of_single_pairs(captioner: SiameseCaptioner, pairs: Pairs) -> None:
    together = captioner.caption_pixels(pairs[range(8)])
    for row in range(8):
        ids = torch.tensor([[BEGIN]])
        while ids[0, -1] != END and ids.shape[1] <= SMALL.max_words:
            ids = torch.cat([ids, captioner.model(pairs[[row]], ids)[:, -1:].argmax(-1)], 1)
        assert captioner.vocabulary.decode(ids[:, 1:]) == [together[row]]


def test_decoding_returns_the_encoded_words_without_unknown_words() -> None:
    words = Vocabulary.of(["The red cube's top, moved", "the cube moved"])
    ids = words.encode(["The cube's top, moved", "the blue cube"], max_words=4)
    assert ids[0].tolist()[0] == BEGIN and ids[0].tolist()[-1] == END and ids.shape == (2, 6)
    assert ids[1].tolist()[2] == UNKNOWN and ids[1].tolist()[-1] == PAD
    assert words.decode(ids[:, 1:]) == ["the cube's top ,", "the cube"]


def test_the_cnn_can_memorize_the_captions_of_eight_pairs(captioner: SiameseCaptioner, pairs: Pairs) -> None:
    captions = captioner.caption_pixels(pairs[range(8)])
    assert captions == [texts[0] for texts in pairs.references]


def test_equal_seeds_give_equal_weights_and_other_seeds_other_weights(pairs: Pairs) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        settings = Training(steps=3, batch_size=5, validate_every=2, seed=seed)
        return fit(pairs, SMALL, settings, validate=lambda _: 1.0, log=no_log).model.state_dict()

    first, again, other = weights(7), weights(7), weights(8)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["words.weight"], other["words.weight"])


def test_the_weights_with_the_best_validation_score_are_kept(pairs: Pairs) -> None:
    scores, validated = iter([1.0, 3.0, 2.0]), []

    def validate(captioner: SiameseCaptioner) -> float:
        validated.append(captioner.model.words.weight.detach().clone())
        return next(scores)

    best = fit(pairs, SMALL, Training(steps=6, batch_size=3, validate_every=2), validate=validate, log=no_log)
    assert torch.equal(best.model.words.weight, validated[1]) and not torch.equal(validated[1], validated[2])


def test_each_epoch_draws_every_pair_once_and_several_epochs_draw_all_references(pairs: Pairs) -> None:
    steps = list(draws(pairs, Training(steps=80, batch_size=4)))
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert sorted(first[0] + second[0]) == list(range(8))
    drawn = {(row, text) for rows, texts in steps for row, text in zip(rows, texts, strict=True)}
    assert drawn == {(row, text) for row, texts in enumerate(pairs.references) for text in texts}


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(1, 101)]
    assert factors[9] == max(factors) == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.0)


def test_an_image_that_several_pairs_share_is_stored_once(pairs: Pairs) -> None:
    assert len(pairs) == 8 and len(pairs.images) == len(pairs.places.unique()) < 16


def test_a_loss_that_is_not_finite_stops_the_training(pairs: Pairs) -> None:
    settings = Training(steps=9, batch_size=8, rate=1e30, clip_norm=1e30)
    with pytest.raises(ValueError, match=r"siamese_cnn: the loss must be finite, got (nan|inf) at step \d+"):
        fit(pairs, SMALL, settings, validate=lambda _: 0.0, log=no_log)


def test_a_split_without_pairs_is_refused(scene_pairs: list[Record], tmp_path: Path) -> None:
    single = [Record(**vars(record) | {"num_images": 1}) for record in scene_pairs[:3]]
    write_shards(single, tmp_path, "val", shard_pairs=5)
    with pytest.raises(ValueError, match="split val must contain at least one pair, got none"):
        Pairs.read(tmp_path, "val", image_px=48)


def test_a_captioner_gives_equal_captions_after_saving_and_loading(captioner: SiameseCaptioner, pairs: Pairs,
                                                                   tmp_path: Path) -> None:
    captioner.save(tmp_path)
    loaded = SiameseCaptioner.load(tmp_path)
    assert loaded.caption_pixels(pairs[range(8)]) == captioner.caption_pixels(pairs[range(8)])
    image = Image.new("RGB", (31, 53), "red")
    assert loaded.caption([(image, image)]) == captioner.caption([(image, image)])


def test_a_folder_without_a_cnn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must contain a Siamese CNN"):
        SiameseCaptioner.load(tmp_path)


def test_weights_that_do_not_fit_the_vocabulary_are_refused(captioner: SiameseCaptioner, tmp_path: Path) -> None:
    captioner.save(tmp_path)
    settings = json.loads((tmp_path / "siamese_cnn.json").read_text())
    (tmp_path / "siamese_cnn.json").write_text(json.dumps(settings | {"words": settings["words"][1:]}))
    with pytest.raises(ValueError, match=r"model.safetensors: must contain weights that fit siamese_cnn"):
        SiameseCaptioner.load(tmp_path)


def test_a_truncated_file_of_weights_is_refused(captioner: SiameseCaptioner, tmp_path: Path) -> None:
    captioner.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"must contain weights that fit siamese_cnn"):
        SiameseCaptioner.load(tmp_path)


@pytest.mark.parametrize(("wrong", "message"), [({"image_px": 50}, "image_px must be a multiple of 16, got 50"),
                                                ({"comparison": "guess"}, "must be one of same_place, matched")])
def test_an_impossible_architecture_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**wrong)  # type: ignore[arg-type]
