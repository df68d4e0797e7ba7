"""Tests of `make ui`, which shows the MLflow store in a browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from onediff.tracking import ui

REPO = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_server_as_the_store_needs_no_second_server(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org")
    ui.show()
    assert capsys.readouterr().out == "MLflow is already a server: open https://mlflow.example.org in a browser\n"


def test_a_port_that_is_in_use_is_reported_with_another_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} .* must be free .*'make ui PORT={port + 1}'"):
            ui.show(port)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_served_until_a_signal_and_leaves_no_process(number: signal.Signals) -> None:
    port = free_port()
    page = subprocess.Popen([sys.executable, "-m", "onediff.tracking.ui", str(port)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(REPO)})
    assert page.stdout is not None
    lines = [page.stdout.readline() for _ in range(4)]
    assert f"http://127.0.0.1:{port}/#/experiments/" in lines[1] and "Ctrl-C" in lines[3]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        assert answer.status == 200
    children = psutil.Process(page.pid).children(recursive=True)
    assert children and not [child for child in children if "job" in " ".join(child.cmdline())]
    page.send_signal(number)
    assert page.wait(timeout=30) == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
