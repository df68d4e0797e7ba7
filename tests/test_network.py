"""Tests that requests to this machine do not use a proxy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from onediff.network import exempt_loopback_from_proxies

ROOT = Path(__file__).resolve().parent.parent
ASK = "urllib.request.urlopen(url, timeout=5), requests.get(url, timeout=5), httpx.get(url, timeout=5)"
LOOPBACK = "localhost,127.0.0.1,::1"


class Answer(BaseHTTPRequestHandler):
    """An HTTP handler that answers every GET request with status 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Do not print a log line for each request."""


@pytest.fixture
def address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("start", [
    "import flows; ask()", "from onediff.stages.command import run; run(ask)",
    "from onediff.cli import main as cli; cli.app = ask; cli.main()"], ids=["flows", "stages", "cli"])
def test_requests_to_this_machine_do_not_use_the_proxy(address: str, start: str, tmp_path: Path) -> None:
    code = f"import sys, httpx, requests, urllib.request\nurl = sys.argv.pop()\ndef ask(**_): {ASK}\n{start}"
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"} | proxies
    done = subprocess.run([sys.executable, "-c", code, address], cwd=tmp_path, capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {}),
    ({"NO_PROXY": "a.example"}, {"NO_PROXY": "a.example"}),
    ({"HTTP_PROXY": ""}, {"HTTP_PROXY": ""}),
    ({"https_proxy": "p"}, {"https_proxy": "p", "NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK}),
    ({"ALL_PROXY": "p", "NO_PROXY": "a.example, localhost"},
     {"ALL_PROXY": "p", "NO_PROXY": "a.example,localhost,127.0.0.1,::1",
      "no_proxy": "a.example,localhost,127.0.0.1,::1"}),
    ({"HTTP_PROXY": "p", "NO_PROXY": "a", "no_proxy": "b"},
     {"HTTP_PROXY": "p", "NO_PROXY": f"a,{LOOPBACK}", "no_proxy": f"b,{LOOPBACK}"}),
    ({"HTTP_PROXY": "p", "NO_PROXY": "*"}, {"HTTP_PROXY": "p", "NO_PROXY": "*"})])
def test_loopback_addresses_are_added_to_the_settings_of_the_user(given: dict[str, str],
                                                                  expected: dict[str, str]) -> None:
    environ = dict(given)
    exempt_loopback_from_proxies(environ)
    assert environ == expected
    exempt_loopback_from_proxies(environ)
    assert environ == expected
