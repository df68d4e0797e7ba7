"""Tests of the deployments with a real Prefect server and a worker: triggers, cancelling, crashes and promotion."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from deployed import ROOT, Site, running_site, until
from registered import Server, add, aliases, write_rules

from onediff import registry, tracking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A copy of the project whose phase `align` is long enough to be interrupted four times."""
    first, second = (ROOT / "presets/micro.yaml").read_text().split("\nalign:")
    long = second.replace("steps: 4", "steps: 4000", 1)
    with running_site(tmp_path / "onediff", f"{first}\nalign:{long}") as running:
        yield running


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A Prefect server with an empty database."""
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401 - sets environment variables that must exist before Prefect is imported

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.mark.usefixtures("prefect_server")
def test_a_missing_deployment_starts_no_retraining_and_is_no_error() -> None:
    from flows.deployments import start_retraining

    message = start_retraining("a")
    assert message.startswith("no retraining was started: retrain/retrain")
    assert message.endswith("'make deploy' deploys it")


@pytest.mark.usefixtures("prefect_server")
def test_repeated_requests_with_one_key_start_one_retraining() -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client

    from flows.deployments import start_retraining

    @flow(name="retrain")
    def retrain() -> None: ...

    retrain.to_deployment(name="retrain").apply()
    first, repeated, other = (start_retraining(key) for key in ("data-1", "data-1", "data-2"))
    assert first == repeated != other and first.startswith("retraining '")
    with get_client(sync_client=True) as client:
        assert len(client.read_flow_runs()) == 2


def _in_training(site: Site, after: int = 0) -> bool:
    """Return whether a training phase is running and has passed the step `after`."""
    return site.status()["state"] == "running" and site.status()["step"] > after


def _wait_for_heartbeat(site: Site) -> None:
    """Wait for a new heartbeat, because an automation waits for the next one only after it received a heartbeat."""
    heartbeats = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}, "order": "DESC"}}
    before = httpx.post(f"{site.api}/events/filter", json=heartbeats, timeout=60).json()["total"]
    until(lambda: httpx.post(f"{site.api}/events/filter", json=heartbeats, timeout=60).json()["total"] > before, 120)


def test_retraining_resumes_after_a_cancelled_run_a_killed_flow_and_a_lost_machine(site: Site) -> None:
    worker = site.start("worker", "prefect", "worker", "start", "--pool", "onediff-cpu")
    first = site.trigger()
    until(lambda: _in_training(site), 300)

    for _ in range(100):
        site.trigger()
    until(lambda: sum(run["state_type"] == "CANCELLED" for run in site.runs()) == 100, 300)
    assert [run["id"] for run in site.runs() if run["state_type"] == "RUNNING"] == [first]

    site.run("prefect", "flow-run", "cancel", first)
    until(lambda: not site.training(), 120)
    stopped = site.status()
    assert stopped["state"] == "preempted" and stopped["step"] > 0
    until(lambda: site.state(first)["type"] == "CANCELLED", 120)

    second = site.trigger()
    until(lambda: _in_training(site, stopped["step"]), 300)  # The second run resumes from the checkpoint.
    flow = next(process for process in psutil.process_iter(["environ"])
                if (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == second)
    flow.send_signal(signal.SIGKILL)
    until(lambda: site.state(second)["type"] == "CRASHED", 120)
    until(lambda: _in_training(site, stopped["step"]), 300)  # Prefect starts a third run because the second crashed.

    # A machine is lost: the worker and all its processes end without a message. A worker on another machine continues.
    site.run(sys.executable, "-m", "flows.deploy", "90")
    _wait_for_heartbeat(site)
    processes_of_worker = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    third = next(run["id"] for run in site.runs() if run["state_type"] == "RUNNING")
    for process in processes_of_worker:
        process.kill()
    last_step = site.status()["step"]
    site.start("worker2", "prefect", "worker", "start", "--pool", "onediff-cpu")
    until(lambda: site.state(third)["type"] == "CRASHED", 300)
    until(lambda: _in_training(site, last_step), 300)


def test_on_a_shared_server_only_deployments_change_aliases_and_they_ask_for_approval(
        site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as local:
        local.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'server.db'}")
        tracking.client()
    server = Server(tmp_path)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.chdir(site.folder)
    site.env["MLFLOW_TRACKING_URI"] = server.address
    write_rules(site.folder / "mlflow/promotion.yaml")
    site.start("worker", "prefect", "worker", "start", "--pool", "onediff-cpu")
    try:
        assert [add("a"), add("b", CIDEr=4.0)] == ["1", "2"]
        assert aliases() == {"1": [], "2": []}
        with pytest.raises(ValueError, match="changed by the Prefect deployments promote and rollback only"):
            registry.promote("1")
        both = [site.trigger("promote/promote", version=version) for version in ("1", "1")]
        until(lambda: all(site.state(run)["type"] == "COMPLETED" for run in both), 180)
        assert sorted(site.state(run)["message"] for run in both) == ["version 1 is champion",
                                                                     "version 1 is the champion already"]
        assert "version 2 is champion and replaces version 1" in site.run("onediff", "registry", "promote", "2")
        assert "version 1 is champion again" in site.run("onediff", "registry", "rollback", "--why", "worse at night")

        write_rules(site.folder / "mlflow/promotion.yaml", approval_h=1)
        for answer, champion in (({"approve": False, "name": "Ada", "reason": "too soon"}, "1"),
                                 ({"approve": True, "name": "Ada"}, "2")):
            run = site.trigger("promote/promote", version="2")
            until(lambda run=run: site.state(run)["type"] == "PAUSED", 120)
            resumed = httpx.post(f"{site.api}/flow_runs/{run}/resume", json={"run_input": answer}, timeout=60)
            assert resumed.json()["status"] == "ACCEPT"
            until(lambda run=run: site.state(run)["type"] in ("COMPLETED", "FAILED"), 120)
            assert registry.trail()[-1].new["champion"] == champion
        assert "approved by Ada" in registry.trail()[-1].by
        assert "worse at night" in registry.trail()[-2].why
        registry.check_trail()
    finally:
        server.stop()
