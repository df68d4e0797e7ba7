"""Prefect flows: when the stages of dvc.yaml run, in which order, who is told. They hold no logic of their own.

Prefect reads these settings at its first import, so they are set here, before any flow is; those already set stay.
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
exempt_loopback_from_proxies()  # Prefect's temporary server and those of `make services` are on this machine
Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
interrupts.end_while_importing()
