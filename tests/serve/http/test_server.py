"""Tests of the process `onediff serve`: start, clean end, and errors before and after the port is open."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import pair_body, wait_until

from onediff.config import Serve
from onediff.model.captioner import Captioner
from onediff.serve.http.app import create_app
from onediff.serve.http.captioning import Version
from onediff.serve.http.server import listener, run
from onediff.serve.http.service import Service

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def model(served_captioner: Captioner, tmp_path: Path) -> Path:
    served_captioner.model.save_pretrained(tmp_path / "model")
    served_captioner.processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@contextmanager
def started(model: Path | str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "onediff", "serve", "--port", "0", "--model", str(model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_server_captions_and_ends_cleanly_at_ctrl_c(model: Path) -> None:
    with started(model) as process:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            assert client.get("/healthz").status_code == 200
            loading = client.post("/v1/captions", json=pair_body())
            assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
            assert client.get("/readyz").json()["ready"] is False
            wait_until(lambda: client.get("/readyz").status_code == 200, 120)
            assert client.post("/v1/captions", json=pair_body()).json()["model"]["version"] == "model"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "")
    assert re.fullmatch(r"\S+ \S+ INFO ready: version model, digest \w{12}\n", errors)


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error() -> None:
    def load(name: str) -> Version:
        raise ValueError(f"version {name}: the weights cannot be read")

    service, addresses = Service(Serve(), current=lambda: "7", load=load), list[str]()
    with pytest.raises(ValueError, match="version 7: the weights cannot be read"):
        run(service, create_app(service), host="127.0.0.1", port=0, report=addresses.append)
    assert len(addresses) == 1


def test_a_missing_model_is_refused_before_the_port_is_open(tmp_path: Path) -> None:
    with started(tmp_path / "nothing") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert "is not a model folder" in errors


def test_accepted_connections_send_without_delay() -> None:
    with listener("127.0.0.1", 0) as opened, socket.create_connection(opened.getsockname()):
        accepted, _ = opened.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP  # With this number, asyncio sets TCP_NODELAY.


def test_a_port_in_use_is_refused_with_its_address() -> None:
    with listener("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
        with pytest.raises(OSError, match=f"the server cannot listen on 127.0.0.1 port {port}: .*choose another"):
            listener("127.0.0.1", port)
