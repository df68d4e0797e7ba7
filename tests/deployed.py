"""A copy of the project at micro size with a Prefect server and workers, for tests of the deployments."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
CODE = ("onediff", "flows", "mlflow", "presets", "data/README.md", "dvc.yaml", ".dvcignore", ".gitignore",
        "pyproject.toml", "prefect.yaml", "requirements.lock", "packages.yaml", "data/own", "data/pretrained")


class Site:
    """A copy of the project in a folder, and the processes that a test starts for it: Prefect server and workers."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.api = folder, f"http://127.0.0.1:{port}/api"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        self.env |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                     "PYTHONPATH": str(folder), "ONEDIFF_PROJECT": str(folder), "PREFECT_API_URL": self.api,
                     "PREFECT_HOME": str(folder / ".onediff/prefect"), "HF_HUB_OFFLINE": "1",
                     "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
                     "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start `python -m COMMAND` in the background with a log file in .onediff."""
        with (self.folder / f".onediff/{name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", *command], cwd=self.folder, env=self.env, stdout=log,
                                       stderr=log, start_new_session=True)
        self.started.append(process)
        return process

    def run(self, *command: str) -> str:
        """Run a command and return what it prints; fail if the command fails."""
        done = subprocess.run(command, cwd=self.folder, env=self.env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def trigger(self, deployment: str = "retrain/retrain", **parameters: Any) -> str:
        """Create a flow run of a deployment and return the id of the flow run."""
        deployment_id = httpx.get(f"{self.api}/deployments/name/{deployment}", timeout=60).json()["id"]
        address = f"{self.api}/deployments/{deployment_id}/create_flow_run"
        while (run := httpx.post(address, json={"parameters": parameters}, timeout=60)).status_code == 503:
            time.sleep(0.2)  # Status 503 means that SQLite is busy; Prefect's own clients also repeat the request.
        return str(run.json()["id"])

    def state(self, run: str) -> dict[str, Any]:
        """Return the state of a flow run as the Prefect API describes it."""
        return dict(httpx.get(f"{self.api}/flow_runs/{run}", timeout=60).json()["state"])

    def runs(self) -> list[dict[str, Any]]:
        """Return all runs of the flow `retrain`, the earliest first."""
        body = {"sort": "START_TIME_ASC", "limit": 200, "flows": {"name": {"any_": ["retrain"]}}}
        return list(httpx.post(f"{self.api}/flow_runs/filter", json=body).json())

    def status(self) -> dict[str, Any]:
        """Return the newest status.json of a training phase."""
        written = sorted(self.folder.glob(".onediff/scratch/*/status.json"), key=lambda path: path.stat().st_mtime)
        return dict(json.loads(written[-1].read_text())) if written else {"state": "none", "step": 0}

    def training(self) -> list[psutil.Process]:
        """Return the running processes of the stage `align` in this folder."""
        return [process for process in psutil.process_iter(["cmdline", "cwd"])
                if "onediff.stages.align" in (process.info["cmdline"] or [])
                and process.info["cwd"] == str(self.folder)]

    def close(self) -> None:
        """Kill all processes that this object started, and their children."""
        for leader in [psutil.Process(started.pid) for started in self.started if started.poll() is None]:
            for process in [*leader.children(recursive=True), leader]:
                process.kill()


@contextmanager
def running_site(folder: Path, params: str) -> Iterator[Site]:
    """Yield a committed copy of the project with this params.yaml, whose Prefect server has all deployments."""
    for name in CODE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name in ("data/pairs", "data/written", "data/synthetic", ".onediff"):
        (folder / name).mkdir(parents=True)
    (folder / "params.yaml").write_text(params)
    (folder / "runtime.yaml").write_text("checkpoint_every_s: 2.0\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        site = Site(folder, free.getsockname()[1])
    site.run("git", "init", "-q")
    site.run(sys.executable, "-m", "dvc", "init", "-q")
    site.run("git", "add", "-A")
    site.run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "all")
    site.start("server", "prefect", "server", "start", "--port", site.api.split(":")[2].split("/")[0])
    until(lambda: answers(f"{site.api}/health"), 120)
    site.run(sys.executable, "-m", "flows.deploy")
    try:
        yield site
    finally:
        site.close()


def answers(address: str) -> bool:
    """Return whether the server responds with status 200."""
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], Any], seconds: float) -> Any:
    """Wait until the condition returns a true value, and return this value. Fail after the given number of seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.5)
    raise AssertionError(f"the condition did not become true within {seconds} seconds")
