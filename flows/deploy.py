"""`python -m flows.deploy [PATIENCE_S]` creates work pools, deployments, limits and automations on a Prefect server."""

import os
import subprocess
import sys
from contextlib import suppress
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
# seconds without a heartbeat after which a flow run counts as crashed; a busy machine sends heartbeats late
PATIENCE_S = 540.0


def deploy(patience_s: float = PATIENCE_S) -> None:
    """Create the work pools, an automation and the deployments of the flows on the Prefect server, without duplicates.

    A flow run without a heartbeat for `patience_s` seconds is marked as crashed. Raises ValueError if PREFECT_API_URL
    is not set or if `prefect deploy` fails.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise ValueError("PREFECT_API_URL is not set: 'make services' starts a server and prints the value to set")
    pools = load_runtime().pools or Pools()
    with get_client(sync_client=True) as client:
        for name in (pools.cpu, pools.gpu):
            with suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        client.upsert_global_concurrency_limit_by_name(SLOT, 1)
        for old in client.read_automations_by_name(LOST):
            client.delete_automation(old.id)
        client.create_automation(lost_runs(patience_s))
    if subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], check=False).returncode:
        raise ValueError("'prefect deploy' failed with the message above: correct prefect.yaml")


def lost_runs(patience_s: float) -> AutomationCore:
    """Return the Prefect automation that marks a flow run as Crashed when it sends no more heartbeats.

    Another automation, in prefect.yaml, then starts a crashed run of `retrain` again.
    """
    trigger = EventTrigger(after={"prefect.flow-run.heartbeat"}, expect={"prefect.flow-run.*"},
                           for_each={"prefect.resource.id"}, match={"prefect.resource.id": ["prefect.flow-run.*"]},
                           posture=Posture.Proactive, threshold=1, within=timedelta(seconds=patience_s))
    action = ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, force=True,
                                message="the flow run stopped sending heartbeats")
    return AutomationCore(name=LOST, trigger=trigger, actions=[action])


if __name__ == "__main__":
    interrupts.handle_as_python_does()
    try:
        deploy(*map(float, sys.argv[1:2]))
    except ValueError as error:
        sys.exit(f"onediff: {error}")
