"""Tests of the notifications that flows send through Prefect blocks."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prefect import flow, get_client
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.testing.utilities import prefect_test_harness

from flows.notify import notify, without_secrets


def test_user_and_password_are_removed_from_addresses() -> None:
    text = "git push: fatal: https://bob:hunter2@example.org/x.git and postgresql://u:p@db/x, not bob@example.org"
    assert without_secrets(text) == ("git push: fatal: https://***@example.org/x.git and postgresql://***@db/x, "
                                     "not bob@example.org")


@pytest.mark.slow
def test_notifications_contain_event_reason_and_next_command_and_failing_blocks_stop_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    received: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    blocks = "custom-webhook/ear, custom-webhook/gone, slack-webhook/none, secret/key"
    Path("runtime.yaml").write_text(f"notify: [{blocks}]\n")

    @flow
    def refuse() -> None:
        notify("refusal", "version 2 is refused", why="scenes.CIDEr is 1 at postgresql://me:hunter2@db",
               then="onediff x")

    with prefect_test_harness(server_startup_timeout=120):
        for name, port in (("ear", server.server_port), ("gone", 9)):
            CustomWebhookNotificationBlock(name=name, url=f"http://127.0.0.1:{port}/?key=hunter2", method="POST",
                                           json_data={"subject": "{{subject}}", "body": "{{body}}"},
                                           allow_private_urls=True).save(name, _sync=True)
        Secret(value="x").save("key", _sync=True)
        refuse()
        with get_client(sync_client=True) as client:
            artifacts = client.read_artifacts()
    server.shutdown()
    assert received == [{"subject": "OneDiff: version 2 is refused", "body":
                      "version 2 is refused\nscenes.CIDEr is 1 at postgresql://***@db\nNext: onediff x\n"}]
    assert [artifact.key for artifact in artifacts] == ["refusal"] and "`onediff x`" in str(artifacts[0].data)
    stdout = capsys.readouterr().out
    assert stdout.count("was not notified") == 3 and "hunter2" not in stdout
    assert "secret/key was not notified: is a Secret block, which cannot send notifications" in stdout
