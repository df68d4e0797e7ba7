"""The complete pipeline at micro size in a copy of this checkout, run by DVC and by the flow.

The run is interrupted three times, at random moments, and then started again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorder import recorded_params

from benchmarks.interrupts import Terminal, wait_until

ROOT = Path(__file__).resolve().parent.parent
CODE = ("onediff", "flows", "mlflow", "presets", "dvc.yaml", ".dvcignore", "pyproject.toml", "requirements.lock",
        "packages.yaml", "LICENSE", "data/own", "data/pretrained")
REGISTER = """
import json, tempfile
from pathlib import Path
from onediff import registry
from onediff.ops.lineage import write_lineage
from onediff.serve.card import write_card
run_id = json.loads(Path("data/runs/tune.json").read_text())["run_id"]
with tempfile.TemporaryDirectory() as scratch:
    model, carried = Path("data/models/tune"), Path(scratch) / "carried"
    write_lineage(carried)
    write_card(carried)
    print(registry.register(registry.pipeline_evidence(model), run_id=run_id, carried=carried))
"""
DVC, FLOW = (sys.executable, "-m", "dvc", "repro"), (sys.executable, "-m", "flows.retrain")
INTERRUPTED = ("synthesize@scenes", "synthesize@edits", "build", "align", "tune", "caption")
MAKERS = ("PREFECT_", "MLFLOW_", "ONEDIFF_", "MAKE", "RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the micro preset, without data, DVC cache and MLflow runs."""
    folder = tmp_path_factory.mktemp("onediff")
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shutil.copy(ROOT / "presets/micro.yaml", folder / "params.yaml")
    for name in ("pairs", "written", "synthetic"):
        (folder / "data" / name).mkdir(parents=True)
    _run(folder, "git", "init", "-q")
    _run(folder, sys.executable, "-m", "dvc", "init", "-q")
    return folder


def _environment(folder: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(MAKERS)}
    return env | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                  "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests/recorder")]),
                  "RECORDED_PARAMS": f"{folder}.params", "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}


def _run(folder: Path, *command: str) -> str:
    """Run a command in the folder and return what it prints; fail if the command fails."""
    done = subprocess.run(command, cwd=folder, env=_environment(folder), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(copy: Path) -> Path:
    """The copy of the project after a complete run, which SIGINT, SIGTERM and SIGHUP interrupted at random moments."""
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed {seed}")
    rng = random.Random(seed)
    stages = sorted(rng.sample(range(len(INTERRUPTED)), 3))
    _interrupt(copy, "SIGINT", DVC, INTERRUPTED[stages[0]], rng.uniform(0, 1.5))
    _interrupt(copy, "SIGTERM", FLOW, INTERRUPTED[stages[1]], rng.uniform(0, 5))
    _interrupt(copy, "SIGHUP", DVC, INTERRUPTED[stages[2]], rng.uniform(0, 1.5))
    _run(copy, *DVC)
    return copy


def _interrupt(folder: Path, kind: str, command: tuple[str, ...], stage: str, moment: float) -> None:
    """Start a command, and send a signal to its terminal `moment` seconds after the stage began."""
    terminal = Terminal(folder, command, _environment(folder))
    wait_until(lambda: f"Running stage '{stage}'".encode() in terminal.output, 300)
    time.sleep(moment)
    seconds, remaining, printed = terminal.interrupt(kind)
    print(f"{kind} {moment:.1f} s into {stage}: ended after {seconds:.1f} s\n{printed}")
    assert seconds < 15 and not remaining and "Traceback" not in printed
    if kind != "SIGHUP":  # After SIGHUP the terminal is closed, so nothing can be printed.
        assert "stopped by SIG" in printed
    if command == FLOW:
        assert "onediff: stopped by SIGTERM; finished stages are kept" in printed
        assert "'python -m flows.retrain' continues" in printed


def test_dvc_repro_builds_all_outputs(built: Path) -> None:
    for name in ("report.html", "models/tune/model.safetensors", "diffcap/card.json", "reports/validation/index.html"):
        assert (built / "data" / name).exists()
    for name in ("metrics.json", "gate.json"):
        scores = json.loads((built / "data" / name).read_text())
        assert {"scenes", "edits"} <= scores.keys()
        for benchmark in scores.values():
            assert {"BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "floor", "num_pairs"} <= benchmark.keys()
    scores = json.loads((built / "data/metrics.json").read_text())
    assert {"change_type_accuracy", "changed_object_accuracy", "false_alarm_rate"} <= scores["scenes"].keys()
    assert "operation_accuracy" in scores["edits"]
    stress = json.loads((built / "data/stress.json").read_text())
    assert set(stress) == {"scenes", "edits"}
    for benchmark in stress.values():
        assert {"identical", "unrelated", "swapped", "curves", "attention"} <= benchmark.keys()


def test_dvc_yaml_lists_every_parameter_that_a_stage_reads(built: Path) -> None:
    read = recorded_params.read_notes(Path(f"{built}.params"))
    assert {stage for stage, _ in read} == {"synthesize", "probe", "validate", "build", "align", "tune", "caption",
                                            "stress", "report"}  # The stage `score` reads no parameter.
    assert list(recorded_params.undeclared(read)) == []


def test_every_test_pair_has_one_caption_in_the_order_of_the_records(built: Path) -> None:
    from onediff.data.record import read_table

    rows = read_table(built / "data/diffcap", "test-*.parquet")
    for benchmark in dict.fromkeys(row["source"] for row in rows):
        lines = (built / f"data/captions/test/{benchmark}.jsonl").read_text().splitlines()
        expected = [row["pair_id"] for row in rows if row["source"] == benchmark]
        assert [json.loads(line)["pair_id"] for line in lines] == expected


def test_a_second_dvc_repro_runs_no_stage(built: Path) -> None:
    before = (built / "dvc.lock").read_bytes()
    printed = _run(built, sys.executable, "-m", "dvc", "repro")
    assert "Running stage" not in printed and "Data and pipelines are up to date" in printed
    assert (built / "dvc.lock").read_bytes() == before


def test_a_change_of_runtime_yaml_makes_no_stage_stale(built: Path) -> None:
    (built / "runtime.yaml").write_text("workers: 1\ncheckpoint_every_s: 3.0\n")
    try:
        assert json.loads(_run(built, sys.executable, "-m", "dvc", "status", "--json")) == {}
    finally:
        (built / "runtime.yaml").unlink()


def test_the_trained_model_captions_two_image_files(built: Path) -> None:
    example = json.loads(_run(built, sys.executable, "-m", "onediff", "example", "--json").splitlines()[-1])
    assert example["model"] == "data/models/tune" and isinstance(example["caption"], str)
    printed = _run(built, sys.executable, "-m", "onediff", "caption", example["before"], example["after"],
                   "--model", example["model"])
    assert printed.splitlines()[-1] == example["caption"]


def test_the_flow_runs_no_stage_registers_the_model_and_leaves_no_server(built: Path) -> None:
    import psutil

    printed = _run(built, sys.executable, "-m", "flows.retrain")
    assert "Running stage" not in printed and "refused" in printed
    rows = json.loads(_run(built, sys.executable, "-m", "onediff", "registry", "list", "--json").splitlines()[-1])
    assert [row["aliases"] for row in rows] == [["candidate"]]
    assert not (built / "mlflow.db").exists()  # MLflow's default store; OneDiff has its store in .onediff.
    home = str(built)
    assert not [process.pid for process in psutil.process_iter() if _belongs(process, home)]


def _belongs(process: object, home: str) -> bool:
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        return process.environ().get("PREFECT_HOME", "").startswith(home)
    except psutil.Error:  # The process has ended or belongs to another user.
        return False


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_registered_version_is_verified_and_exported(built: Path) -> None:
    (built / ".gitignore").write_text("/.onediff/\n__pycache__/\n")
    _run(built, "git", "add", "-A")
    _run(built, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "all")
    onediff = (sys.executable, "-m", "onediff")
    version = _run(built, sys.executable, "-c", REGISTER).splitlines()[-1]
    printed = _run(built, *onediff, "lineage", version, "--verify")
    assert "FAILED" not in printed and "100.0 % identical captions of" in printed
    assert f"version {version}: verified" in printed
    assert not list((built / ".onediff").glob("verify-*"))
    _run(built, *onediff, "export", version, "exported")
    pair = json.loads(_run(built, *onediff, "example", "--json").splitlines()[-1])
    printed = _run(built, *onediff, "caption", pair["before"], pair["after"], "--model", "exported")
    assert printed.splitlines()[-1] == pair["caption"]
    assert (built / "exported/README.md").read_text().startswith("---\nlanguage: en\n")
