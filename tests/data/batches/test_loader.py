from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from onediff.config import Config
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.loader import FeatureStore, collate, decode, shared_out, stream
from onediff.data.batches.sampling import BatchRow, Sampling, tune_entries, tune_rows
from onediff.data.batches.targets import targets_of
from onediff.inputs.attributes import CLASSES
from onediff.inputs.processing import OneDiffProcessor
from onediff.inputs.prompt import text_prompt
from onediff.model.assemble import build


@pytest.fixture(scope="module")
def processor(micro: Config) -> OneDiffProcessor:
    return build(micro.model, seed=0)[1]


def test_rows_with_two_images_one_and_none_make_one_batch(general: Corpus, processor: OneDiffProcessor) -> None:
    sampling = Sampling({"scenes": 1.0, "llava_665k": 2.0}, "plain", seed=1, batch_size=15)
    rows = tune_rows(tune_entries(general, sampling), sampling)(0)
    counts = [len(row.images) for row in rows]
    assert {0, 1, 2} == set(counts) and counts.count(2) == 5
    batch = collate(rows, processor, decode(general, processor))
    assert batch["image_counts"].tolist() == counts
    assert len(batch["images"]) == sum(counts)
    for row in rows:
        if len(row.images) < 2:
            assert (row.prompt.answer, row.prompt.later) == ("a table", (("USER: Sure? ASSISTANT:", "yes\nquite"),))


def test_stored_features_equal_the_output_of_the_vision_tower(corpus: Corpus, processor: OneDiffProcessor,
                                                              micro: Config, tmp_path: Path) -> None:
    model = build(micro.model, seed=0)[0].eval()
    store = FeatureStore.prepare(corpus, processor, model.vision, tower_digest="x", scratch=tmp_path)
    sampling = Sampling({"scenes": 3, "edits": 1}, "plain", seed=3, batch_size=6)
    rows = tune_rows(tune_entries(corpus, sampling), sampling)(0)
    cached, live = collate(rows, processor, store), collate(rows, processor, decode(corpus, processor))
    with torch.no_grad():
        assert torch.allclose(cached["states"], model.vision(live["images"]), atol=1e-4)
    again = FeatureStore.prepare(corpus, processor, None, tower_digest="x", scratch=tmp_path)  # type: ignore[arg-type]
    assert again.arrays["scenes"].shape == store.arrays["scenes"].shape


def test_features_are_computed_again_if_images_are_padded_in_another_way(
        corpus: Corpus, processor: OneDiffProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def num_files() -> int:
        FeatureStore.prepare(corpus, processor, lambda images: images, tower_digest="x", scratch=tmp_path)
        return len([*tmp_path.glob("features/*.npy")])

    once = num_files()
    assert num_files() == once
    monkeypatch.setattr(processor.image_processor, "image_mean", [0.5, 0.5, 0.5])
    assert num_files() == 2 * once


def test_stored_pixels_equal_decoded_images_and_the_pairs_have_targets(corpus: Corpus, processor: OneDiffProcessor,
                                                                      micro: Config, tmp_path: Path) -> None:
    tower = build(micro.model, seed=0)[0].eval().vision
    store = FeatureStore.prepare(corpus, processor, tower, tower_digest="x", scratch=tmp_path)
    assert store([]).keys() == {"states"}
    store = FeatureStore.prepare(corpus, processor, tower, tower_digest="x", scratch=tmp_path, with_pixels=True)
    sampling = Sampling({"scenes": 3, "edits": 1}, "plain", seed=3, batch_size=6)
    rows = tune_rows(tune_entries(corpus, sampling), sampling)(0)
    targets = partial(targets_of, classes=CLASSES, places=12)
    cached, live = collate(rows, processor, store, targets), collate(rows, processor, decode(corpus, processor))
    assert torch.equal(cached["images"], live["images"])
    assert cached["place_targets"].shape == (6, 2, 144) and cached["object_targets"].shape == (6, len(CLASSES))
    assert cached["changed_targets"].tolist() == [row.facts["attributes"]["change_type"] != "none" for row in rows]
    assert not {"place_targets", "object_targets"} & live.keys()
    empty = collate([BatchRow((), text_prompt("plain", "hi", "there"))], processor, store, targets)
    assert empty["images"].shape == (0, 3, 96, 96) and empty["place_targets"].shape == (0, 2, 144)


def test_a_batch_may_contain_only_rows_without_images(corpus: Corpus, processor: OneDiffProcessor) -> None:
    batch = collate([BatchRow((), text_prompt("plain", "hi", "there"))], processor, decode(corpus, processor))
    assert batch["images"].shape == (0, 3, 96, 96)
    assert batch["image_counts"].tolist() == [0]


def test_every_rank_gets_equally_many_rows_of_similar_total_length() -> None:
    rows = [BatchRow((), text_prompt("plain", "hi", "x" * length), name=str(length)) for length in range(0, 1200, 50)]
    parts = shared_out(rows, 4, tokens_per_image=9)
    assert sorted(row.name for part in parts for row in part) == sorted(row.name for row in rows)
    assert {len(part) for part in parts} == {6}
    totals = [sum(int(row.name) for row in part) for part in parts]
    assert max(totals) - min(totals) <= 100


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_are_yielded_in_order_with_and_without_workers(workers: int) -> None:
    batches = list(stream(lambda step: [{"x": torch.tensor([step])}], range(3, 8), workers=workers, pin=False))
    assert [int(batch[0]["x"]) for batch in batches] == [3, 4, 5, 6, 7]
