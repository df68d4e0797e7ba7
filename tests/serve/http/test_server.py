"""Tests of the process `onediff serve`: start, clean end, and a model that cannot be loaded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import HeldCaptioner, pair_body, version, wait_until
from typer.testing import CliRunner

from onediff.cli.main import app
from onediff.config import Serve
from onediff.model.captioner import Captioner
from onediff.serve.http.app import create_app
from onediff.serve.http.captioning import Version
from onediff.serve.http.port import listener
from onediff.serve.http.server import run
from onediff.serve.http.service import Service

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def started(model: Path | str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "onediff", "serve", "--port", "0", "--model", str(model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow  # The new process imports torch.
def test_the_process_captions_and_ends_cleanly_at_ctrl_c(untrained: Path) -> None:
    with started(untrained) as process:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            assert client.get("/healthz").status_code == 200
            loading = client.post("/v1/captions", json=pair_body())
            assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
            assert client.get("/readyz").json()["ready"] is False
            wait_until(lambda: client.get("/readyz").status_code == 200, 120)
            assert client.post("/v1/captions", json=pair_body()).json()["model"]["version"] == untrained.name
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "")
    assert re.fullmatch(rf"\S+ \S+ INFO ready: version {untrained.name}, digest \w{{12}}\n", errors)


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error() -> None:
    def load(name: str) -> Version:
        raise ValueError(f"version {name}: the weights cannot be read")

    service = Service(Serve(), current=lambda: "7", load=load)
    with (listener("127.0.0.1", 0) as opened,
          pytest.raises(ValueError, match="version 7: the weights cannot be read")):
        run(service, create_app(service), opened)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_ends_the_server_after_the_requests_in_progress(served_captioner: Captioner,
                                                                      number: signal.Signals) -> None:
    held = HeldCaptioner(served_captioner)
    service = Service(Serve(), current=lambda: "1", load=lambda name: version(held, name))
    with listener("127.0.0.1", 0) as opened, ThreadPoolExecutor() as clients:
        url = "http://127.0.0.1:{1}".format(*opened.getsockname())

        def stop() -> None:
            wait_until(lambda: bool(held.batches))
            os.kill(os.getpid(), number)
            held.may_start.set()

        def use() -> int:
            wait_until(lambda: service.is_ready)
            return httpx.post(f"{url}/v1/captions", json=pair_body(), trust_env=False, timeout=30).status_code

        status, stopping = clients.submit(use), clients.submit(stop)
        run(service, create_app(service), opened)
        assert (status.result(), stopping.result()) == (200, None)


def test_the_command_serves_until_ctrl_c(untrained: Path) -> None:
    with listener("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]

    def use() -> int:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            wait_until(lambda: is_ready(client))
            status = client.post("/v1/captions", json=pair_body()).status_code
            os.kill(os.getpid(), signal.SIGINT)
            return status

    with ThreadPoolExecutor() as clients:
        status = clients.submit(use)
        result = CliRunner().invoke(app, ["serve", "--port", str(port), "--model", str(untrained)])
        assert (status.result(), result.exit_code) == (200, 0)
    assert result.stdout == f"OneDiff serves {untrained} at http://127.0.0.1:{port}; Ctrl-C stops it\n"


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_missing_model_is_refused_before_the_port_is_open(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--model", str(tmp_path / "nothing")])
    assert "is not a model folder" in str(result.exception)
    assert result.output == ""
