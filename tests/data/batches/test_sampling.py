from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onediff.config import Task
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.sampling import (
    Mixture,
    RowSampler,
    Sampling,
    coupled_rows,
    single_rows,
    tune_entries,
    tune_rows,
)
from onediff.inputs.prompt import DEFAULT_INSTRUCTION

INDICES = {"a": list(range(0, 13)), "b": list(range(100, 107)), "c": list(range(200, 231))}


def tuned_rows(corpus: Corpus, sampling: Sampling) -> RowSampler:
    return tune_rows(tune_entries(corpus, sampling), sampling)


def test_the_rows_of_a_step_depend_only_on_seed_and_step(corpus: Corpus) -> None:
    for make, weights in ((tuned_rows, {"scenes": 3, "edits": 1}), (coupled_rows, {"scenes": 1})):
        sampling = Sampling(weights, "plain", seed=3, batch_size=8, mask_patches=0.5)
        straight = [make(corpus, sampling)(step) for step in range(5)]
        jumped = make(corpus, sampling)
        assert [jumped(step) for step in (4, 0, 2)] == [straight[4], straight[0], straight[2]]
        assert straight[0] != straight[1]


def test_the_sources_of_a_batch_are_drawn_by_their_weights(corpus: Corpus) -> None:
    rows = tuned_rows(corpus, Sampling({"scenes": 3, "edits": 1}, "plain", seed=3, batch_size=40))(0)
    assert Counter(row.name.split("/")[0] for row in rows) == {"scenes": 30, "edits": 10}


def test_rows_of_instruction_tuning_are_pairs_with_one_of_their_references(corpus: Corpus) -> None:
    for row in tuned_rows(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=8))(0):
        [pair] = [p for p in corpus.samples
                  if p.images == row.images and row.prompt.answer in p.references and p.source == "scenes"]
        assert pair.instruction in row.prompt.question


def test_half_of_the_pairs_of_every_source_get_the_default_question(corpus: Corpus) -> None:
    task = Task(instruction="What edit is it?", targets="drawn", max_new_tokens=None, num_beams=None)
    sampling = Sampling({"scenes": 1, "edits": 1}, "plain", seed=3, batch_size=1000, tasks={"edits": task},
                        default_question=0.5)
    rows = tuned_rows(corpus, sampling)(0)
    own = {pair.pair_id: task.instruction if pair.source == "edits" else pair.instruction for pair in corpus.samples}
    for source in ("scenes", "edits"):
        names = [row.name.partition("/") for row in rows]
        asked = [(own[key], row.prompt.question) for (name, _, key), row in zip(names, rows, strict=True)
                 if name == source]
        assert all(text in question or DEFAULT_INSTRUCTION in question for text, question in asked)
        others = [DEFAULT_INSTRUCTION in question for text, question in asked if text != DEFAULT_INSTRUCTION]
        assert len(others) > 300 and abs(sum(others) / len(others) - 0.5) < 0.09
    assert tuned_rows(corpus, sampling)(0) == rows


def test_with_the_share_0_no_pair_and_with_the_share_1_every_pair_gets_the_default_question(corpus: Corpus) -> None:
    task = Task(instruction="What edit is it?", targets="drawn", max_new_tokens=None, num_beams=None)
    for share, expected in ((0.0, {False}), (1.0, {True})):
        rows = tuned_rows(corpus, Sampling({"edits": 1}, "plain", seed=1, batch_size=50, tasks={"edits": task},
                                           default_question=share))(0)
        assert {DEFAULT_INSTRUCTION in row.prompt.question for row in rows} == expected


def test_conversations_keep_their_questions(general: Corpus) -> None:
    sampling = Sampling({"llava_665k": 1}, "plain", seed=1, batch_size=8)
    always = Sampling({"llava_665k": 1}, "plain", seed=1, batch_size=8, default_question=1.0)
    assert [row.prompt.question for row in tuned_rows(general, always)(0)] == [
        row.prompt.question for row in tuned_rows(general, sampling)(0)]


def test_a_conversation_about_two_images_keeps_its_turns_and_its_facts(corpus: Corpus) -> None:
    turns = (("Which differs?", "the left one"), ("Why?", "it is red"))
    sample = replace(corpus.samples[0], turns=turns)
    sampling = Sampling({"scenes": 1}, "plain", seed=1, batch_size=3, mask_patches=1.0, default_question=1.0)
    for row in tune_rows([(sample, None)], sampling)(0):
        assert row.images == sample.images and row.facts == sample.facts and row.prompt.num_images == 2
        assert "Which differs?" in row.prompt.question and row.prompt.answer == "the left one"
        assert row.prompt.later == (("USER: Why? ASSISTANT:", "it is red"),)


def test_coupled_rows_join_two_images_with_both_captions_in_order(corpus: Corpus) -> None:
    for row in coupled_rows(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=8))(0):
        first, second = (corpus.captions["scenes"][name] for name in row.images)
        assert row.prompt.answer == f"First image: {first}. Second image: {second}."


@pytest.mark.parametrize("make", [coupled_rows, single_rows])
def test_without_replacement_an_epoch_has_every_image_once(make: Any, corpus: Corpus) -> None:
    rows = make(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=7, replacement=False))
    images = [name for step in range(60) for row in rows(step) for name in row.images]
    everything = set(corpus.captions["scenes"])
    size = len(everything) if make is single_rows else len(everything) // 2 * 2  # An odd image is omitted.
    epochs = [images[start : start + size] for start in range(0, len(images) - size, size)]
    assert len(epochs) > 2 and all(len(set(epoch)) == size for epoch in epochs)
    assert set().union(*epochs) == everything and epochs[0] != epochs[1]


def test_without_replacement_coupled_images_are_less_similar_than_neighbours_in_the_order(corpus: Corpus) -> None:
    captions = corpus.captions["scenes"]
    rows = coupled_rows(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=300, replacement=False))(0)

    def overlap(a: str, b: str) -> int:
        return len(set(captions[a].split()) & set(captions[b].split()))

    random = [overlap(a.images[0], b.images[0]) for a, b in itertools.pairwise(rows)]
    assert np.mean([overlap(*row.images) for row in rows]) < np.mean(random)


def test_coupled_images_are_less_similar_than_random_images(corpus: Corpus) -> None:
    captions = corpus.captions["scenes"]

    def overlap(a: str, b: str) -> int:
        return len(set(captions[a].split()) & set(captions[b].split()))

    coupled = coupled_rows(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=200))(0)
    rng, names = np.random.default_rng(0), sorted(captions)
    random = [overlap(*rng.choice(names, 2)) for _ in range(200)]
    assert np.mean([overlap(*row.images) for row in coupled]) < np.mean(random) - 0.5


def test_coupled_rows_are_drawn_by_the_weights_of_the_sources(general: Corpus) -> None:
    rows = coupled_rows(general, Sampling({"llava_558k": 3, "scenes": 1}, "plain", seed=1, batch_size=40))(0)
    captions = set(general.captions["llava_558k"].values())
    assert sum(any(caption in str(row.prompt.answer) for caption in captions) for row in rows) == 30
    with pytest.raises(ValueError, match=r"align.mixture: source 'llava_665k' has fewer than two"):
        coupled_rows(general, Sampling({"llava_665k": 1}, "plain", seed=1, batch_size=4))


def task(**changes: Any) -> dict[str, Task]:
    """Return task settings for the source `scenes`, with these changes to the defaults."""
    return {"scenes": Task(**{"instruction": None, "targets": "drawn", "max_new_tokens": None, "num_beams": None}
                           | changes)}


def test_references_become_separate_answers_or_one_joined_answer(corpus: Corpus) -> None:
    pairs = [sample for sample in corpus.samples if sample.source == "scenes"]
    each = tune_entries(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=1, tasks=task(targets="each")))
    assert [answer for _, answer in each] == [text for pair in pairs for text in pair.references]
    joined = tuned_rows(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=9, tasks=task(targets="joined")))
    assert {row.prompt.answer for row in joined(0)} <= {" ".join(pair.references) for pair in pairs}
    drawn = tune_entries(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=1, tasks=task()))
    assert [answer for _, answer in drawn] == [None] * len(pairs)


def test_the_instruction_of_a_task_replaces_the_instruction_of_the_records(corpus: Corpus) -> None:
    rows = tuned_rows(corpus, Sampling({"scenes": 1, "edits": 1}, "plain", seed=1, batch_size=10,
                                       tasks=task(instruction="One sentence, please.")))(0)
    has_instruction = ["One sentence, please." in row.prompt.question for row in rows]
    assert has_instruction == [row.name.startswith("scenes/") for row in rows]
    assert sum(has_instruction) == 5


def test_single_rows_have_one_image_and_the_caption_of_this_image(corpus: Corpus) -> None:
    for row in single_rows(corpus, Sampling({"scenes": 1}, "plain", seed=1, batch_size=8))(0):
        [name] = row.images
        assert row.prompt.answer == corpus.captions["scenes"][name]


def drawn(mixture: Mixture, size: int, steps: int) -> list[int]:
    """Return the sample indices of the first `steps` batches in one list."""
    return [index for step in range(steps) for index in mixture.batch(step, size)]


def test_each_epoch_visits_every_sample_of_a_source_once_in_a_new_order() -> None:
    mixture = Mixture(INDICES, {"a": 3, "b": 1, "c": 2}, seed=7)
    everything = drawn(mixture, 17, 300)
    for indices in INDICES.values():
        own = [index for index in everything if index in indices]
        epochs = [own[i:i + len(indices)] for i in range(0, len(own) - len(indices), len(indices))]
        assert len(epochs) > 10
        assert all(sorted(epoch) == indices for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_the_weights_are_the_shares_of_the_sources_in_every_batch() -> None:
    mixture = Mixture(INDICES, {"a": 3, "b": 1}, seed=7)
    for step in range(40):
        counts = Counter(index // 100 for index in mixture.batch(step, 64))
        assert counts == {0: 48, 1: 16}


def test_a_batch_depends_only_on_seed_and_step() -> None:
    weights = {"a": 2.5, "b": 0.7, "c": 1.1}
    straight = [Mixture(INDICES, weights, seed=7).batch(step, 19) for step in range(120)]
    resumed = Mixture(INDICES, weights, seed=7)
    assert [resumed.batch(step, 19) for step in reversed(range(120))] == straight[::-1]
    assert Mixture(INDICES, weights, seed=8).batch(0, 19) != straight[0]
    assert [index for batch in straight for index in batch] == drawn(resumed, 1, 120 * 19)


def test_a_source_with_a_small_weight_is_drawn_exactly_by_its_share() -> None:
    counts = Counter(index // 100 for index in drawn(Mixture(INDICES, {"a": 99, "b": 1}, seed=7), 50, 60))
    assert counts == {0: 2970, 1: 30}


def test_invalid_mixtures_are_errors() -> None:
    with pytest.raises(ValueError, match=r"mixture\.a: weight must be above 0, got 0"):
        Mixture(INDICES, {"a": 0}, seed=7)
    with pytest.raises(ValueError, match=r"mixture\.z: this source has no pairs"):
        Mixture(INDICES, {"z": 1}, seed=7)
    with pytest.raises(ValueError, match="no source"):
        Mixture(INDICES, {}, seed=7)
