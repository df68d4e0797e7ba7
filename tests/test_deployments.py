"""The deployments of prefect.yaml with a real server and a worker: triggers, cancelling, going on, crashes."""

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
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("onediff", "flows", "mlflow", "presets", "data/README.md", "dvc.yaml", ".dvcignore", ".gitignore",
        "pyproject.toml", "prefect.yaml", "requirements.lock")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Site:
    """A project of its own at micro size, a Prefect server for it, and workers."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.api = folder, f"http://127.0.0.1:{port}/api"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        self.env |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                     "PYTHONPATH": str(folder), "ONEDIFF_PROJECT": str(folder), "PREFECT_API_URL": self.api,
                     "PREFECT_HOME": str(folder / ".onediff/prefect"), "HF_HUB_OFFLINE": "1",
                     "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f".onediff/{name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", *command], cwd=self.folder, env=self.env, stdout=log,
                                       stderr=log, start_new_session=True)
        self.started.append(process)
        return process

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def trigger(self) -> str:
        said = httpx.get(f"{self.api}/deployments/name/retrain/retrain", timeout=60).json()
        address = f"{self.api}/deployments/{said['id']}/create_flow_run"
        while (made := httpx.post(address, json={}, timeout=60)).status_code == 503:  # SQLite is busy; so do clients
            time.sleep(0.2)
        return str(made.json()["id"])

    def runs(self) -> list[dict[str, Any]]:
        found = httpx.post(f"{self.api}/flow_runs/filter", json={"sort": "START_TIME_ASC", "limit": 200,
                                                                 "flows": {"name": {"any_": ["retrain"]}}})
        return list(found.json())

    def status(self) -> dict[str, Any]:
        written = sorted(self.folder.glob(".onediff/scratch/*/status.json"), key=lambda path: path.stat().st_mtime)
        return dict(json.loads(written[-1].read_text())) if written else {"state": "none", "step": 0}

    def training(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline", "cwd"])
                if "onediff.stages.align" in (process.info["cmdline"] or [])
                and process.info["cwd"] == str(self.folder)]

    def close(self) -> None:
        for process in [psutil.Process(started.pid) for started in self.started if started.poll() is None]:
            for one in [*process.children(recursive=True), process]:
                one.kill()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "onediff"
    for name in CODE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name in ("data/pairs", "data/written", "data/synthetic", ".onediff"):
        (folder / name).mkdir(parents=True)
    text = (ROOT / "presets/micro.yaml").read_text()
    first, second = text.split("\nalign:")  # long enough to be interrupted
    second = second.replace("steps: 4", "steps: 400", 1)
    (folder / "params.yaml").write_text(f"{first}\nalign:{second}")
    (folder / "runtime.yaml").write_text("checkpoint_every_s: 2.0\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        made = Site(folder, free.getsockname()[1])
    made.run("git", "init", "-q")
    made.run(sys.executable, "-m", "dvc", "init", "-q")
    made.run("git", "add", "-A")
    made.run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "all")
    made.start("server", "prefect", "server", "start", "--port", made.api.split(":")[2].split("/")[0])
    _until(lambda: _answers(f"{made.api}/health"), 120)
    made.run(sys.executable, "-m", "flows.deploy")
    try:
        yield made
    finally:
        made.close()


def _answers(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


def _until(told: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = told()
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError("waited in vain")


def _in_training(site: Site, after: int = 0) -> bool:
    return site.status()["state"] == "running" and site.status()["step"] > after


def test_triggers_cancelling_a_killed_training_and_a_killed_flow(site: Site) -> None:
    worker = site.start("worker", "prefect", "worker", "start", "--pool", "onediff-cpu")
    first = site.trigger()
    _until(lambda: _in_training(site), 300)

    for _ in range(100):
        site.trigger()
    _until(lambda: sum(run["state_type"] == "CANCELLED" for run in site.runs()) == 100, 300)
    assert [run["id"] for run in site.runs() if run["state_type"] == "RUNNING"] == [first]

    site.run("prefect", "flow-run", "cancel", first)
    _until(lambda: not site.training(), 120)
    left = site.status()
    assert left["state"] == "preempted" and left["step"] > 0
    _until(lambda: next(run for run in site.runs() if run["id"] == first)["state_type"] == "CANCELLED", 120)

    second = site.trigger()
    _until(lambda: _in_training(site, left["step"]), 300)  # goes on, not from the beginning
    flow = next(process for process in psutil.process_iter(["environ"])
                if (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == second)
    flow.send_signal(signal.SIGKILL)
    _until(lambda: next(run for run in site.runs() if run["id"] == second)["state_type"] == "CRASHED", 120)
    _until(lambda: _in_training(site, left["step"]), 300)  # started again by itself
    worker.send_signal(signal.SIGTERM)
