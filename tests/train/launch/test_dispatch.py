"""Tests that start, stop and lose ranks with DeepSpeed's launcher; a small program replaces the training code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from onediff.cli.main import app
from onediff.config import Runtime, Slurm
from onediff.train.launch import dispatch, nodes, ranks
from onediff.train.launch.kubernetes import manifest
from onediff.train.status import read_status

ROOT = Path(__file__).parents[3]
RANK = '''
"""A test program that replaces a rank. The file FOLDER/plan decides how the ranks end; rank 0 writes status.json."""
import json, os, pathlib, signal, sys, time
folder, rank = pathlib.Path(os.environ["FOLDER"]), int(os.environ["RANK"])
KEYS = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "DS_ACCELERATOR")
(folder / f"rank-{rank}").write_text(json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:],
                                                 **{key: os.environ.get(key) for key in KEYS}}))
def write_status(state, reason=""):
    if rank == 0:
        (folder / "status.json").write_text(json.dumps({"state": state, "step": 7, "reason": reason}))
def stop(*_):
    time.sleep(float(os.environ.get("CHECKPOINT_S", 0.5)))
    (folder / f"checkpoint-{rank}").touch()
    write_status("preempted", "SIGTERM")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
write_status("running")
plan = (folder / "plan").read_text()
if plan == "lost" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "diverge":
    write_status("diverged", "loss nan at step 7")
    sys.exit(1)
if plan in ("wait", "lost"):
    time.sleep(600)
write_status("finished")
(folder / "run.json").write_text("{}")
'''
STAGE = '''
import sys
from pathlib import Path
from onediff.config import Runtime
from onediff.train.launch import dispatch
try:
    dispatch.launch_ranks("align", Runtime(launcher="deepspeed", gpus=2, device="cpu"), Path("scratch"), module="rank")
except ValueError as error:
    sys.exit(str(error))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the folder of a run, and a module `rank` with the test program that replaces a rank."""
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(key, raising=False)
    (tmp_path / "rank.py").write_text(RANK)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("FOLDER", str(scratch))
    monkeypatch.chdir(tmp_path)
    return scratch


@pytest.fixture
def stage(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a stage with two ranks, which wait until they are stopped."""
    (folder / "plan").write_text("wait")
    process = subprocess.Popen([sys.executable, "-c", STAGE], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: read_status(folder)["state"] == "running" and (folder / "rank-1").exists())
        yield process
    finally:
        process.terminate()
        process.communicate()


def wait_for(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"the condition did not become true within {timeout_s} s"
        time.sleep(0.05)


def pids(folder: Path) -> list[int]:
    return [json.loads(path.read_text())["pid"] for path in sorted(folder.glob("rank-*"))]


def alive(folder: Path) -> list[int]:
    """Return the process ids of the ranks that still run."""
    return [pid for pid in pids(folder) if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def deepspeed(**changes: object) -> Runtime:
    return Runtime.model_validate({"launcher": "deepspeed", "gpus": 2, "device": "cpu"} | changes)


def test_the_local_launcher_and_a_rank_start_no_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.launch_ranks("align", Runtime(), folder)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not dispatch.launch_ranks("align", deepspeed(), folder)


def test_one_rank_is_started_for_each_gpu_with_the_variables_of_the_process_group(folder: Path) -> None:
    (folder / "plan").write_text("finish")
    assert dispatch.launch_ranks("align", deepspeed(), folder, module="rank")
    variables = [json.loads((folder / f"rank-{rank}").read_text()) for rank in (0, 1)]
    assert [rank["LOCAL_RANK"] for rank in variables] == ["0", "1"]
    for rank in variables:
        assert rank["arguments"] == [] and rank["WORLD_SIZE"] == "2" and rank["MASTER_ADDR"] == "127.0.0.1"
        assert rank["OMP_NUM_THREADS"] == "1" and rank["DS_ACCELERATOR"] == "cpu"


def test_a_finished_run_is_not_started_again(folder: Path) -> None:
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 7, "reason": ""}))
    (folder / "run.json").write_text("{}")
    assert dispatch.launch_ranks("align", deepspeed(), folder, module="rank")
    assert not pids(folder)


@pytest.mark.slow
def test_the_error_contains_the_reason_that_the_ranks_recorded(folder: Path) -> None:
    (folder / "plan").write_text("diverge")
    with pytest.raises(ValueError, match="align: diverged at step 7: loss nan at step 7"):
        dispatch.launch_ranks("align", deepspeed(), folder, module="rank")


@pytest.mark.slow
def test_the_error_does_not_contain_the_reason_of_an_earlier_run(folder: Path) -> None:
    (folder / "status.json").write_text(json.dumps({"state": "diverged", "step": 3, "reason": "loss nan"}))
    with pytest.raises(ValueError, match="align: the ranks ended with code 1 before the run was finished; see the"):
        dispatch.launch_ranks("align", deepspeed(), folder, module="no_such_module")


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_and_is_recorded_in_the_status(folder: Path) -> None:
    (folder / "plan").write_text("lost")
    with pytest.raises(ValueError, match=r"align: .*run the same command again to continue from the last checkpoint"):
        dispatch.launch_ranks("align", deepspeed(), folder, module="rank")
    assert read_status(folder)["state"] in ("failed", "preempted") and not alive(folder)


@pytest.mark.slow
def test_sigterm_to_the_stage_lets_every_rank_write_its_checkpoint(folder: Path,
                                                                   stage: subprocess.Popen[str]) -> None:
    stage.terminate()
    _, output = stage.communicate(timeout=60)
    assert "align: preempted at step 7: SIGTERM; run the same command again to continue" in output
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-1"}
    assert not alive(folder)


@pytest.mark.slow
def test_no_rank_outlives_a_stage_that_was_killed(folder: Path, stage: subprocess.Popen[str]) -> None:
    assert len(alive(folder)) == 2
    stage.kill()
    wait_for(lambda: not alive(folder), 30)
    wait_for(lambda: (folder / "checkpoint-0").exists(), 5)


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_period(folder: Path) -> None:
    rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('up', 'w'); time.sleep(600)"
    code = (f"from onediff.train.launch import ranks; import os, sys\n"
            f"print(ranks.run([sys.executable, '-c', {rank!r}], os.environ | {{'LOCAL_RANK': '0'}}, grace_s=1.0))")
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: Path("up").exists())
    launcher.terminate()
    assert launcher.communicate(timeout=20)[0].strip() == "(-9, True)"


def test_loader_processes_of_a_rank_get_no_sigterm(folder: Path) -> None:
    """Send SIGTERM to a rank: it still needs its data loader processes until the end of the step."""
    code = ("import os, signal, time\n"
            "def stop(*_): open('terminated-' + ('loader' if child == 0 else 'rank'), 'w')\n"
            "signal.signal(signal.SIGTERM, stop)\n"
            "child = 1\nchild = os.fork()\nopen(f'up-{min(child, 1)}', 'w')\n"
            "for _ in range(300): time.sleep(0.1)")
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"LOCAL_RANK": "0"},
                               start_new_session=True)
    wait_for(lambda: Path("up-0").exists() and Path("up-1").exists())
    group = ranks.Group(process.pid)
    group.terminate()
    wait_for(lambda: Path("terminated-rank").exists())
    assert len(group.members()) == 2 and not Path("terminated-loader").exists()
    group.kill()
    process.wait()
    assert not group.members()


@pytest.mark.parametrize(("code", "cause"), [(247, "SIGKILL, perhaps because memory ran out"), (-15, "SIGTERM"),
                                             (137, "SIGKILL"), (250, "SIGABRT")])
def test_the_message_contains_the_signal_that_ended_a_rank(code: int, cause: str) -> None:
    assert f"a rank was ended by {cause}" in dispatch._ending(code)


@pytest.mark.parametrize("code", [0, 1, 2, 255])
def test_the_message_contains_the_exit_code_if_no_signal_ended_a_rank(code: int) -> None:
    assert f"code {code} before" in dispatch._ending(code)


def test_a_broken_connection_is_reported_as_a_lost_node(tmp_path: Path) -> None:
    reason = "RuntimeError: [pair.cc:537] Read error [10.0.0.2]:37082: Connection reset by peer. This is typically"
    message = dispatch._explanation("tune", tmp_path, {"state": "failed", "step": 7, "reason": reason},
                                    ending="code 1", stopped=False)
    assert message.startswith("tune: failed at step 7: a rank or its node was lost (RuntimeError: ")
    assert "10.0.0.2" in message and read_status(tmp_path)["reason"].startswith("a rank or its node was lost")


def test_a_connection_that_broke_after_sigterm_is_not_reported_as_a_lost_node(tmp_path: Path) -> None:
    """Simulate a start over ssh, where DeepSpeed ends pdsh first, so ranks that write output get a broken pipe."""
    status = {"state": "failed", "step": 3, "reason": "BrokenPipeError: [Errno 32] Broken pipe"}
    message = dispatch._explanation("align", tmp_path, status, ending="code 1", stopped=True)
    assert message.startswith("align: preempted at step 3: stopped by SIGTERM (BrokenPipeError")
    assert read_status(tmp_path)["state"] == "preempted"


HOSTS = "one slots=2\n# comment\n\ntwo slots=2\n"


@pytest.mark.parametrize(("hosts", "changes", "match"), [
    (None, {}, "hostfile hosts does not exist; write one line 'NAME slots=GPUS'"),
    ("one slots=2\n", {}, r"hosts: runtime.yaml needs 2 nodes, but the hostfile lists 1 \(one\); add the"),
    (HOSTS, {"gpus": 8}, "hosts: node 'one' has slots=2, but runtime.yaml needs 8 GPUs on each node"),
    (HOSTS, {"master_addr": "three"}, "master_addr 'three' .* must be the first node .* which is 'one'; add a line"),
    (HOSTS, {"master_addr": "two"}, "master_addr 'two' .* must be the first node .* which is 'one'; move the line"),
    ("one slots=2\ntwo 2\n", {}, "hosts line 2: must be 'NAME slots=GPUS', got 'two 2'"),
    ("one slots=2\none slots=2\n", {}, "hosts line 2: node 'one' occurs twice"),
    (HOSTS, {"hostfile": None}, r"for 2 nodes, set hostfile \(to start them over ssh\), or node_rank and master_addr"),
    (HOSTS, {"node_rank": 2}, "node_rank 2 must be less than nodes 2"),
    (HOSTS, {"node_rank": 1}, "if node_rank is set, master_addr must be set too"),
    ("192.0.2.1 slots=2\ntwo slots=2\n", {"node_rank": 0, "master_addr": "192.0.2.1"},
     "master_addr '192.0.2.1' port 29500 cannot be opened on node 0 .* address of this host and a free master_port")])
def test_wrong_settings_of_nodes_are_refused_before_any_rank_starts(hosts: str | None, changes: dict[str, object],
                                                                    match: str, folder: Path) -> None:
    if hosts is not None:
        Path("hosts").write_text(hosts)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        dispatch.launch_ranks("align", deepspeed(**{"nodes": 2, "hostfile": "hosts"} | changes), folder, module="rank")
    assert not pids(folder)


def test_for_a_start_over_ssh_deepspeed_gets_the_hostfile_and_the_environment_of_all_nodes(folder: Path) -> None:
    runtime = deepspeed(nodes=2, hostfile="hosts", master_addr="one", master_port=29511)
    arguments = " ".join(nodes.command(runtime, "onediff.stages.align", folder)[1:])
    assert arguments == ("--hostfile hosts --num_nodes 2 --num_gpus 2 --master_port 29511 --master_addr one "
                         "--log_level warning --no_local_rank --module onediff.stages.align")
    sent = nodes.environment(runtime, folder, {"ONEDIFF_SCRATCH": "/shared", "ONEDIFF_WRITER_KEY": "secret",
                                               "HOME": "/here", "GLOO_SOCKET_IFNAME": "eth1"})
    assert Path(sent["DS_ENV_FILE"]).read_text().splitlines() == [
        "OMP_NUM_THREADS=1", "ONEDIFF_SCRATCH=/shared", "GLOO_SOCKET_IFNAME=eth1", "DS_ACCELERATOR=cpu"]


def test_a_start_without_ssh_needs_no_names_of_nodes(folder: Path) -> None:
    runtime = deepspeed(nodes=3, node_rank=2, master_addr="10.0.0.1")
    command = nodes.command(runtime, "onediff.stages.align", folder)
    assert command[1:3] == ["--hostfile", str(folder / "hostfile-2")] and "--no_ssh --node_rank 2" in " ".join(command)
    assert nodes.read_hostfile(folder / "hostfile-2") == {"node-0": 2, "node-1": 2, "node-2": 2}


def test_the_kubernetes_job_has_one_pod_for_each_node_and_a_service_for_node_0() -> None:
    runtime = Runtime(launcher="deepspeed", nodes=3, gpus=8, master_port=29513)
    service, job = YAML(typ="safe").load_all(manifest("tune", runtime, image="registry.example.org/onediff:1"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["ports"][0]["port"] == 29513
    assert pod["subdomain"] == service["metadata"]["name"] == "onediff-tune"
    assert service["spec"]["selector"] == {"job-name": "onediff-tune"}
    container = pod["containers"][0]
    assert container["image"] == "registry.example.org/onediff:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"--nnodes=3", "--nproc-per-node=8", "--node-rank=$(NODE_RANK)", "--master-addr=onediff-tune-0.onediff-tune",
            "onediff.stages.tune"} <= set(container["command"])
    assert container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"].endswith("job-completion-index']")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted["project"] == container["workingDir"] and "persistentVolumeClaim" in pod["volumes"][0]
    assert pod["terminationGracePeriodSeconds"] > ranks.GRACE_S and pod["restartPolicy"] == "Never"


def test_pods_for_cpus_request_no_gpu() -> None:
    _, job = YAML(typ="safe").load_all(manifest("align", Runtime(device="cpu"), image="onediff"))
    assert "resources" not in job["spec"]["template"]["spec"]["containers"][0]


def test_the_manifest_command_prints_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").touch()  # The command refuses a folder without this file.
    monkeypatch.setenv("ONEDIFF_NODES", "2")
    stdout = CliRunner().invoke(app, ["manifest", "tune", "--image", "mine:1"]).stdout
    assert stdout == manifest("tune", Runtime(nodes=2), image="mine:1")


def test_a_scratch_folder_that_the_pods_do_not_share_is_refused() -> None:
    with pytest.raises(ValueError, match="scratch must be a relative path inside the project folder, got '/scratch'"):
        manifest("align", Runtime(scratch="/scratch"), image="onediff")


def test_runtime_example_yaml_lists_every_key_with_the_default() -> None:
    text = (ROOT / "runtime.example.yaml").read_text()
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and ": " in line]
    values = YAML(typ="safe").load("\n".join(line for line in lines if line.split(":")[0] in Runtime.model_fields))
    assert values.keys() == Runtime.model_fields.keys()
    assert Runtime.model_validate(values) == Runtime()
    assert set(values["slurm"]) == set(Slurm.model_fields)
