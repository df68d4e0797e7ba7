"""params.yaml is checked against the files on this machine, and one message lists all errors before any stage runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onediff import interrupts
from onediff.config import Config, load_params
from onediff.ops import doctor
from onediff.repro.preflight import check_inputs, check_mixtures

ROOT = Path(__file__).parents[2]
MICRO = (ROOT / "presets/micro.yaml").read_text()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def params(*changes: tuple[str, str]) -> Config:
    """Write the micro preset with these replacements of text as params.yaml, and load it."""
    text = MICRO
    for old, new in changes:
        assert old in text, f"presets/micro.yaml no longer holds {old!r}"
        text = text.replace(old, new, 1)
    Path("params.yaml").write_text(text)
    return load_params()


def test_every_preset_passes(project: Path) -> None:
    for name in ("micro", "tiny"):
        check_inputs(load_params(ROOT / f"presets/{name}.yaml"))


def test_one_error_lists_every_wrong_name_of_a_source(project: Path) -> None:
    with pytest.raises(ValueError, match="not one of the sources") as caught:
        params(("raw: []", "raw: [mine]"), ("mixture: {scenes: 3, edits: 1}", "mixture: {mien: 1, edist: 1}"),
               ("max_distance: {}", "max_distance: {nobody: 2.0}"))
    assert str(caught.value).splitlines() == [
        "params.yaml: data.leaks.max_distance: 'nobody' is not one of the sources scenes, edits, mine; correct the "
        "name, or add the source to the section data",
        "params.yaml: tune.mixture: 'mien' is not one of the sources scenes, edits, mine; did you mean 'mine'?",
        "params.yaml: tune.mixture: 'edist' is not one of the sources scenes, edits, mine; did you mean 'edits'?"]


def test_one_error_lists_every_missing_input(project: Path) -> None:
    Path("data/raw/mine").mkdir(parents=True)
    config = params(("raw: []", "raw: [mien, birds_to_words]"), ("photos: null", "photos: holidays"),
                    ("language: presets/backbones/tiny/language", "language: ./llama"))
    with pytest.raises(ValueError, match=r"^params\.yaml: ") as caught:
        check_inputs(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0] == ("params.yaml: data.raw: 'mien' needs the folder data/raw/mien, which does not exist; did you "
                        "mean 'mine'?")
    assert lines[1].startswith("params.yaml: data.raw: 'birds_to_words' needs the folder data/raw/birds_to_words, "
                               "which does not exist; see data/README.md")
    assert lines[2].startswith("params.yaml: data.edits.photos: the folder holidays does not exist")
    assert lines[3].startswith("params.yaml: model.language: folder ./llama does not exist; correct the path")


def test_sources_with_training_pairs_only_are_refused(project: Path) -> None:
    Path("data/raw/llava_558k").mkdir(parents=True)
    config = params(("generated: [scenes, edits]", "generated: []"), ("raw: []", "raw: [llava_558k]"),
                    ("mixture: {scenes: 1}", "mixture: {llava_558k: 1}"),
                    ("mixture: {scenes: 3, edits: 1}", "mixture: {llava_558k: 1}"))
    with pytest.raises(ValueError, match="splits val, gate and test, but llava_558k have only training pairs"):
        check_inputs(config)


def test_an_input_may_be_missing_if_dvc_has_the_outputs_made_from_it(project: Path) -> None:
    config = params(("raw: []", "raw: [mine, other]"), ("photos: null", "photos: holidays"))
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  read@mine:\n    cmd: a\n  synthesize@edits:\n    cmd: a\n"
                                "    params:\n      params.yaml:\n        data.edits:\n          photos: holidays\n")
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/other.dvc").touch()
    check_inputs(config)


def test_a_mixture_needs_training_pairs_and_validation_pairs(project: Path) -> None:
    Path("data/diffcap").mkdir(parents=True)
    counts = {"train": {"scenes": {"none": 7}}, "val": {"mine": {"unlabelled": 3}}, "gate": {}, "test": {}}
    Path("data/diffcap/card.json").write_text(json.dumps({"num_pairs": counts}))
    check_mixtures(params(("mixture: {scenes: 3, edits: 1}", "mixture: {scenes: 3}"),
                          ("validate_every: 4", "validate_every: null")))
    with pytest.raises(ValueError, match=r"tune\.mixture: 'edits' has no training pairs in data/diffcap") as caught:
        check_mixtures(params())
    assert str(caught.value).splitlines()[1].startswith("params.yaml: tune.validate_every: a source of tune.mix")


STAGE = """
from onediff.stages.command import run
def align() -> None:
    print("trains")
run(align)
"""


@pytest.mark.parametrize(("stage", "change", "message"), [
    ("report", ("raw: []", "raw: [mine]"), "data.raw: 'mine' needs the folder data/raw/mine, which does not exist"),
    ("align", ("seed: 7", "seed: 7"), "tune.mixture: 'edits' has no training pairs in data/diffcap")])
def test_every_stage_checks_its_inputs_first(stage: str, change: tuple[str, str], message: str, project: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc repro` starts no code of this project before the first stage, so each stage must make the checks."""
    monkeypatch.setenv("DVC_STAGE", stage)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv(interrupts.FLOW, raising=False)
    Path("data/diffcap").mkdir(parents=True)
    counts = {"train": {"scenes": {"none": 7}}, "val": {"scenes": {"none": 3}}}
    Path("data/diffcap/card.json").write_text(json.dumps({"num_pairs": counts}))
    params(change)
    done = subprocess.run([sys.executable, "-c", STAGE], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith(f"align: params.yaml: {message}")
    assert done.stderr.count("\n") == 1


def test_onediff_doctor_suggests_a_cure_that_fits_the_error(project: Path) -> None:
    missing = doctor._project()[0]
    assert "params.yaml does not exist" in missing.message and missing.cure.startswith("run 'onediff preset tiny'")
    with pytest.raises(ValueError, match="mien"):
        params(("mixture: {scenes: 3, edits: 1}", "mixture: {mien: 1}"))
    wrong = doctor._project()[0]
    assert re.search(r"tune\.mixture: 'mien'", wrong.message) and "preset tiny" not in wrong.cure
    params(("raw: []", "raw: [mine]"))
    absent = doctor._project()[0]
    assert not absent.ok and "data/raw/mine" in absent.message
