"""Tests of the process group that the engine creates when training runs without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys

ALONE = """
import sys
from onediff.train.engine import start_process_group
import deepspeed, torch  # Imported before the audit hook, because urllib3 binds a socket when it is imported.
events = []
sys.addaudithook(lambda event, arguments: events.append(event) if event == "socket.bind" else None)
start_process_group()
values = torch.ones(3)
torch.distributed.all_reduce(values)
assert values.tolist() == [1, 1, 1] and torch.distributed.get_world_size() == 1
assert not events, f"the process group must not open a port, but socket events occurred: {events}"
"""


def test_a_process_group_of_one_process_opens_no_port() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment | {"DS_ACCELERATOR": "cpu"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
