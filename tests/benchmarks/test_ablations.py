from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import ablations
from benchmarks.outcomes import WORN
from onediff.config import Config, load_params
from onediff.files import read_json, write_json
from onediff.model.assemble import build

ROOT = Path(__file__).resolve().parents[2]


def test_every_variant_is_valid_and_changes_the_settings_or_the_model() -> None:
    base = load_params(ROOT / ablations.PRESET)
    plain = ablations.varied(base, {}, seed=3, scale=0.5)
    assert (plain.seed, plain.tune.steps, plain.align and plain.align.steps) == (3, 500, 50)
    for name, changes in ablations.VARIANTS.items():
        changed = ablations.varied(base, changes, seed=3, scale=0.5) != plain
        assert changed == (name not in {"default", *ablations.REPLACED}), name
    assert len({ablations.result_file(name, 1) for name in ablations.VARIANTS}) == len(ablations.VARIANTS)


@pytest.mark.parametrize("name", ablations.REPLACED)
def test_a_replaced_part_of_the_model_does_nothing(name: str, micro: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*ablations.REPLACED[name])
    model, _ = build(micro.model, seed=1)
    fusion = model.fusion
    assert fusion is not None
    pixels = torch.rand(3, 2, 3, 96, 96)
    states = torch.rand(2, 3, len(fusion.levels), 64, 128)
    fused = fusion(pixels, *states)
    assert bool(fused.cells.any()) == (name != "no stem")
    assert bool(fused.tokens.any()) == (name != "no object token")
    assert (len(fusion.mix) == 0) == (name == "no mixing")
    assert bool(fusion.registration(pixels).any()) == (name != "no registration")
    words = model.attribute_tokens(fused.attributes, model.language.get_input_embeddings())
    assert words.shape == (3, len(fused.attributes), 128) and bool(words.any()) == (name != "no attribute words")


def test_the_table_shows_the_mean_and_the_deviation_of_the_seeds(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="docs/ablations must contain at least one result"):
        ablations.table()
    for seed, value in ((1, 0.8), (2, 0.9)):
        ablations.RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(ablations.result_file("no stem", seed), {
            "variant": "no stem", "seed": seed, "gflops_per_pair": 0.5, "figures": {"type": value, "object": 0.5}})
    ablations.table()
    assert "| no stem | 2 | 0.50 | 85.0 ± 7.1 | 50.0 ± 0.0 |" in ablations.TABLE.read_text().splitlines()


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="--only K 33: must be one of default"):
        ablations.run(only=["K 33"])


def test_a_variant_is_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = (ROOT / "presets/micro.yaml").read_text().replace("presets/", f"{ROOT}/presets/")
    (tmp_path / "micro.yaml").write_text(preset)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "PRESET", tmp_path / "micro.yaml")
    monkeypatch.setattr(ablations, "COUNTS", {"train": (3, 3), "test": (2, 5)})
    ablations.one("default question only", 2, scale=0.001)
    result = read_json(ablations.result_file("default question only", 2))
    assert result["gflops_per_pair"] > 0
    assert {"type", "object", "false alarms", "operation", "own question: scenes", "own question: edits",
            *WORN} <= result["figures"].keys()
    assert all(0 <= value <= 1 for value in result["figures"].values())
