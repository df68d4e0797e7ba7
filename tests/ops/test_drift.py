"""Tests of `onediff drift`: statistics, the usage log, exit codes and the flow `check_drift`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_cli
from registered import register, write_lock, write_results, write_rules
from ruamel.yaml import YAML

from onediff import registry
from onediff.config import Config, Drift
from onediff.data.record import Record, write_shards
from onediff.data.synthesis.phrases import EDIT_TEMPLATES, SCENE_TEMPLATES
from onediff.data.synthesis.scenes.records import scene_records
from onediff.model.assemble import build
from onediff.model.captioner import Captioner
from onediff.model.digest import weights_digest
from onediff.ops import drift
from onediff.ops.drift import DISTRIBUTIONS, compare, difference_interval, says_no_change, write_profile
from onediff.serve.usage_log import append

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Drift(num_pairs=20, min_pairs=50, max_distance=0.25, max_rate_change=0.15, chance=0.01)
CAPTIONS = ("nothing has changed", "the small red metal cube was removed", "the large blue ball turned green")


def usage_rows(count: int, seed: int, *, brighter: float = 0, size: int = 96, confidence: float = 0.7,
          captions: tuple[str, ...] = CAPTIONS) -> list[dict[str, Any]]:
    """Return random rows in the format of the usage log. The options shift one figure."""
    rng = np.random.default_rng(seed)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return [{"time": now, "model": "m", "weights": "abc", "mode": "RGB",
             "hash_before": f"{seed}-{number}", "hash_after": "b", "distance": float(rng.exponential(9)),
             "width_before": size, "height_before": size, "width_after": size, "height_after": size,
             "brightness": float(rng.normal(120, 15) + brighter), "contrast": float(rng.normal(30, 6)),
             "confidence": float(np.clip(rng.normal(confidence, 0.05), 0, 1)), "instruction": "What?",
             "caption": str(rng.choice(captions))} for number in range(count)]


def profile_of(rows: list[dict[str, Any]], alarms: int = 4) -> dict[str, Any]:
    """Return the profile that `write_profile` would write for these rows."""
    return {"num_pairs": len(rows), "weights": "abc",
            "distributions": {name: sorted(of(row) for row in rows) for name, of in DISTRIBUTIONS.items()},
            "rates": {"no_change": [sum(says_no_change(row["caption"]) for row in rows), len(rows)],
                      "false_alarms": [alarms, len(rows)], "false_alarms_worn": [alarms, len(rows)]}}


def test_the_interval_of_a_rate_difference_equals_the_published_example() -> None:
    """The example is from Newcombe (1998), table II, method 10: 56 of 70 against 48 of 80."""
    low, high = difference_interval((48, 80), (56, 70), 0.05)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_distribution_is_compared_by_the_largest_gap_between_distribution_functions() -> None:
    then, now = usage_rows(211, 1), usage_rows(173, 2, brighter=9)
    [figure] = [each for each in compare(profile_of(then), now, SETTINGS).figures if each.name == "brightness"]
    values = sorted(row["brightness"] for row in (*then, *now))
    gaps = [abs(np.mean([row["brightness"] <= value for row in then])
                - np.mean([row["brightness"] <= value for row in now])) for value in values]
    assert figure.difference == pytest.approx(max(gaps))
    assert figure.then == np.median([row["brightness"] for row in then])


def test_random_halves_of_one_sample_do_not_drift() -> None:
    rows = usage_rows(400, 3)
    rng = np.random.default_rng(11)
    alarms = 0
    for _ in range(200):
        order = rng.permutation(len(rows))
        first, second = ([rows[index] for index in half] for half in (order[:200], order[200:]))
        alarms += bool(compare(profile_of(first), second, SETTINGS, alarms={"false_alarms": (3, 100)}).moved)
    assert alarms <= 2  # SETTINGS.chance allows one false report in 100 comparisons.


@pytest.mark.parametrize(("changes", "moved"), [
    ({"brighter": 40}, ["brightness"]),
    ({"size": 640}, ["width", "height"]),
    ({"confidence": 0.5}, ["confidence"]),
    ({"captions": ("the of of cube",)}, ["caption_words", "no_change"]),
])
def test_a_figure_that_moved_is_listed_by_name(changes: dict[str, Any], moved: list[str]) -> None:
    result = compare(profile_of(usage_rows(200, 1)), usage_rows(100, 2, **changes), SETTINGS)
    assert result.moved == moved and result.verdict == f"drifted: {', '.join(moved)}"
    assert result.as_dict()["drifted"] is True
    text = drift.as_text(result)
    assert all(name in text for name in moved) and "moved" in text and "0.250" in text


def test_a_rise_of_false_alarms_alone_is_drift() -> None:
    then, now = profile_of(usage_rows(200, 1)), usage_rows(100, 2)
    assert compare(then, now, SETTINGS, alarms={"false_alarms": (40, 100), "false_alarms_worn": (3, 100)}).moved == [
        "false_alarms"]
    assert "false alarms were not measured" in compare(then, now, SETTINGS).notes[0]


def test_a_difference_that_chance_explains_is_not_drift() -> None:
    settings = SETTINGS.model_copy(update={"max_distance": 0.01, "max_rate_change": 0.01})
    figures = compare(profile_of(usage_rows(200, 1)), usage_rows(100, 2), settings).figures
    assert any(figure.difference > figure.threshold and figure.by_chance and not figure.moved for figure in figures)


def test_too_few_pairs_give_no_verdict() -> None:
    result = compare(profile_of(usage_rows(200, 1)), usage_rows(49, 2, brighter=90), SETTINGS)
    assert (result.figures, result.moved, result.verdict) == ([], [], "no verdict")
    assert "drift.min_pairs requires 50 different pairs, and 49 were captioned" in result.notes[0]


def test_a_pair_that_is_captioned_repeatedly_counts_once() -> None:
    assert compare(profile_of(usage_rows(200, 1)), usage_rows(10, 2) * 30, SETTINGS).num_pairs == 10


def test_sentences_of_both_sources_that_nothing_changed_are_recognised() -> None:
    assert all(map(says_no_change, (*SCENE_TEMPLATES["none"], *EDIT_TEMPLATES["none"], "Nothing has changed.")))
    assert not any(map(says_no_change, ("the red cube was removed", "brighten the image", "", "no idea")))


@pytest.fixture(scope="module")
def project(micro: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a randomly initialized model, a `gate` split, and thresholds for drift."""
    folder = tmp_path_factory.mktemp("project")
    for part in build(micro.model, seed=5):
        part.save_pretrained(folder / "model")
    records = [record for index in range(4) for record in scene_records(micro, "gate", index)]
    write_shards(records, folder / "diffcap", "gate", shard_pairs=100)
    params = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    params["drift"] |= {"min_pairs": 10}
    YAML().dump(params, folder / "params.yaml")
    (folder / "runtime.yaml").write_text("usage_log: usage\n")
    return folder


def test_a_profile_has_every_figure_and_writing_it_twice_gives_the_same_bytes(project: Path, tmp_path: Path) -> None:
    first, second = (write_profile(tmp_path / name, project / "model", project / "diffcap", num_pairs=11)
                     for name in "ab")
    assert first == tmp_path / "a/profile.json" and first.read_bytes() == second.read_bytes()
    profile = drift.read_profile("model", first)
    assert profile["weights"] == weights_digest(project / "model") and profile["num_pairs"] == 11
    assert set(profile["distributions"]) == set(DISTRIBUTIONS)
    assert {len(values) for values in profile["distributions"].values()} == {11}
    assert profile["rates"]["false_alarms"][1] == profile["rates"]["false_alarms_worn"][1] == 11


def test_false_alarms_are_counted_on_pairs_of_an_image_with_itself(project: Path, scene_pairs: list[Record]) -> None:
    captioner = Captioner.load(project / "model", device="cpu")
    images = [record.before for record in scene_pairs[:5]]
    captions = captioner.caption([(image, image) for image in map(drift.open_image, images)])
    num_alarms = sum(not says_no_change(caption) for caption in captions)
    assert drift.false_alarms(captioner, images)["false_alarms"] == (num_alarms, 5)


def test_the_usage_log_is_compared_with_the_profile_in_the_model_folder(project: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    path = write_profile(project / "model", project / "model", project / "diffcap", num_pairs=11)
    weights = json.loads(path.read_text())["weights"]
    Path("usage").mkdir()
    rows = [row | {"weights": weights} for row in usage_rows(60, 1, size=640)]
    day = Path("usage/2099-01-01.jsonl")
    append(day, [*rows, *usage_rows(7, 2)])
    day.write_text(day.read_text() + "{cut\n")
    result = drift.examine(model="model")
    assert result.num_pairs == 60 and {"width", "height"} <= set(result.moved)
    assert result.notes[1:] == ["7 captions were ignored, because a model with other weights made them",
                                "1 lines of the log were ignored, because they are damaged"]


def test_a_missing_log_or_profile_is_an_error_with_a_cure(project: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
    with pytest.raises(ValueError, match=r"runtime\.yaml: usage_log must be a folder, and it is not set"):
        drift.examine(model="model")
    (tmp_path / "runtime.yaml").write_text("usage_log: usage\n")
    with pytest.raises(FileNotFoundError, match=r"^model is not a model folder \(it has no config\.json\): "):
        drift.examine(model="model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    cure = (r"run 'onediff profile \.onediff/profile --model model', then 'onediff drift --model model --profile "
            r"\.onediff/profile/profile\.json'$")
    with pytest.raises(FileNotFoundError, match=rf"^model/profile\.json does not exist: {cure}"):
        drift.examine(model="model")
    with pytest.raises(ValueError, match=rf"^model is a folder, but the profile must be a file: {cure}"):
        drift.examine(model="model", profile=Path("model"))
    (tmp_path / "model/profile.json").write_text('{"distributions": {}}')
    with pytest.raises(ValueError, match="the profile is damaged or incomplete"):
        drift.examine(model="model")
    with pytest.raises(ValueError, match=r"^model is a folder, but .* a file: give model/profile\.json$"):
        drift.examine(profile=Path("model"))


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    return run_cli(monkeypatch, "drift", *arguments)


def test_exit_codes_tell_steady_from_drifted_from_not_measurable(project: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch) == 2
    assert capsys.readouterr().err.startswith("onediff: ") and "params.yaml" not in os.listdir()
    (tmp_path / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
    assert run_command(monkeypatch) == 2 and "usage_log must be a folder" in capsys.readouterr().err
    for rows, exit_code in ((usage_rows(49, 2), 2), (usage_rows(100, 2), 0), (usage_rows(100, 2, size=640), 1)):
        result = compare(profile_of(usage_rows(200, 1)), rows, SETTINGS)
        monkeypatch.setattr(drift, "examine", lambda result=result, **_: result)
        assert run_command(monkeypatch, "--json") == exit_code
        assert json.loads(capsys.readouterr().out)["verdict"] == result.verdict


@pytest.mark.parametrize("days", ["0", "-1", "nan", "inf", "1e12", "36501"])
def test_a_number_of_days_without_a_meaning_is_refused_with_exit_code_2(
        days: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project)
    assert run_command(monkeypatch, "--days", days) == 2
    message = capsys.readouterr().err
    assert message == f"onediff: days must be greater than 0 and at most 36500, got {float(days):g}\n"


def test_an_unexpected_error_does_not_have_the_exit_code_of_drift(monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: object) -> None:
        raise OverflowError("date value out of range")

    monkeypatch.setattr(drift, "examine", fail)
    assert run_command(monkeypatch) == 2 and "OverflowError: date value out of range" in capsys.readouterr().err


def test_the_help_names_the_largest_number_of_days(capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(monkeypatch, "--help") == 0
    assert f"greater than 0 and at most {drift.MAX_DAYS}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_flow_ends_in_a_state_named_after_the_verdict(project: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for name in ("params.yaml", "runtime.yaml"):
        (tmp_path / name).write_bytes((project / name).read_bytes())
    profile = write_profile(tmp_path / "carried", project / "model", project / "diffcap", num_pairs=11)
    write_results()
    write_lock(project / "model")
    register(project / "model", carried=profile.parent)
    assert registry.promote(rules=write_rules(Path("rules.yaml"))).promoted
    Path("usage").mkdir()
    Path("dvc.yaml").write_text("stages: {}\n")  # A flow starts only in a folder that contains dvc.yaml.

    def last_line() -> str:
        completed = subprocess.run([sys.executable, "-m", "flows.check_drift", "1"], text=True, capture_output=True,
                                   check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert completed.returncode == 0, completed.stderr
        return completed.stdout.splitlines()[-1]

    assert last_line().startswith("NoVerdict: no verdict; params.yaml: drift.min_pairs requires 10 different pairs")
    weights = json.loads(profile.read_text())["weights"]
    append(Path("usage/2099-01-01.jsonl"), [row | {"weights": weights} for row in usage_rows(60, 1, size=640)])
    assert last_line().startswith("Drifted: drifted: width, height")
    drifted = subprocess.run([sys.executable, "-m", "onediff", "drift", "--json"], text=True, capture_output=True,
                             check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert drifted.returncode == 1 and json.loads(drifted.stdout)["drifted"] is True


def test_the_histogram_of_the_confidence_is_a_png() -> None:
    from flows.check_drift import picture

    assert picture([0.5, 0.6], [0.1]).startswith(b"\x89PNG")
