"""Tests that every preset and its runtime file describe a consistent run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onediff.config import load_params, load_runtime
from onediff.data.folders import sources_of
from onediff.model.assemble import configure
from onediff.train.engine import learning_rates, num_micro
from onediff.train.plan import described_model

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = sorted(path.name for path in (ROOT / "presets").glob("*.runtime.yaml"))
NAMES = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml") if path.name not in RUNTIMES)
BENCHMARKS = {"spot_the_diff", "image_editing_request", "birds_to_words", "clevr_change"}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_loads_and_describes_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    configure(described_model(load_params(ROOT / f"presets/{name}.yaml").model)[0])


@pytest.mark.parametrize("file", RUNTIMES)
def test_every_runtime_file_loads_and_divides_the_batches_of_its_preset(file: str) -> None:
    runtime = load_runtime(ROOT / "presets" / file)
    config = load_params(ROOT / "presets" / file.replace(".runtime", ""))
    for phase in (config.align, config.tune):
        if phase is not None:
            assert num_micro(phase, runtime) >= 1


def test_preset_pilot_is_preset_paper_with_a_twentieth_of_the_epochs() -> None:
    def values_of(name: str) -> dict[str, Any]:
        return load_params(ROOT / f"presets/{name}.yaml").model_dump()

    pilot, paper = values_of("pilot"), values_of("paper")
    for phase in ("align", "tune"):
        assert pilot[phase].pop("epochs") == pytest.approx(paper[phase].pop("epochs") / 20)
    assert pilot == paper


def test_preset_llava_pair_is_a_llava_without_delta_module_on_two_benchmarks() -> None:
    config, paper = (load_params(ROOT / f"presets/{name}.yaml") for name in ("llava_pair", "paper"))
    assert config.model.delta.num_tokens == 0 and config.align is None and config.model.reading == "A"
    assert config.model.vision.path == config.model.language == "llava-hf/llava-1.5-7b-hf"
    assert set(config.tune.mixture) == set(sources_of(config.data)) == {"spot_the_diff", "image_editing_request"}
    assert config.tasks == {name: paper.tasks[name] for name in config.tasks}
    assert learning_rates(config.tune) == {"vision": 0, "delta": 0, "projector": 2e-5, "language": 2e-5}


def test_preset_paper_sets_the_task_of_every_published_benchmark() -> None:
    tasks = load_params(ROOT / "presets/paper.yaml").tasks
    assert set(tasks) == BENCHMARKS
    assert all(task.instruction and task.max_new_tokens and task.num_beams for task in tasks.values())


def test_the_instruction_asks_for_one_sentence_if_each_target_is_one_sentence() -> None:
    task = load_params(ROOT / "presets/paper.yaml").tasks["spot_the_diff"]
    assert task.targets == "each" and task.instruction and "one short sentence" in task.instruction
