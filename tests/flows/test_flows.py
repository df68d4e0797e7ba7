"""Tests of the flow `retrain` and of the code that runs, locks and ends the processes of a flow."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ruamel.yaml import YAML

from flows import names, pipeline, processes, retrain, tasks
from flows.notify import score_table
from flows.processes import DVC, end, pipeline_lock, stream
from onediff.config import load_params
from onediff.interrupts import SIGNALS

ROOT = Path(__file__).resolve().parents[2]
DVC_YAML = """
stages:
  copy:
    cmd: python -c "import shutil; shutil.copy('in.txt', 'out.txt')"
    deps: [in.txt]
    outs: [out.txt]
  broken:
    cmd: python -c "raise SystemExit(7)"
    deps: [out.txt]
    outs: [never.txt]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with the two stages of DVC_YAML, of which the second fails. The test runs in this folder."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([*DVC, "init", "-q"], check=True)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("in.txt").write_text("one")
    return tmp_path


def test_a_stage_runs_then_is_up_to_date_then_comes_from_the_run_cache(project: Path) -> None:
    assert pipeline.stale_stages() == {"copy", "broken"}
    assert tasks.repro.fn("copy").name == "Ran"
    assert "copy" not in pipeline.stale_stages()
    assert tasks.repro.fn("copy").name == "UpToDate"
    Path("in.txt").write_text("two")
    assert tasks.repro.fn("copy").name == "Ran"
    Path("in.txt").write_text("one")
    assert tasks.repro.fn("copy").name == "Restored"
    assert Path("out.txt").read_text() == "one"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_stage_fails_if_the_dvc_cache_has_no_space_for_its_output(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC itself does not fail: for an output that is a folder, it prints an error and ends with exit code 0."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], check=True)
    try:
        monkeypatch.chdir(tmp_path)
        subprocess.run([*DVC, "init", "-q", "--no-scm"], check=True)
        Path("dvc.yaml").write_text("stages: {copy: {cmd: mkdir -p out && cp in.txt out, deps: [in.txt], outs: [out]}}")
        Path("in.txt").write_text("x" * 3_000_000)
        assert tasks.repro.fn("copy").is_failed()
        Path("in.txt").write_text("x" * 1_000_000)
        assert tasks.repro.fn("copy").name == "Ran"
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_dvc_does_not_run_if_all_stages_are_known_to_be_up_to_date(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # This folder is no DVC project, so every DVC command would fail here.
    shutil.copy(ROOT / "presets/micro.yaml", "params.yaml")
    assert retrain.run_here(set()).name == "UpToDate"


def test_the_message_of_a_failed_stage_contains_the_status_that_training_wrote(project: Path) -> None:
    tasks.repro.fn("copy")
    state = tasks.repro.fn("broken")
    assert state.is_failed() and state.message == "broken failed; see its message above"
    status = Path(".onediff/scratch/abc/status.json")
    status.parent.mkdir(parents=True)
    status.write_text(json.dumps({"state": "diverged", "step": 12, "reason": "loss nan"}))
    os.utime(status, (time.time() + 60,) * 2)
    assert tasks.repro.fn("broken").message == "broken failed: diverged at step 12 (loss nan)"


def test_an_invalid_dvc_yaml_is_reported_in_one_line(project: Path) -> None:
    Path("dvc.yaml").write_text("stages: [")
    with pytest.raises(ValueError, match=r"^dvc status: '\./dvc\.yaml' is invalid\. .*line 2") as error:
        pipeline.stale_stages()
    assert "\n" not in str(error.value)


def test_the_output_of_a_command_is_printed_and_returned(capfd: pytest.CaptureFixture[str]) -> None:
    assert stream([sys.executable, "-c", "print('é'); raise SystemExit(3)"]) == (3, "é\n")
    assert capfd.readouterr().out == "é\n"


def test_a_second_run_is_refused_while_another_run_holds_the_lock(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from flows.processes import pipeline_lock\nwith pipeline_lock(): print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"another run holds the pipeline \(process {holder.pid}\)"), pipeline_lock():
        pass
    holder.communicate("\n", timeout=30)
    with pipeline_lock():
        pass


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_run_ends_every_process_that_a_stage_started(tmp_path: Path, number: signal.Signals) -> None:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); " \
            "time.sleep(600)"
    run = _interruptible(tmp_path, child)
    descendants = _wait_for_children(run.pid, 2)
    run.send_signal(number)
    run.send_signal(number)  # An impatient user presses Ctrl-C twice.
    assert run.communicate(timeout=60)[0] == f"{number.name}, no child\n"
    assert not any(processes.is_alive(process) for process in descendants)


def test_a_rank_in_another_session_that_ignores_signals_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    rank = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; open('up', 'w'); time.sleep(600)"
    stage = ("import subprocess, sys, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
             f"subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)")
    (tmp_path / "runtime.yaml").write_text("grace_s: 1.0\n")
    run = _interruptible(tmp_path, stage)
    descendants = _wait_for_children(run.pid, 2)
    while not (tmp_path / "up").exists():
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == "SIGTERM, no child\n"
    assert not any(processes.is_alive(process) for process in descendants)


def _interruptible(folder: Path, child: str) -> subprocess.Popen[str]:
    """Start a process that runs the Python code `child` with `stream`.

    After a signal, the process prints the name of the signal, and its remaining children including zombies.
    """
    code = ("import sys, psutil\nfrom flows import processes\nfrom onediff import interrupts\n"
            "interrupts.raise_keyboard_interrupt(30)\n"
            f"try: processes.stream([sys.executable, '-c', {child!r}])\n"
            "except KeyboardInterrupt as interrupt: print(f'{interrupt},', psutil.Process().children() or 'no child')")
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder,
                            stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_an_interrupted_stage_runs_again_and_leaves_no_lock_of_dvc(project: Path) -> None:
    """DVC gets no signal itself, because it would leave its lock or an incomplete dvc.lock behind."""
    Path("stage.py").write_text("import time\nfrom pathlib import Path\nfrom onediff.stages.command import run\n"
                                "def slow():\n    Path('slow.txt').write_text('x')\n"
                                "    while not Path('go').exists(): time.sleep(0.1)\nrun(slow)\n")
    Path("dvc.yaml").write_text("stages:\n  slow:\n    cmd: python stage.py\n    outs: [slow.txt]\n")
    code = ("import psutil\nfrom flows import tasks\nfrom onediff import interrupts\n"
            "interrupts.raise_keyboard_interrupt(30)\n"
            "try: tasks.repro.fn('slow')\n"
            "except KeyboardInterrupt as interrupt: print(f'{interrupt},', psutil.Process().children() or 'no child')")
    run = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not Path("slow.txt").exists():
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    assert stdout.splitlines()[-1] == "SIGINT, no child"
    assert "slow: stopped by SIGTERM before it was finished; the same command runs it again" in stderr
    assert "Traceback" not in stderr and not any(json.loads(Path(".dvc/tmp/rwlock").read_text()).values())
    Path("go").touch()
    assert tasks.repro.fn("slow").name == "Ran"


def test_a_second_run_is_refused_before_it_starts_a_prefect_server(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    Path("dvc.yaml").touch()
    with pipeline_lock():
        done = subprocess.run([sys.executable, "-m", "flows.retrain"], env=env | {"PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not Path(".onediff/prefect/server.log").exists()
    assert done.stderr == (f"onediff: .onediff/pipeline.lock: another run holds the pipeline (process {os.getpid()}): "
                           f"wait until it ends, or stop it with 'kill {os.getpid()}'\n")


def test_a_flow_outside_of_a_project_ends_before_it_starts_a_prefect_server(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    done = subprocess.run([sys.executable, "-m", "flows.evaluate"], cwd=tmp_path, env=env | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / ".onediff/prefect/server.log").exists()
    assert done.stderr == (f"onediff: {tmp_path}/dvc.yaml does not exist: run this command in the folder of the "
                           "project\n")


def test_the_prefect_server_ends_when_the_flow_is_killed(tmp_path: Path) -> None:
    code = "import flows\nfrom flows.server import temporary_server\nwith temporary_server(): pass"
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    flow = subprocess.Popen([sys.executable, "-c", code], env=env | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    [server] = _wait_for_children(flow.pid, 1)
    flow.kill()
    flow.wait()
    _, running = psutil.wait_procs([server], timeout=30)
    assert not running


def test_a_stage_ends_when_the_flow_that_started_it_is_killed(tmp_path: Path) -> None:
    child = "import time; from onediff.stages.command import run; run(lambda: time.sleep(600))"
    code = f"import sys\nfrom flows import processes\nprocesses.stream([sys.executable, '-c', {child!r}])"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                           env={**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "any"})
    descendants = _wait_for_children(run.pid, 1)
    time.sleep(3)  # After 3 seconds, the stage has started the thread that watches whether the flow exists.
    assert all(map(processes.is_alive, descendants))
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while any(map(processes.is_alive, descendants)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(processes.is_alive, descendants))


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    code = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); "
            "time.sleep(600)")
    stubborn = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0)
    assert stubborn.stdout is not None and stubborn.stdout.readline() == b"ready\n"
    end(stubborn, 0.5)
    assert stubborn.wait(timeout=30) == -signal.SIGKILL
    stubborn.stdout.close()


def test_the_score_tables_fit_a_terminal_and_have_baselines_below_each_benchmark() -> None:
    floor = {"constant": {"CIDEr": 0.25}}
    metrics = {"scenes": {"CIDEr": 5.0, "num_pairs": 7, "false_alarm_rate": 0.02, "floor": floor},
               "edits": {"CIDEr": 3.0, "num_pairs": 11, "operation_accuracy": 0.9, "floor": {}}}
    captions, behaviour = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
                           for table in score_table(metrics).split("\n\n"))
    assert captions[0] == ["", "pairs", "CIDEr"] and behaviour[0] == ["", "false alarms", "operation right"]
    assert captions[2:] == [["scenes", "7", "5.000"], ["baseline: constant", "", "0.250"], ["edits", "11", "3.000"]]
    assert behaviour[2:] == [["scenes", "0.020", ""], ["edits", "", "0.900"]]
    committed = json.loads((ROOT / "data/metrics.json").read_text())
    assert all(len(line) <= 100 for line in score_table(committed).splitlines())


@pytest.mark.parametrize(("parameters", "subject"), [
    ({}, ""), ({"version": None, "candidate": "3"}, "3 "), ({"model": "models:/onediff/1"}, "models:/onediff/1 ")])
def test_a_flow_run_is_named_after_its_flow_its_subject_and_the_date(
        monkeypatch: pytest.MonkeyPatch, parameters: dict[str, str], subject: str) -> None:
    monkeypatch.setattr(names, "flow_run", SimpleNamespace(flow_name="promote", parameters=parameters))
    assert names.dated_name() == f"promote {subject}{date.today():%Y-%m-%d}"


def test_the_flow_lists_every_stage_of_dvc_yaml_after_the_stages_that_it_depends_on(tmp_path: Path) -> None:
    values = YAML(typ="safe").load((ROOT / "presets/paper.yaml").read_text())
    values["data"] |= {"diffused": ["drawn"], "written": [*values["data"]["written"], "drawn"]}
    YAML().dump(values, tmp_path / "params.yaml")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    subprocess.run([*DVC, "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    for folder in ("pairs", "written", "synthetic"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    command = [*DVC, "stage", "list", "--name-only"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    named = pipeline.stages(load_params(tmp_path / "params.yaml").data)
    assert sorted(named) == sorted(listed)
    assert {"read@clevr_change", "retrieve@coco", "instruct@drawn", "diffuse@drawn", "write@drawn"} <= set(named)
    order = {name: position for position, name in enumerate(named)}
    command = [*DVC, "dag", "--dot"]
    edges = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    pairs = re.findall(r'"(.+)" -> "(.+)"', edges.stdout)
    assert len(pairs) > 20
    assert all(order[first] < order[then] for first, then in pairs)


def _wait_for_children(pid: int, count: int) -> list[psutil.Process]:
    """Wait until a process has `count` descendants, and return the descendants. Fail after 30 seconds."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        descendants = psutil.Process(pid).children(recursive=True)
        if len(descendants) >= count:
            return descendants
        time.sleep(0.1)
    raise AssertionError(f"process {pid} did not start {count} processes within 30 seconds")


def test_dvc_files_inside_a_dependency_are_inputs_of_the_stage(tmp_path: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "presets/backbones").mkdir(parents=True)
    (tmp_path / "presets/backbones/mine.dvc").write_text("outs: []\n")
    assert pipeline.inputs_of("align", tmp_path) == (["presets/backbones/mine.dvc"], [])
