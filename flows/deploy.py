"""`python -m flows.deploy [PATIENCE_S]`: pools, deployments, limits and automations, on a Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists

from flows.promote import SLOT
from onediff import interrupts
from onediff.config import Pools, load_runtime

LOST = "onediff: lost flow runs"
HEARTBEAT = "prefect.flow-run.heartbeat"
PATIENCE_S = 540.0  # shorter ones take a busy machine's runs for lost


def deploy(patience_s: float = PATIENCE_S) -> None:
    """Doing it again changes nothing. Raises ValueError if no server is set, or in Prefect's words."""
    if not os.environ.get("PREFECT_API_URL"):
        raise ValueError("PREFECT_API_URL is not set: 'make services' starts a server and says what to set")
    pools = load_runtime().pools or Pools()
    with get_client(sync_client=True) as client:
        for name in (pools.cpu, pools.gpu):
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            except ObjectAlreadyExists:
                continue
        client.upsert_global_concurrency_limit_by_name(SLOT, 1)
        for old in client.read_automations_by_name(LOST):
            client.delete_automation(old.id)
        client.create_automation(lost_runs(patience_s))
    done = subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], check=False)
    if done.returncode:
        raise ValueError("prefect deploy failed; see its message above: correct prefect.yaml")


def lost_runs(patience_s: float) -> AutomationCore:
    """A run of which nothing is heard, as its machine died, becomes Crashed; that of `retrain` is then run again."""
    trigger = EventTrigger(after={HEARTBEAT}, expect={"prefect.flow-run.*"}, for_each={"prefect.resource.id"},
                           match={"prefect.resource.id": ["prefect.flow-run.*"]}, posture=Posture.Proactive,
                           threshold=1, within=timedelta(seconds=patience_s))
    action = ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, force=True,
                                message="nothing was heard of its process")
    return AutomationCore(name=LOST, trigger=trigger, actions=[action])


def main() -> None:
    interrupts.handle_as_python_does()
    try:
        deploy(*map(float, sys.argv[1:2]))
    except ValueError as error:
        sys.exit(f"onediff: {error}")


if __name__ == "__main__":
    main()
