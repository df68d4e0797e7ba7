"""Prefect flows decide when and in which order the stages of dvc.yaml run, and who is notified.

Prefect reads the settings below when it is first imported, so this package sets them before it imports any flow.
A variable that the environment already sets keeps its value.
"""

import os
from pathlib import Path

from onediff import interrupts
from onediff.network import exempt_loopback_from_proxies

for _key, _value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_HOME": str(Path(".onediff/prefect").absolute()),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}.items():
    os.environ.setdefault(_key, _value)
# Requests to servers on this machine (Prefect's temporary server, `make services`) must not go through a proxy.
exempt_loopback_from_proxies()
Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
interrupts.end_while_importing()
