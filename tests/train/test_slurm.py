"""Tests of Slurm jobs on a real Slurm cluster of one machine, which a fixture of this file starts and stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onediff.config import Runtime
from onediff.train.launch import dispatch, slurm
from onediff.train.status import read_status

ROOT = Path(__file__).parents[2]
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
RANK = '''
"""A test program that replaces a rank and runs ten steps. After SIGTERM it writes a checkpoint.

The file FOLDER/plan contains the seconds that a step takes, or the word fail.
"""
import json, os, pathlib, signal, sys, time
folder, rank = pathlib.Path(os.environ["FOLDER"]), int(os.environ["RANK"])
KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
(folder / f"rank-{rank}.json").write_text(json.dumps({key: os.environ.get(key) for key in KEYS}))
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
def write_status(state, step, reason=""):
    if rank == 0:
        (folder / "part").write_text(json.dumps({"state": state, "step": step, "reason": reason}))
        os.replace(folder / "part", folder / "status.json")
plan = (folder / "plan").read_text()
checkpoint = folder / f"checkpoint-{rank}"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
write_status("running", first)
if plan == "fail":
    print("the last line of a rank", flush=True)
    write_status("failed", first, "ValueError: no such thing")
    sys.exit(1)
for step in range(first, 10):
    time.sleep(float(plan))
    print("step", step, flush=True)
    if signals:
        checkpoint.write_text(str(step + 1))
        write_status("preempted", step + 1, "SIGTERM")
        sys.exit(1)
write_status("finished", 10)
if rank == 0:
    (folder / "run.json").write_text("{}")
'''
STAGE = '''
import sys
from pathlib import Path
from onediff.config import Runtime, Slurm
from onediff.train.launch import dispatch
runtime = Runtime(launcher="slurm", gpus=2, device="cpu", slurm=Slurm(poll_s=0.5, time="5", options=["--overcommit"]))
try:
    print(dispatch.launch_ranks("align", runtime, Path("scratch"), module="rank"))
except ValueError as error:
    sys.exit(str(error))
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start the Slurm daemons munged, slurmctld and slurmd with all their files in a temporary folder."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing or os.getuid():
        pytest.skip(f"needs {', '.join(missing) or 'root'}: apt-get install slurm-wlm munge, as root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder))
    daemons = [["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/key",
                f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"],
               ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"], ["slurmd", "-D", "-f", f"{folder}/slurm.conf"]]
    processes: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            for command in daemons:
                log = (folder / f"{command[0]}.out").open("wb")
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
                time.sleep(1)
            wait_for(lambda: "idle" in _stdout("sinfo", "--noheader", "--format=%T"), 60)
            yield
        finally:
            _stdout("scancel", "--me", "--full", "--signal=KILL")
            for process in reversed(processes):
                process.terminate()
                process.wait(30)


def _configuration(folder: Path) -> str:
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    host = socket.gethostname()
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=5
OverTimeLimit=0
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def folder(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    (tmp_path / "rank.py").write_text(RANK)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("FOLDER", str(scratch))
    monkeypatch.setattr(slurm, "GRACE_S", 20.0)
    monkeypatch.chdir(tmp_path)
    return scratch


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"the condition did not become true within {timeout_s} s"
        time.sleep(0.1)


def _stdout(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def start_stage() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", STAGE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def slurm_runtime(**changes: object) -> Runtime:
    """Return runtime settings for a Slurm job of two ranks on CPUs; `changes` replace settings of the job."""
    settings = {"poll_s": 0.5, "time": "5", "options": ["--overcommit"]} | changes
    return Runtime.model_validate({"launcher": "slurm", "gpus": 2, "device": "cpu", "slurm": settings})


def is_running(folder: Path) -> bool:
    return read_status(folder)["state"] == "running" and (folder / "rank-1.json").exists()


def job_number(folder: Path) -> str:
    return str(json.loads((folder / "job.json").read_text())["job"])


def test_the_batch_script_requests_the_resources_of_runtime_yaml(tmp_path: Path) -> None:
    runtime = Runtime.model_validate({"launcher": "slurm", "nodes": 4, "gpus": 8, "slurm": {
        "partition": "gpu", "account": "lab", "time": "2-00:00:00", "options": ["--qos=long", "--mem=0"]}})
    lines = slurm.script(runtime, "onediff.stages.tune", tmp_path / "tune-0123").splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {f"#SBATCH {option}" for option in (
        "--job-name=tune-0123", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu",
        "--account=lab", "--time=2-00:00:00", "--signal=TERM@120", "--requeue", "--qos=long", "--mem=0",
        f"--output={tmp_path}/tune-0123/slurm-%j.out")} <= set(lines)
    assert f"{sys.executable} -u -m onediff.stages.tune" in "\n".join(lines)
    assert "unset DS_ACCELERATOR" in "\n".join(lines)
    assert "--gpus-per-node" not in slurm.script(Runtime(device="cpu"), "onediff.stages.tune", tmp_path / "tune")


def test_a_machine_without_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="launcher is slurm, but the program sbatch is not installed; run this"):
        dispatch.launch_ranks("align", slurm_runtime(), tmp_path, module="rank")


@pytest.mark.slow
def test_a_job_runs_one_rank_for_each_task_and_the_stage_waits_for_the_job(folder: Path) -> None:
    (folder / "plan").write_text("0.05")
    assert dispatch.launch_ranks("align", slurm_runtime(), folder, module="rank")
    variables = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, values in enumerate(variables):
        assert values["RANK"] == values["LOCAL_RANK"] == str(rank) and values["WORLD_SIZE"] == "2"
        assert values["MASTER_ADDR"] == socket.gethostname() and values["MASTER_PORT"] == "29500"
    assert "step 9" in (folder / f"slurm-{job_number(folder)}.out").read_text()


@pytest.mark.slow
def test_a_failed_job_shows_its_last_lines_and_the_reason(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "plan").write_text("fail")
    with pytest.raises(ValueError, match="align: failed at step 0: ValueError: no such thing; run the same"):
        dispatch.launch_ranks("align", slurm_runtime(), folder, module="rank")
    assert "the last line of a rank" in capfd.readouterr().err


@pytest.mark.slow
def test_the_error_for_a_refused_job_contains_the_message_of_sbatch(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sbatch refused .*invalid partition specified: no_such"):
        dispatch.launch_ranks("align", slurm_runtime(partition="no_such"), folder, module="rank")


@pytest.mark.slow
def test_after_the_stage_was_killed_the_next_stage_waits_for_the_existing_job(folder: Path) -> None:
    (folder / "plan").write_text("0.8")
    first = start_stage()
    wait_for(lambda: is_running(folder))
    number = job_number(folder)
    first.kill()
    first.communicate()
    # A stage that is killed before it writes job.json leaves a job that the next stage can find only by name.
    (folder / "job.json").unlink()
    output, _ = start_stage().communicate(timeout=120)
    assert f"job {number} of this run has not ended; waiting for it" in output and output.endswith("True\n")
    assert "submitted" not in output


@pytest.mark.slow
def test_after_sigterm_the_job_writes_a_checkpoint_and_the_next_job_resumes(folder: Path) -> None:
    (folder / "plan").write_text("0.8")
    stage = start_stage()
    wait_for(lambda: is_running(folder))
    stage.send_signal(signal.SIGTERM)
    output, _ = stage.communicate(timeout=60)
    assert "align: preempted at step" in output
    assert "run the same command again to continue from the last checkpoint" in output
    first, step = job_number(folder), read_status(folder)["step"]
    assert 0 < step < 10 and (folder / "checkpoint-1").exists()
    (folder / "plan").write_text("0.05")
    assert dispatch.launch_ranks("align", slurm_runtime(), folder, module="rank")
    assert f"step {step - 1}\n" not in (folder / f"slurm-{job_number(folder)}.out").read_text()
    assert job_number(folder) != first


@pytest.mark.slow
def test_at_the_time_limit_the_job_writes_a_checkpoint_and_the_next_job_is_submitted(folder: Path) -> None:
    """Slurm checks time limits only twice a minute, so SIGTERM may arrive up to a minute early."""
    (folder / "plan").write_text("7.5")  # With 7.5 s per step, ten steps take longer than a minute.
    assert dispatch.launch_ranks("align", slurm_runtime(time="1"), folder, module="rank")
    outputs = sorted(folder.glob("slurm-*.out"))
    assert len(outputs) > 1 and "step 9" in outputs[-1].read_text()
    steps = [line for path in outputs for line in path.read_text().splitlines() if line.startswith("step")]
    assert len(steps) == 20  # Two ranks run ten steps, each step once.


@pytest.mark.slow
def test_a_cancelled_job_is_not_submitted_again(folder: Path) -> None:
    (folder / "plan").write_text("0.8")
    stage = start_stage()
    wait_for(lambda: is_running(folder))
    _stdout("scancel", job_number(folder))
    output, _ = stage.communicate(timeout=90)
    assert stage.returncode == 1 and output.count("submitted job") == 1 and "CANCELLED" in output
