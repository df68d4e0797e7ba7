"""Tests that the contenders of a benchmark compute equal results, and that each script prints a table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from benchmarks import models, rows, turns
from benchmarks.rows import Bench
from benchmarks.train_step import for_llava, layout, padded_inside, padded_rows
from benchmarks.turns import Contender
from onediff.data.batches.loader import collate, decode
from onediff.inputs.prompt import conversation_prompt
from onediff.model import packing
from onediff.model.onediff import OneDiffForConditionalGeneration

CASE = {"preset": "tiny", "batch": 4, "device": "cpu", "units": 2, "work": "mixed"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return the data of a small benchmark for OneDiff without delta tokens."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("benchmarks")
        for module in (models, rows):
            patch.setattr(module, "HOME", home)
        for name, few in (("NUM_SCENES", 3), ("NUM_EDITS", 3), ("NUM_CONVERSATIONS", 20), ("MEGABATCH", 4)):
            patch.setattr(rows, name, few)
        return Bench(CASE | {"model": models.ALL_PATCHES | {"num_tokens": 0}})


def copy_weights(ours: OneDiffForConditionalGeneration, theirs: LlavaForConditionalGeneration) -> None:
    """Copy the weights of OneDiff into LLaVA, whose embedding table may have more rows."""
    with torch.no_grad():
        theirs.model.vision_tower.load_state_dict(ours.vision.tower.state_dict())
        state = ours.language.get_decoder().state_dict()
        rows = state.pop("embed_tokens.weight")
        theirs.model.language_model.load_state_dict(state, strict=False)
        theirs.model.language_model.embed_tokens.weight[: len(rows)].copy_(rows)
        theirs.lm_head.weight[: len(rows)].copy_(ours.language.get_output_embeddings().weight)
        theirs.model.multi_modal_projector.load_state_dict({
            f"linear_{1 + number // 2}.{part}": ours.projector.state_dict()[f"{number}.{part}"]
            for number in (0, 2) for part in ("weight", "bias")})


def test_llava_and_onediff_without_delta_tokens_have_equal_losses_on_equal_rows(bench: Bench) -> None:
    ours, processor = models.onediff(bench.config, "cpu")
    theirs, their_processor = models.llava(bench.config, "cpu")
    copy_weights(ours, theirs)
    pixels_of = decode(bench.corpus, processor)
    for batch in bench.batches:
        loss = ours(**collate(batch, processor, pixels_of)).loss
        inputs = for_llava(batch, processor=their_processor, pixels_of=pixels_of)
        vocab_size = ours.config.text_config.vocab_size  # LLaVA has additional logits, for its placeholder.
        expected = functional.cross_entropy(theirs(**inputs).logits[:, :-1, :vocab_size].flatten(0, 1),
                                            inputs["labels"][:, 1:].flatten())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padded_rows_have_the_loss_of_packed_rows(bench: Bench) -> None:
    ours, processor = models.onediff(bench.config, "cpu")
    batch = collate(bench.batches[0], processor, decode(bench.corpus, processor))
    expected = ours(**batch, total_weight=torch.tensor(1000)).loss
    assert padded_rows(ours, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("alike", [0.0, 0.8, 1.0])
def test_attention_in_groups_of_similar_rows_equals_attention_row_by_row(alike: float) -> None:
    lengths, heads, width = [7, 13, 3, 13, 11], 3, 5
    inputs = [torch.randn(1, sum(lengths), heads, width, requires_grad=True) for _ in range(3)]
    weights = torch.randn(1, sum(lengths), heads, width)
    outputs = []
    for mixed in (packing._by_row, lambda *x: padded_inside(*x, alike=alike)):
        result = mixed(*(x.transpose(1, 2) for x in inputs), lengths, None, max(lengths))
        outputs.append([result, *torch.autograd.grad((result * weights).sum(), inputs)])
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_group_contains_rows_of_similar_length() -> None:
    positions, shapes = layout((7, 13, 3, 13, 11), 0.8)
    assert shapes == [(3, 13), (1, 7), (1, 3)]
    assert positions.tolist()[:7] == list(range(39, 46)) and len(set(positions.tolist())) == 47


def test_every_contender_processes_each_row_once_per_epoch(bench: Bench) -> None:
    ours = rows.shuffled(bench.batches)
    names = sorted(row.name for batch in bench.batches for row in batch)
    for epoch in (0, 1):
        assert sorted(row.name for step in (0, 1) for row in ours(2 * epoch + step)) == names


def test_batches_of_llava_are_grouped_by_length(bench: Bench) -> None:
    processor = models.processor_of(bench.config)
    lengths = [[len(processor.encode_turns(row.prompt)[0]) for row in batch] for batch in bench.batches]
    short, long = sorted(lengths, key=max)
    assert max(short) <= min(long)


def test_conversations_have_from_30_to_600_tokens() -> None:
    processor = models.processor_of(models.settings("tiny"))
    rng = np.random.default_rng(3)
    words = ["the", "big", "red", "cube", "turned", "green"]
    prompts = [conversation_prompt("plain", rows.conversation(rng, words), num_images=0) for _ in range(200)]
    lengths = [len(processor.encode_turns(prompt)[0]) for prompt in prompts]
    assert 20 <= min(lengths) < 45 and 500 < max(lengths) <= 600
    assert len({len(prompt.later) for prompt in prompts}) == rows.MOST_TURNS


def test_the_small_preset_has_about_50_million_parameters() -> None:
    config = models.settings("small")
    with torch.device("meta"):
        model = OneDiffForConditionalGeneration(models.configuration_of(config, models.processor_of(config)))
    assert 45e6 < sum(parameter.numel() for parameter in model.parameters()) < 56e6


def test_ratios_are_computed_for_each_round() -> None:
    ours, peer = (Contender(name, "", {}, rounds=took, facts={"rows": 8}) for name, took in
                  (("ours", [1.0, 2.0, 1.0]), ("peer", [2.0, 3.0, 1.0])))
    assert turns.with_range(turns.ratios(ours, peer)) == "1.50 (1.00 to 2.00)"


def test_the_error_for_a_failed_contender_contains_the_reason() -> None:
    with pytest.raises(ValueError, match=r"ours: the process ended .*No module named benchmarks\.x"):
        turns.race([Contender("ours", "benchmarks.x", {})], rounds=1, units=1, threads=1)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="--preset huge: must be one of tiny, small, paper"):
        models.settings("huge")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "options", "text"), [
    ("train_step", ["--batch", "4", "--rounds", "1", "--units", "1", "--work", "align"], "LLaVA, Trainer"),
    ("train_step", ["--batch", "4", "--rounds", "1", "--units", "1", "--work", "pairs", "--overhead"], "our loop"),
    ("train_step", ["--batch", "4", "--rounds", "1", "--units", "1", "--work", "mixed", "--attention"], "row by row"),
    ("captioning", ["--batch", "2", "--rounds", "1", "--units", "1"], "LLaVA, generate"),
    ("scaling", ["--batch", "4", "--rounds", "1", "--units", "1", "--zero", "2"], "2 processes, ZeRO 2"),
    ("loader", ["--batch", "4", "--rounds", "1", "--steps", "2"], "features"),
    ("busy", ["--batch", "4", "--rounds", "1", "--steps", "1"], "beside a busy core"),
    ("metrics", ["--pairs", "50", "--rounds", "1", "--starts", "1", "--evaluations", "3"], "0 Java programs left"),
])
def test_each_script_prints_its_table(script: str, options: list[str], text: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *options], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1], timeout=580)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
