"""Failure drills: kill a process during retraining, and check that retraining still ends correctly; one table.

    python -m benchmarks.drills [FOLDER]

Each of six kinds of processes is killed at three random moments, in a separate project of micro size with the services
of `make services` (and PostgreSQL if it is installed). After each kill, the services are started again with the code of
`make services`. A retraining that failed is triggered again, as a schedule would do. The result is right if there is
exactly one new version, this version is the champion, no stage is stale, and the audit trail of the registry has no gap
or fork. Until then, the previous champion must stay the champion.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.table import Table

from benchmarks import script
from benchmarks.interrupts import wait_until

TARGETS = ("training", "flow", "worker", "mlflow", "prefect", "postgres")
MOMENTS = 3
PATIENCE_S = 120.0  # Seconds without a heartbeat after which Prefect treats a run as lost; 540 in production.
LIMIT_S = 900.0
SERVICES = {"prefect_port": 4231, "mlflow_port": 5031, "postgres_port": 5451, "start_s": 400}
# With these promotion rules, every retraining makes a new champion.
RULES = "minima: {scenes.CIDEr: 0}\nmaxima: {}\nbetter_than_champion: null\n"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


class Site:
    """The clone of the project in which the drills run, with functions to control the services of the clone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = script.project_environment(folder) | {
                     "PREFECT_API_URL": f"http://127.0.0.1:{SERVICES['prefect_port']}/api", "OMP_NUM_THREADS": "1",
                     "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{SERVICES['mlflow_port']}", "DO_NOT_TRACK": "1",
                     "ONEDIFF_SERVICES": json.dumps(SERVICES)}

    def make(self) -> None:
        """Clone the last commit, and set micro size with longer phases and promotion rules that accept every model."""
        script.clone(self.folder)
        text = (self.folder / "presets/micro.yaml").read_text().replace("\n  steps: 4\n", "\n  steps: 30\n")
        (self.folder / "params.yaml").write_text(text.replace("\n  steps: 8\n", "\n  steps: 30\n"))
        (self.folder / "mlflow/promotion.yaml").write_text(RULES)
        (self.folder / "runtime.yaml").write_text("checkpoint_every_s: 2.0\n")
        self.run("git", "rm", "-q", "dvc.lock")
        self.commit("drills")

    def change(self, number: int) -> None:
        """Change the learning rate of phase `align`, so that stage `align` and all later stages become stale."""
        params = self.folder / "params.yaml"
        rate = f"lr_delta: {1e-3 + number * 1e-5:.5f}"
        params.write_text(re.sub(r"lr_delta: \S+", rate, params.read_text(), count=1))
        self.commit(f"drill {number}")

    def commit(self, message: str) -> None:
        self.run("git", "-c", "user.name=drills", "-c", "user.email=drills@localhost", "commit", "-qam", message)

    def run(self, *command: str) -> str:
        return script.run(command, self.folder, self.env)

    def module(self, *command: str) -> str:
        return self.run(sys.executable, "-m", *command)

    def versions(self) -> tuple[int, str | None]:
        """Return the number of registered model versions, and the version of the champion, or None without one."""
        try:
            output = self.module("onediff", "registry", "list", "--json")
        except ValueError:  # The command fails as long as no version is registered.
            return 0, None
        rows = json.loads(output.splitlines()[-1])
        return len(rows), next((row["version"] for row in rows if "champion" in row["aliases"]), None)

    def trigger(self) -> None:
        deployment = self.request("GET", "deployments/name/retrain/retrain")
        self.request("POST", f"deployments/{deployment['id']}/create_flow_run", {})

    def states(self) -> list[str]:
        """Return the Prefect states of all retraining runs, oldest first, except cancelled runs."""
        body = {"flows": {"name": {"any_": ["retrain"]}}, "sort": "START_TIME_ASC", "limit": 200}
        states = [run["state_type"] for run in self.request("POST", "flow_runs/filter", body)]
        return [state for state in states if state != "CANCELLED"]

    def at_rest(self, old_runs: int) -> bool:
        """Check that a retraining was started after the first `old_runs` runs, and that no later run is active."""
        states = self.states()[old_runs:]
        return bool(states) and all(state in ENDED for state in states)

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the Prefect server and return the answer; repeat the request while the server is down."""
        while True:
            try:
                answer = httpx.request(method, f"{self.env['PREFECT_API_URL']}/{path}", json=body, timeout=30)
                if answer.status_code != 503:
                    return answer.raise_for_status().json()
            except httpx.TransportError:
                pass
            time.sleep(1)

    def processes(self, part: str) -> list[psutil.Process]:
        """Return the processes in the folder of the project with a command-line argument that starts with `part`."""
        return [process for process in psutil.process_iter(["cmdline", "cwd"])
                if process.info["cwd"] == str(self.folder)
                and any(argument.startswith(part) for argument in process.info["cmdline"] or ())]

    def victims(self, target: str) -> list[psutil.Process]:
        """Return the processes to kill for a target: training, flow, worker or a service."""
        if target == "training":
            return self.processes("onediff.stages.")[:1]
        if target == "flow":
            return self.processes("prefect.engine")
        name = {"worker": "onediff-cpu"}.get(target, target)
        status = subprocess.run([sys.executable, "-m", "flows.services", "status", "--json"], cwd=self.folder,
                                env=self.env, capture_output=True, text=True, check=False)
        process = psutil.Process(next(row["pid"] for row in json.loads(status.stdout) if row["name"] == name))
        return [process] if target == "worker" else [process, *process.children(recursive=True)]


def undisturbed(site: Site, number: int) -> float:
    """Retrain without a kill until model version `number` is the champion, and return the seconds."""
    site.change(number)
    site.trigger()
    return wait_until(lambda: site.at_rest(0) and site.versions()[1] == str(number), math.inf, every_s=1)


def drill(site: Site, target: str, after_s: float, number: int) -> tuple[str, ...]:
    """Retrain, kill the target process `after_s` seconds after the start, and return a row of the table.

    `number` changes the parameters, so that the drill trains a new model.
    """
    site.change(number)
    num_versions, champion = site.versions()
    old_runs = len(site.states())
    expected = (num_versions + 1, str(num_versions + 1))
    site.trigger()
    time.sleep(after_s)
    wait_until(lambda: site.victims(target), 120, every_s=0.3)
    victims = site.victims(target)
    if not victims:
        raise TimeoutError(f"{target}: no such process was running, so none was killed; run the drills again")
    stages = [argument.split(".")[-1] for process in site.processes("onediff.stages.") for argument in process.cmdline()
              if argument.startswith("onediff.stages.")]
    for victim in victims:
        victim.kill()
    killed = time.monotonic()
    site.module("flows.services", "start")
    untouched = site.versions()[1] in (champion, expected[1])
    triggered = 0
    while time.monotonic() - killed < LIMIT_S:
        time.sleep(2)
        if not site.at_rest(old_runs):
            continue
        if site.versions() == expected:
            break
        # If no automation of Prefect starts another run within 15 seconds, trigger one like a schedule would.
        if wait_until(lambda: not site.at_rest(old_runs), 15, every_s=1) >= 15:
            triggered += 1
            site.trigger()
    states = " -> ".join(state.lower() for state in site.states()[old_runs:])
    stale = json.loads(site.module("dvc", "status", "--json"))
    right = untouched and not stale and site.versions() == expected
    site.module("onediff", "registry", "check")
    return (target, f"{after_s:.1f}", stages[0] if stages else "-",
            states + (f", triggered again {triggered}x" if triggered else ""), f"{time.monotonic() - killed:.1f}",
            str(right))


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="onediff-drills-")).absolute()
    site = Site(folder / "project")
    site.make()
    print(site.module("flows.services", "start"), flush=True)
    site.module("flows.deploy", str(PATIENCE_S))
    table = Table("killed", "after s", "in stage", "its runs", "s", "right")
    try:
        first_s, later_s = (undisturbed(site, number) for number in (1, 2))
        print(f"undisturbed, with the data: {first_s:.0f} s; from align on: {later_s:.0f} s\n")
        rng, number = random.Random(int(os.environ.get("SEED", "0"))), 2
        for target in TARGETS * MOMENTS:
            if target == "postgres" and not site.victims("postgres"):
                continue
            number += 1
            row = drill(site, target, rng.uniform(3, 0.6 * later_s), number)
            print(*row, sep=" | ", flush=True)
            table.add_row(*row)
    finally:
        site.module("flows.services", "stop")
    script.show(table)


if __name__ == "__main__":
    main()
