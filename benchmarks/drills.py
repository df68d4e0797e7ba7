"""`python -m benchmarks.drills [FOLDER]`: retrainings in which something is killed at three random moments; a table.

A project of its own at micro size with the services of `make services`, PostgreSQL where it is installed. After each
kill what was killed is started again, as `make services` does it; a retraining that ended broken is triggered again, as
its schedule would. It ends right if there is one new version, which is champion, nothing is out of date, and the trail
has no gap or fork; until then the champion is the one before.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("training", "flow", "worker", "mlflow", "prefect", "postgres")
MOMENTS = 3
PATIENCE_S = 120.0  # of the automation for lost runs; 540 in use, where machines are busier
LIMIT_S = 900.0
SERVICES = {"prefect_port": 4231, "mlflow_port": 5031, "postgres_port": 5451, "start_s": 400}
RULES = "minima: {scenes.CIDEr: 0}\nmaxima: {}\nbetter_than_champion: null\n"  # every whole retraining makes a champion
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@dataclass
class Drill:
    target: str
    after_s: float
    stage: str
    ended: str
    took_s: float
    right: bool


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        self.env |= {"PYTHONPATH": str(folder), "PATH": os.pathsep.join([str(Path(sys.executable).parent),
                                                                         os.environ["PATH"]]),
                     "PREFECT_API_URL": f"http://127.0.0.1:{SERVICES['prefect_port']}/api", "HF_HUB_OFFLINE": "1",
                     "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{SERVICES['mlflow_port']}",
                     "ONEDIFF_SERVICES": json.dumps(SERVICES), "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1",
                     "OMP_NUM_THREADS": "1"}

    def make(self) -> None:
        """Clones this checkout's last commit, at micro size with longer phases and a gate that lets all through."""
        self.run("git", "clone", "-q", str(ROOT), str(self.folder), where=ROOT)
        text = (ROOT / "presets/micro.yaml").read_text().replace("\n  steps: 4\n", "\n  steps: 30\n")
        (self.folder / "params.yaml").write_text(text.replace("\n  steps: 8\n", "\n  steps: 30\n"))
        (self.folder / "mlflow/promotion.yaml").write_text(RULES)
        (self.folder / "runtime.yaml").write_text("checkpoint_every_s: 2.0\n")
        self.run("git", "rm", "-q", "--cached", "dvc.lock")
        (self.folder / "dvc.lock").unlink()
        self.commit("drills")

    def change(self, number: int) -> None:
        """Another learning rate of phase align, so that everything from there on is out of date."""
        params = self.folder / "params.yaml"
        rate = f"lr_delta: {1e-3 + number * 1e-5:.5f}"
        params.write_text(re.sub(r"lr_delta: \S+", rate, params.read_text(), count=1))
        self.commit(f"drill {number}")

    def commit(self, why: str) -> None:
        self.run("git", "-c", "user.name=drills", "-c", "user.email=drills@localhost", "commit", "-qam", why)

    def run(self, *command: str, where: Path | None = None) -> str:
        done = subprocess.run(command, cwd=where or self.folder, env=self.env, text=True, capture_output=True,
                              check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def module(self, *command: str) -> str:
        return self.run(sys.executable, "-m", *command)

    def versions(self) -> tuple[int, str | None]:
        """How many there are, and the champion."""
        try:
            rows = json.loads(self.module("onediff", "registry", "list", "--json").splitlines()[-1])
        except RuntimeError:  # none yet
            return 0, None
        return len(rows), next((row["version"] for row in rows if "champion" in row["aliases"]), None)

    def trigger(self) -> None:
        said = self.post("deployments/name/retrain/retrain", get=True)
        self.post(f"deployments/{said['id']}/create_flow_run", {})

    def states(self) -> list[str]:
        """Of all retrainings, oldest first; those that were cancelled before they began aside."""
        body = {"flows": {"name": {"any_": ["retrain"]}}, "sort": "START_TIME_ASC", "limit": 200}
        return [run["state_type"] for run in self.post("flow_runs/filter", body) if run["state_type"] != "CANCELLED"]

    def at_rest(self, old_runs: int) -> bool:
        """Whether all retrainings after the first `old_runs` have ended, and there was one."""
        states = self.states()[old_runs:]
        return bool(states) and all(state in ENDED for state in states)

    def post(self, path: str, body: dict[str, Any] | None = None, *, get: bool = False) -> Any:
        address = f"{self.env['PREFECT_API_URL']}/{path}"
        while True:
            try:
                answer = httpx.get(address, timeout=30) if get else httpx.post(address, json=body, timeout=30)
            except httpx.TransportError:
                time.sleep(1)
                continue
            if answer.status_code != 503:
                return answer.raise_for_status().json()
            time.sleep(0.5)

    def stage(self) -> psutil.Process | None:
        """The process of the stage that runs."""
        for process in psutil.process_iter(["cmdline", "cwd"]):
            command = process.info["cmdline"] or []
            if process.info["cwd"] == str(self.folder) and any(part.startswith("onediff.stages.") for part in command):
                return process
        return None

    def victims(self, target: str) -> list[psutil.Process]:
        if target == "training":
            found = self.stage()
            return [found] if found else []
        if target == "flow":
            return [process for process in psutil.process_iter(["cmdline", "cwd"])
                    if process.info["cwd"] == str(self.folder) and "prefect.engine" in (process.info["cmdline"] or [])]
        name = {"worker": "onediff-cpu"}.get(target, target)
        asked = subprocess.run([sys.executable, "-m", "flows.services", "status", "--json"], cwd=self.folder,
                               env=self.env, capture_output=True, text=True, check=False)
        pid = next(row["pid"] for row in json.loads(asked.stdout) if row["name"] == name)
        process = psutil.Process(pid)
        return [process] if target == "worker" else [process, *process.children(recursive=True)]


def undisturbed(site: Site, number: int) -> float:
    """Seconds of a retraining that makes version `number`."""
    site.change(number)
    start = time.monotonic()
    site.trigger()
    while not site.at_rest(0) or site.versions()[1] != str(number):
        time.sleep(1)
    return time.monotonic() - start


def drill(site: Site, target: str, after_s: float, number: int) -> Drill:
    """One retraining on new parameters, in which the target is killed after `after_s` seconds."""
    site.change(number)
    before, champion = site.versions()
    old_runs = len(site.states())
    site.trigger()
    time.sleep(after_s)
    victims = _until(lambda: site.victims(target), 120)
    at = site.stage()
    stage = next(part.split(".")[-1] for part in at.cmdline() if part.startswith("onediff.stages.")) if at else "-"
    for victim in victims:
        victim.kill()
    killed = time.monotonic()
    site.module("flows.services", "start")
    untouched = site.versions()[1] in (champion, str(before + 1))
    again = 0
    while time.monotonic() - killed < LIMIT_S:
        time.sleep(2)
        if not site.at_rest(old_runs):
            continue
        if site.versions() == (before + 1, str(before + 1)):
            break
        if not _comes(site, old_runs):
            again += 1
            site.trigger()
    states = [state.lower() for state in site.states()[old_runs:]]
    ended = " -> ".join(states) + (f", triggered again {again}x" if again else "")
    stale = json.loads(site.module("dvc", "status", "--json"))
    whole = not stale and site.versions() == (before + 1, str(before + 1))
    site.module("onediff", "registry", "check")
    return Drill(target, round(after_s, 1), stage, ended, round(time.monotonic() - killed, 1), whole and untouched)


def _comes(site: Site, old_runs: int) -> bool:
    """Whether an automation starts another run within some seconds."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        if not site.at_rest(old_runs):
            return True
        time.sleep(1)
    return False


def _until(told: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (found := told()):
        if time.monotonic() > end:
            raise TimeoutError("nothing to kill")
        time.sleep(0.3)
    return found


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="onediff-drills-")).absolute()
    site = Site(folder / "project")
    site.make()
    print(site.module("flows.services", "start"), flush=True)
    site.module("flows.deploy", str(PATIENCE_S))
    try:
        whole, again = (undisturbed(site, number) for number in (1, 2))
        print(f"undisturbed, with the data: {whole:.0f} s; from align on: {again:.0f} s\n")
        print(_row("killed", "after s", "in stage", "its runs", "s", "right"))
        moments, number = random.Random(int(os.environ.get("SEED", "0"))), 2
        for _ in range(MOMENTS):
            for target in TARGETS:
                if target == "postgres" and not site.victims("postgres"):
                    continue
                number += 1
                done = drill(site, target, moments.uniform(3, 0.6 * again), number)
                print(_row(*asdict(done).values()), flush=True)
    finally:
        site.module("flows.services", "stop")


def _row(*cells: Any) -> str:
    widths = (8, 7, 10, 40, 6, 5)
    return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


if __name__ == "__main__":
    main()
