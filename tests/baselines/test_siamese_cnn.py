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


def never(step: int, values: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def pairs(scene_pairs: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Eight pairs, changed and unchanged ones."""
    folder = tmp_path_factory.mktemp("diffcap")
    write_shards(scene_pairs[:8], folder, "train", shard_pairs=5)
    return Pairs.read(folder, "train", image_px=SMALL.image_px)


@pytest.fixture(scope="module")
def captioner(pairs: Pairs) -> Iterator[SiameseCaptioner]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fit(Pairs(pairs.images, pairs.places, [texts[:1] for texts in pairs.references]), SMALL, OFTEN,
              validate=lambda captioner: 0.0 if captioner.model.training else 1.0, log=never)
    torch.set_num_threads(threads)


def untrained(comparison: Comparison = "matched") -> SiameseCNN:
    torch.manual_seed(3)
    shape = Architecture(**vars(SMALL) | {"comparison": comparison})
    return SiameseCNN(shape, 29).eval()


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_match_equals_one_made_place_by_place() -> None:
    B, C, S = 1, 5, 3
    match = FeatureMatch(S, C)
    before, after = torch.randn(2, B, C, S, S)
    differences = match(before, after)
    normed = [match.norm(x.movedim(1, -1)) for x in (before, after)]
    for (seen, other), only in zip((normed, normed[::-1]), differences, strict=True):
        for b in range(B):
            for row in range(S):
                for column in range(S):
                    here = seen[b, row, column]
                    alike = torch.stack([here @ other[b, i, j] / C**0.5 - 0.3 * ((row - i) ** 2 + (column - j) ** 2)
                                         for i in range(S) for j in range(S)])
                    expected = here - alike.softmax(0) @ other[b].flatten(0, 1)
                    torch.testing.assert_close(only[b, :, row, column], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("comparison", ["matched", "same_place"])
def test_both_images_are_seen_as_each_alone_is(comparison: Comparison) -> None:
    model = untrained(comparison)
    images = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    alone = torch.cat([model.encode(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model.encode(images), alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.encode(images.flip(1)), alone, atol=1e-3)


def test_no_word_reads_a_later_one() -> None:
    model = untrained()
    images, words = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8), torch.randint(4, 29, (3, 11))
    other = words.clone()
    other[:, 7:] = 5
    torch.testing.assert_close(model(images, words)[:, :7], model(images, other)[:, :7])


def test_captions_are_the_likeliest_words_of_each_pair_alone(captioner: SiameseCaptioner, pairs: Pairs) -> None:
    together = captioner.caption_pixels(pairs[range(8)])
    for row in range(8):
        ids = torch.tensor([[BEGIN]])
        while ids[0, -1] != END and ids.shape[1] <= SMALL.max_words:
            ids = torch.cat([ids, captioner.model(pairs[[row]], ids)[:, -1:].argmax(-1)], 1)
        assert captioner.vocabulary.decode(ids[:, 1:]) == [together[row]]


def test_words_come_back_and_unknown_ones_are_left_out() -> None:
    words = Vocabulary.of(["The red cube's top, moved", "the cube moved"])
    ids = words.encode(["The cube's top, moved", "the blue cube"], max_words=4)
    assert ids[0].tolist()[0] == BEGIN and ids[0].tolist()[-1] == END and ids.shape == (2, 6)
    assert ids[1].tolist()[2] == UNKNOWN and ids[1].tolist()[-1] == PAD
    assert words.decode(ids[:, 1:]) == ["the cube's top ,", "the cube"]


# --- training --------------------------------------------------------------------------------------------------------


def test_eight_pairs_are_learned_by_heart(captioner: SiameseCaptioner, pairs: Pairs) -> None:
    captions = captioner.caption_pixels(pairs[range(8)])
    assert captions == [texts[0] for texts in pairs.references]


def test_the_same_seed_gives_the_same_weights_and_another_others(pairs: Pairs) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        settings = Training(steps=3, batch_size=5, validate_every=2, seed=seed)
        return fit(pairs, SMALL, settings, validate=lambda _: 1.0, log=never).model.state_dict()

    first, again, other = weights(7), weights(7), weights(8)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["words.weight"], other["words.weight"])


def test_the_weights_with_the_best_validation_win_not_the_last(pairs: Pairs) -> None:
    scores, seen = iter([1.0, 3.0, 2.0]), []

    def validate(captioner: SiameseCaptioner) -> float:
        seen.append(captioner.model.words.weight.detach().clone())
        return next(scores)

    best = fit(pairs, SMALL, Training(steps=6, batch_size=3, validate_every=2), validate=validate, log=never)
    assert torch.equal(best.model.words.weight, seen[1]) and not torch.equal(seen[1], seen[2])


def test_every_pair_is_seen_once_an_epoch_and_all_references_in_time(pairs: Pairs) -> None:
    steps = list(draws(pairs, Training(steps=80, batch_size=4)))
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert sorted(first[0] + second[0]) == list(range(8))
    heard = {(row, text) for rows, texts in steps for row, text in zip(rows, texts, strict=True)}
    assert heard == {(row, text) for row, texts in enumerate(pairs.references) for text in texts}


def test_the_rate_rises_then_falls_to_nothing() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(1, 101)]
    assert factors[9] == max(factors) == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.0)


def test_an_image_that_several_pairs_share_is_kept_once(pairs: Pairs) -> None:
    assert len(pairs) == 8 and len(pairs.images) == len(pairs.places.unique()) < 16


def test_a_loss_that_is_no_number_stops_the_training(pairs: Pairs) -> None:
    with pytest.raises(ValueError, match=r"siamese_cnn: the loss must be finite, got (nan|inf) at step \d+"):
        fit(pairs, SMALL, Training(steps=9, batch_size=8, rate=1e30, clip_norm=1e30), validate=lambda _: 0.0, log=never)


def test_a_split_without_pairs_is_refused(scene_pairs: list[Record], tmp_path: Path) -> None:
    single = [Record(**vars(record) | {"num_images": 1}) for record in scene_pairs[:3]]
    write_shards(single, tmp_path, "val", shard_pairs=5)
    with pytest.raises(ValueError, match="split val must contain at least one pair, got none"):
        Pairs.read(tmp_path, "val", image_px=48)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_saved_captioner_says_the_same(captioner: SiameseCaptioner, pairs: Pairs, tmp_path: Path) -> None:
    captioner.save(tmp_path)
    loaded = SiameseCaptioner.load(tmp_path)
    assert loaded.caption_pixels(pairs[range(8)]) == captioner.caption_pixels(pairs[range(8)])
    picture = Image.new("RGB", (31, 53), "red")  # of no particular size
    assert loaded.caption([(picture, picture)]) == captioner.caption([(picture, picture)])


def test_a_folder_without_a_cnn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must contain a Siamese CNN"):
        SiameseCaptioner.load(tmp_path)


def test_weights_of_other_words_are_refused(captioner: SiameseCaptioner, tmp_path: Path) -> None:
    captioner.save(tmp_path)
    settings = json.loads((tmp_path / "siamese_cnn.json").read_text())
    (tmp_path / "siamese_cnn.json").write_text(json.dumps(settings | {"words": settings["words"][1:]}))
    with pytest.raises(ValueError, match=r"model.safetensors: must contain weights that fit siamese_cnn"):
        SiameseCaptioner.load(tmp_path)


def test_weights_that_are_cut_off_are_refused(captioner: SiameseCaptioner, tmp_path: Path) -> None:
    captioner.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"must contain weights that fit siamese_cnn"):
        SiameseCaptioner.load(tmp_path)


@pytest.mark.parametrize(("wrong", "message"), [({"image_px": 50}, "image_px must be a multiple of 16, got 50"),
                                                ({"comparison": "guess"}, "must be one of same_place, matched")])
def test_an_impossible_architecture_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**wrong)  # type: ignore[arg-type]
