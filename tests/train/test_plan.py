from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onediff.cli import main as cli
from onediff.config import Config, load_params, load_runtime
from onediff.model.assemble import configure
from onediff.train.cost import find_gpu, sizes
from onediff.train.memory import MicroBatch, States, hollow, saved
from onediff.train.plan import (
    GIB,
    Plan,
    count_samples,
    described_model,
    mean_sample,
    plan,
    text,
    total_bytes,
    usable_gib,
)

ROOT = Path(__file__).resolve().parent.parent.parent


def preset(name: str) -> Config:
    return load_params(ROOT / f"presets/{name}.yaml")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a folder that contains the presets but no data."""
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    monkeypatch.chdir(tmp_path)


def planned(config: Config, gpu_name: str, num_gpus: int) -> Plan:
    gpu = find_gpu(gpu_name)
    assert gpu is not None
    return plan(config, load_runtime(ROOT / "presets/paper.runtime.yaml"), gpu=gpu, num_gpus=num_gpus,
                utilisation=0.4)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("paper")
    (folder / "presets").symlink_to(ROOT / "presets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return planned(preset("paper"), "h100", 8)


def test_planned_parameter_counts_equal_the_published_parameter_counts(paper: Plan) -> None:
    tune = paper.phases[1].sizes
    assert 303e6 < tune["vision"].learning < 304e6  # The vision tower is CLIP ViT-L/14 for images of 336 pixels.
    assert tune["language"].learning == 6_738_415_616  # The language model, Vicuna 1.5, is based on Llama 2 7B.
    llava = preset("llava_pair")
    projector = sizes(hollow(configure(described_model(llava.model)[0]), llava.tune))["projector"]
    assert projector.learning == 20_979_712  # The projector of LLaVA-1.5 has this number of parameters.


def test_the_number_of_steps_is_computed_from_official_sample_counts(paper: Plan) -> None:
    align, tune = paper.phases
    assert list(align.sources) == ["llava_558k"]
    assert (align.sources["llava_558k"].num_samples, align.sources["llava_558k"].origin) == (558128, "official count")
    assert align.steps == 2181  # LLaVA-1.5 reports this number of steps for these data and this batch size.
    assert tune.sources["spot_the_diff"].num_samples == 17676  # Every reference is one sample.
    assert tune.sources["image_editing_request"].num_samples == 3061
    assert tune.sources["birds_to_words"].origin == "guess from its weight"


def test_an_epoch_has_the_rows_that_the_mixture_states(paper: Plan) -> None:
    align, tune = paper.phases
    assert align.sources["llava_558k"].visits == pytest.approx(2, abs=0.001)  # Two epochs show each image twice.
    assert tune.steps == math.ceil(1020.1e3 / 128)
    visits = {name: source.visits for name, source in tune.sources.items()}
    assert visits["spot_the_diff"] == pytest.approx(1, abs=0.03)
    assert visits["instruct_pix2pix"] == pytest.approx(200 / 313.01, abs=0.01)
    assert visits["llava_665k"] == pytest.approx(1, abs=0.01)


def test_the_plan_states_the_share_of_each_source_in_the_answer_tokens(paper: Plan) -> None:
    sources = paper.phases[1].sources.values()
    assert sum(source.row_share for source in sources) == pytest.approx(1)
    assert sum(source.answer_share for source in sources) == pytest.approx(1)
    conversations = paper.phases[1].sources["llava_665k"]
    assert 1 - conversations.row_share == pytest.approx(0.348, abs=0.002)
    assert 1 - conversations.answer_share == pytest.approx(0.035, abs=0.002)
    assert re.search(r"llava_665k +665,298 +1\.00 +65\.2% +96\.5%  official count", text(paper))


def test_the_counts_of_the_diffcap_card_have_priority_over_official_counts() -> None:
    config = preset("paper")
    Path("data/diffcap").mkdir(parents=True)
    card = {"num_pairs": {"train": {"clevr_change": {"add": 1000, "none": 17}}}}
    Path("data/diffcap/card.json").write_text(json.dumps(card))
    assert count_samples("clevr_change", config, config.tune) == (1017, "data/diffcap/card.json")
    assert count_samples("llava_665k", config, config.tune) == (665298, "official count")


def test_the_paper_preset_fits_only_if_states_are_distributed_over_the_gpus(paper: Plan) -> None:
    tune = paper.phases[1]
    plain = next(layout for layout in tune.layouts if layout.sharing.zero_level == 0)
    assert plain.micro_batch_size == 0 and plain.total / GIB > 79
    assert tune.chosen is not None and tune.chosen.sharing.offload == "none"
    assert tune.chosen.total / GIB <= usable_gib(paper.gpu)


def test_a_higher_zero_level_never_needs_more_memory_for_model_states(paper: Plan) -> None:
    """Compare the memory without communication buffers, which are larger at higher ZeRO levels."""
    for phase in paper.phases:
        for lower in phase.layouts:
            for higher in phase.layouts:
                if (higher.sharing.zero_level >= lower.sharing.zero_level
                        and higher.sharing.offload == lower.sharing.offload):
                    assert _without_buffers(higher.states) <= _without_buffers(lower.states)
            assert lower.activations > 0


def _without_buffers(states: States) -> float:
    return states.weights + states.gradients + states.optimizer


def test_the_text_of_a_plan_that_does_not_fit_lists_possible_changes() -> None:
    config = preset("paper")
    plan_for_t4 = planned(config.model_copy(update={"align": None}), "t4", 1)
    assert plan_for_t4.phases[0].chosen is None
    lines = text(plan_for_t4)
    assert "does not fit, not even with one row" in lines and "lora" in lines and "this GPU has no bfloat16" in lines


def test_activations_of_large_micro_batches_can_be_extrapolated_from_one_and_two_rows() -> None:
    config = preset("tiny")
    model = configure(config.model)
    sample = mean_sample(config, model, config.tune)
    tune = planned(config, "l4", 1).phases[1]
    assert tune.chosen is not None and tune.chosen.micro_batch_size == config.tune.batch_size
    one, two, five = (saved(model, config.tune, MicroBatch(rows, sample.longest_tokens, 16), bfloat16=False,
                            cached_tower=True) for rows in (1, 2, 5))
    no_states = States(0, 0, 0, 0, 0, 0, 0)
    first, second = (rows.everything + rows.working for rows in (one, two))
    activations = first + 4 * (second - first)
    assert total_bytes(no_states, activations) == pytest.approx(five.everything + five.working, rel=0.01)


def test_a_batch_that_cannot_be_split_evenly_over_the_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match=r"align\.batch_size 32 must be a multiple of the 7 GPUs"):
        planned(preset("tiny"), "h100", 7)


def test_the_plan_command_prints_tables_or_with_the_option_json_a_json_object() -> None:
    tables = CliRunner().invoke(cli.app, ["plan", "--preset", "tiny", "--gpu", "l4", "--gpus", "1"])
    assert tables.exit_code == 0, tables.output
    assert "tune\n  parameters" in tables.output and "runtime.yaml: zero_level: 0" in tables.output
    printed = json.loads(CliRunner().invoke(cli.app, ["plan", "--preset", "tiny", "--gpus", "1", "--json"]).output)
    assert [phase["name"] for phase in printed["phases"]] == ["align", "tune"]


def test_a_short_training_has_its_time_in_seconds_or_minutes(paper: Plan) -> None:
    for hours, shown in ((2.8e-06, "0.01  seconds"), (0.05, "3  minutes"), (4.4, "4.4  hours")):
        phases = [replace(phase, hours=hours) for phase in paper.phases]
        assert re.search(rf"  time +{shown}, without", text(replace(paper, phases=phases)))


def test_an_unknown_gpu_is_refused_with_a_list_of_known_gpus() -> None:
    error = CliRunner().invoke(cli.app, ["plan", "--preset", "tiny", "--gpu", "abacus"]).exception
    assert isinstance(error, ValueError) and "--gpu must be one of GB200" in str(error)
