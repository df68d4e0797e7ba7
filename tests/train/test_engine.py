"""The process group of a training that runs without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys

ALONE = """
import sys
from onediff.train.engine import start_process_group
import deepspeed, torch  # urllib3 binds a socket at import, to see whether there is IPv6
events = []
sys.addaudithook(lambda event, arguments: events.append(event) if event == "socket.bind" else None)
start_process_group()
values = torch.ones(3)
torch.distributed.all_reduce(values)
assert values.tolist() == [1, 1, 1] and torch.distributed.get_world_size() == 1
assert not events, f"a port was chosen: {events}"
"""


def test_one_process_alone_chooses_no_port_that_another_could_take() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment | {"DS_ACCELERATOR": "cpu"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
