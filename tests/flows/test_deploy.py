"""Tests of prefect.yaml and of `flows/deploy.py`, without a Prefect server."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule
from ruamel.yaml import YAML

from flows import deploy, deployments
from onediff.config import Pools

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_the_flow_and_the_work_pool_of_every_deployment_exist(deployment: dict) -> None:
    path, _, name = deployment["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(flow, Flow)
    assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties)
    assert deployment["work_pool"]["name"] in Pools().model_dump().values()
    assert deployment["concurrency_limit"]["limit"] == 1


def test_schedules_are_valid_and_paused_at_first() -> None:
    schedules = [schedule for deployment in DEPLOYMENTS for schedule in deployment.get("schedules", [])]
    assert len(schedules) == 3
    for schedule in schedules:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        assert schedule["active"] is False


def test_every_deployment_that_the_code_submits_to_is_in_prefect_yaml() -> None:
    names = set()
    for deployment in DEPLOYMENTS:
        path, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        names.add(f"{flow.name}/{deployment['name']}")
    assert {deployments.RETRAIN, deployments.PROMOTE, deployments.ROLLBACK, "stage/cpu", "stage/gpu"} <= names


def test_without_a_server_the_error_names_the_command_that_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ValueError, match="PREFECT_API_URL is not set: 'make services'"):
        deploy.deploy()


def test_a_flow_run_counts_as_lost_after_at_least_nine_minutes_without_a_heartbeat() -> None:
    automation = deploy.lost_runs(deploy.PATIENCE_S)
    assert automation.trigger.within.total_seconds() >= 540
    assert automation.trigger.after == {"prefect.flow-run.heartbeat"} and automation.trigger.posture == "Proactive"
