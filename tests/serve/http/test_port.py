from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onediff.cli.main import app
from onediff.serve.http.port import address, listener


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


def test_the_command_refuses_a_port_in_use_before_it_imports_the_model(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error appeared after the import of torch, which takes seconds."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread.name} was started"))
    with listener("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path), "--port", str(port)])
    assert f"the server cannot listen on 127.0.0.1 port {port}" in str(result.exception)


def test_the_address_is_one_that_a_browser_opens() -> None:
    with listener("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
        assert address(opened, "localhost") == f"http://localhost:{port}"
        assert address(opened, "::1") == f"http://[::1]:{port}"
