from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onediff.config import Config, Task
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.features import FeatureStore
from onediff.data.batches.loader import (
    Row,
    Rows,
    collate,
    coupled_rows,
    decode,
    shared_out,
    single_rows,
    stream,
    tune_entries,
)
from onediff.data.batches.loader import tune_rows as rows_of_entries
from onediff.data.record import Record, digest, write_shards
from onediff.inputs.processing import OneDiffProcessor
from onediff.inputs.prompt import text_prompt
from onediff.model.assemble import build


def tune_rows(corpus: Corpus, weights: dict[str, float], template: str, *, tasks: dict[str, Task] | None = None,
              **settings: Any) -> Rows:
    entries = tune_entries(corpus, weights, tasks or {})
    return rows_of_entries(entries, weights, tasks or {}, template, **settings)


@pytest.fixture(scope="module")
def processor(micro: Config) -> OneDiffProcessor:
    return build(micro.model, seed=0)[1]


@pytest.fixture(scope="module")
def corpus(scene_pairs: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("diffcap")
    others = [replace(record, pair_id="e" + record.pair_id, source="edits", provenance={})
              for record in scene_pairs[:4]]
    write_shards(scene_pairs + others, folder, "train", shard_pairs=100)
    return Corpus.read(folder, "train", ["scenes", "edits"], store=folder / "corpus")


def test_each_image_is_kept_once(corpus: Corpus, scene_pairs: list[Record]) -> None:
    assert set(corpus.files.places) == {digest(content) for record in scene_pairs for content in record.images}
    assert len(corpus.samples) == len(scene_pairs) + 4


def test_a_source_without_pairs_is_refused(scene_pairs: list[Record], tmp_path: Path) -> None:
    write_shards(scene_pairs, tmp_path, "train", shard_pairs=100)
    with pytest.raises(ValueError, match="source 'edits' has no pair in split train"):
        Corpus.read(tmp_path, "train", ["scenes", "edits"], store=tmp_path / "corpus")


def test_a_step_is_a_function_of_seed_and_step_alone(corpus: Corpus) -> None:
    settings = {"seed": 3, "batch_size": 8, "mask_patches": 0.5}
    for make in (lambda: tune_rows(corpus, {"scenes": 3, "edits": 1}, "plain", **settings),
                 lambda: coupled_rows(corpus, {"scenes": 1}, "plain", **settings)):
        straight = [make()(step) for step in range(5)]
        jumped = make()
        assert [jumped(step) for step in (4, 0, 2)] == [straight[4], straight[0], straight[2]]
        assert straight[0] != straight[1]


def test_sources_come_in_the_weights_that_were_asked_for(corpus: Corpus) -> None:
    rows = tune_rows(corpus, {"scenes": 3, "edits": 1}, "plain", seed=3, batch_size=40, mask_patches=0)(0)
    edited = Counter("edit" in row.prompt.question for row in rows)
    instructions = {pair.instruction for pair in corpus.samples if pair.source == "edits"}
    assert instructions
    assert len(rows) == 40
    assert edited


def test_tuned_rows_are_pairs_in_order_with_one_of_their_references(corpus: Corpus) -> None:
    for row in tune_rows(corpus, {"scenes": 1}, "plain", seed=1, batch_size=8, mask_patches=0)(0):
        [pair] = [p for p in corpus.samples
                  if p.images == row.images and row.prompt.answer in p.references and p.source == "scenes"]
        assert pair.instruction in row.prompt.question


def test_coupled_rows_join_two_images_with_both_captions_in_order(corpus: Corpus) -> None:
    for row in coupled_rows(corpus, {"scenes": 1}, "plain", seed=1, batch_size=8, mask_patches=0)(0):
        first, second = (corpus.captions["scenes"][name] for name in row.images)
        assert row.prompt.answer == f"First image: {first}. Second image: {second}."


def test_coupled_images_are_less_alike_than_random_ones(corpus: Corpus) -> None:
    captions = corpus.captions["scenes"]

    def overlap(a: str, b: str) -> int:
        return len(set(captions[a].split()) & set(captions[b].split()))

    coupled = coupled_rows(corpus, {"scenes": 1}, "plain", seed=1, batch_size=200, mask_patches=0)(0)
    rng, names = np.random.default_rng(0), sorted(captions)
    random = [overlap(*rng.choice(names, 2)) for _ in range(200)]
    assert np.mean([overlap(*row.images) for row in coupled]) < np.mean(random) - 0.5


@pytest.fixture(scope="module")
def general(scene_pairs: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Pairs, captioned single images, conversations with an image and without."""
    folder = tmp_path_factory.mktemp("general")
    image = [replace(pair, pair_id=f"i{k}", source="llava_558k", after=b"", num_images=1, references=[f"scene {k}"],
                     provenance={"captions": [f"scene {k}"]}) for k, pair in enumerate(scene_pairs[:5])]
    turns = [["What is it?", "a table"], ["Sure?", "yes\nquite"]]
    chat = [replace(image[k], pair_id=f"c{k}", source="llava_665k", provenance={"conversation": turns}) for k in (0, 1)]
    text = [replace(chat[0], pair_id=f"t{k}", before=b"", num_images=0) for k in range(3)]
    write_shards([*scene_pairs, *image, *chat, *text], folder, "train", shard_pairs=7)
    return Corpus.read(folder, "train", ["scenes", "llava_558k", "llava_665k"], store=folder / "corpus")


def test_rows_with_two_images_one_and_none_make_one_batch(general: Corpus, processor: OneDiffProcessor) -> None:
    weights = {"scenes": 1.0, "llava_665k": 2.0}
    rows = tune_rows(general, weights, "plain", seed=1, batch_size=15, mask_patches=0)(0)
    counts = [len(row.images) for row in rows]
    assert {0, 1, 2} == set(counts) and counts.count(2) == 5
    batch = collate(rows, processor, decode(general, processor))
    assert batch["image_counts"].tolist() == counts
    assert len(batch["images"]) == sum(counts)
    for row in rows:
        if len(row.images) < 2:
            assert (row.prompt.answer, row.prompt.later) == ("a table", (("USER: Sure? ASSISTANT:", "yes\nquite"),))


def test_coupled_rows_take_each_source_by_its_weight(general: Corpus) -> None:
    rows = coupled_rows(general, {"llava_558k": 3, "scenes": 1}, "plain", seed=1, batch_size=40, mask_patches=0)(0)
    told = set(general.captions["llava_558k"].values())
    assert sum(any(caption in str(row.prompt.answer) for caption in told) for row in rows) == 30
    with pytest.raises(ValueError, match=r"align.mixture: source 'llava_665k' has no captions of single images"):
        coupled_rows(general, {"llava_665k": 1}, "plain", seed=1, batch_size=4, mask_patches=0)


def test_kept_features_are_what_the_tower_gives(corpus: Corpus, processor: OneDiffProcessor, micro: Config,
                                                tmp_path: Path) -> None:
    model = build(micro.model, seed=0)[0].eval()
    store = FeatureStore.prepare(corpus, processor, model.vision, sources=["scenes", "edits"], tower_digest="x",
                                 scratch=tmp_path)
    rows = tune_rows(corpus, {"scenes": 3, "edits": 1}, "plain", seed=3, batch_size=6, mask_patches=0)(0)
    kept, live = collate(rows, processor, store), collate(rows, processor, decode(corpus, processor))
    with torch.no_grad():
        assert torch.allclose(kept["states"], model.vision(live["images"]), atol=1e-4)
    again = FeatureStore.prepare(corpus, processor, None, sources=["scenes"], tower_digest="x", scratch=tmp_path)  # type: ignore[arg-type]
    assert again.arrays["scenes"].shape == store.arrays["scenes"].shape


def test_rows_without_images_make_a_batch_too(corpus: Corpus, processor: OneDiffProcessor) -> None:
    batch = collate([Row((), text_prompt("plain", "hi", "there"))], processor, decode(corpus, processor))
    assert batch["images"].shape == (0, 3, 96, 96)
    assert batch["image_counts"].tolist() == [0]


def task(**changes: Any) -> dict[str, Task]:
    return {"scenes": Task(**{"instruction": None, "targets": "drawn", "max_new_tokens": None, "num_beams": None}
                           | changes)}


def test_each_reference_can_be_a_sample_of_its_own_or_all_be_joined(corpus: Corpus) -> None:
    pairs = [sample for sample in corpus.samples if sample.source == "scenes"]
    each = tune_entries(corpus, {"scenes": 1}, task(targets="each"))
    assert [answer for _, answer in each] == [text for pair in pairs for text in pair.references]
    joined = tune_rows(corpus, {"scenes": 1}, "plain", tasks=task(targets="joined"), seed=1, batch_size=9,
                       mask_patches=0)
    said = {" ".join(pair.references) for pair in pairs}
    assert {row.prompt.answer for row in joined(0)} <= said
    drawn = tune_entries(corpus, {"scenes": 1}, task())
    assert [answer for _, answer in drawn] == [None] * len(pairs)


def test_a_task_says_how_its_source_is_asked(corpus: Corpus) -> None:
    rows = tune_rows(corpus, {"scenes": 1, "edits": 1}, "plain", tasks=task(instruction="One sentence, please."),
                     seed=1, batch_size=10, mask_patches=0)(0)
    asked = ["One sentence, please." in row.prompt.question for row in rows]
    assert asked == [row.name.startswith("scenes/") for row in rows]
    assert sum(asked) == 5


def test_single_rows_hold_an_image_and_its_own_caption(corpus: Corpus) -> None:
    for row in single_rows(corpus, {"scenes": 1}, "plain", seed=1, batch_size=8)(0):
        [name] = row.images
        assert row.prompt.answer == corpus.captions["scenes"][name]


def test_rows_are_dealt_out_in_equal_numbers_and_about_equal_lengths() -> None:
    rows = [Row((), text_prompt("plain", "hi", "x" * length), name=str(length)) for length in range(0, 1200, 50)]
    parts = shared_out(rows, 4, tokens_per_image=9)
    assert sorted(row.name for part in parts for row in part) == sorted(row.name for row in rows)
    assert {len(part) for part in parts} == {6}
    totals = [sum(int(row.name) for row in part) for part in parts]
    assert max(totals) - min(totals) <= 100


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_come_in_order_with_and_without_workers(workers: int) -> None:
    made = list(stream(lambda step: [{"x": torch.tensor([step])}], 3, 8, workers=workers, pin=False))
    assert [int(batch[0]["x"]) for batch in made] == [3, 4, 5, 6, 7]
