"""Tests of the connection to MLflow: which address is used, logins, and servers that do not answer."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onediff import registry, tracking
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


def _junk(path: Path, good: bytes) -> None:
    path.write_text("junk\n")


def _folder(path: Path, good: bytes) -> None:
    path.mkdir()


def _cut_off(path: Path, good: bytes) -> None:
    path.write_bytes(good[:len(good) // 3])


def _damaged_table(path: Path, good: bytes) -> None:
    """Overwrite the pages of two tables and their indexes, so that SQLite can open only the file."""
    path.write_bytes(good)
    with closing(sqlite3.connect(path)) as database:
        pages = database.execute("select rootpage from sqlite_master where rootpage > 0 and tbl_name in "
                                 "('registered_models', 'model_versions')").fetchall()
        [[size]] = database.execute("pragma page_size")
    with path.open("r+b") as file:
        for [page] in pages:
            file.seek((page - 1) * size)
            file.write(b"\xff" * size)


@pytest.mark.parametrize("damage", [_junk, _folder, _cut_off, _damaged_table])
def test_a_damaged_database_is_one_line_with_its_path_and_a_cure(damage: Callable[[Path, bytes], None],
                                                                 empty_store: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "damaged.db"
    damage(path, empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    for call in (registry.list_versions, registry.trail):
        with pytest.raises(ValueError, match=rf"^MLflow's database {path} must be an undamaged SQLite database, but "
                                             r"SQLite cannot read it \([a-z ]+\): restore the file from a backup, or "
                                             r"move it away[^\n]*$"):
            call()


def test_a_database_that_another_process_has_locked_is_not_called_damaged(empty_store: Path, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.db"
    path.write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as database:
        database.execute("begin exclusive")
        tracking.check()
