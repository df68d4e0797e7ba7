"""Tests of the connection to MLflow: which address is used, logins, and servers that do not answer."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onediff import tracking
from onediff.config import Config

REPO = Path(__file__).parents[2]


def test_the_environment_precedes_runtime_yaml_and_runtime_yaml_precedes_sqlite(monkeypatch, address: str) -> None:
    Path("runtime.yaml").write_text("mlflow_uri: http://mlflow.example.org:5000\n")
    assert tracking.uri() == address
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.uri() == "http://mlflow.example.org:5000"
    Path("runtime.yaml").unlink()
    assert tracking.uri() == f"sqlite:///{Path.cwd()}/.onediff/mlflow.db"


def test_a_folder_is_refused_as_the_address_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ValueError, match=r"'\./mlruns': must be a server"):
        tracking.uri()


def test_an_unreachable_server_stops_a_phase_before_it_trains(monkeypatch, config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    start = time.monotonic()
    for call in (tracking.check, tracking.client, lambda: tracking.phase_run("align", config).__enter__()):
        with pytest.raises(ValueError, match=f"MLflow at {address} cannot be reached .*unset MLFLOW_TRACKING_URI"):
            call()
    assert time.monotonic() - start < 10


def test_a_server_that_never_answers_stops_a_phase_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match="timed out"):
            tracking.check()
    assert time.monotonic() - start < 10


def test_the_password_is_removed_from_an_address() -> None:
    assert tracking.without_password("postgresql://me:secret@host/db") == "postgresql://host/db"
    assert tracking.without_password("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_importing_tracking_and_registry_does_not_import_mlflow() -> None:
    code = "import sys, onediff.tracking, onediff.registry; sys.exit('mlflow.version' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


class Guarded(BaseHTTPRequestHandler):
    """Answers like MLflow with basic-auth: /health needs no login, and every other page needs the login of `me`."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] in ("Basic bWU6c2VjcmV0", "Bearer abc") or self.path == "/health"
        self.send_response(200 if known else 401)
        self.end_headers()

    def log_message(self, *words: object) -> None: ...


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("HOME", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{running.server_port}")
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_message_about_a_rejected_login_contains_the_variables_and_no_password(guarded: str, monkeypatch) -> None:
    unknown = rf"^MLflow at http://{guarded} rejects the login \(401\): set MLFLOW_TRACKING_USERNAME and [^\n]*$"
    with pytest.raises(ValueError, match=unknown):
        tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:wr0ng@{guarded}")
    with pytest.raises(ValueError, match=unknown):
        tracking.check()


def test_credentials_are_read_from_the_address_the_environment_or_a_file(guarded: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{guarded}")
    tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{guarded}")
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/credentials").write_text("[mlflow]\nmlflow_tracking_username = me\n"
                                                  "mlflow_tracking_password = secret\n")
    tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wr0ng")
    with pytest.raises(ValueError, match="rejects the login"):
        tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    tracking.check()
