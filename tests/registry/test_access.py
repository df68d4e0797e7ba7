"""An MLflow server that requires a login: errors are one line with the variables to set and without a password."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from registered import Server, add, aliases

from onediff import registry, tracking
from onediff.tracking import connection

ADMIN, OTHER = ("admin", "adm1n-passw0rd"), ("reader", "r3ader-passw0rd")


@pytest.fixture
def guarded(store: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Iterator[Server]:
    """A running MLflow server that requires a login."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    running = Server(tmp_path_factory.mktemp("guarded"), "--app-name", "basic-auth",
                     MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN[1], MLFLOW_FLASK_SERVER_SECRET_KEY="for this test")
    running.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.address)
    yield running
    running.stop()


def become(user: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Log in to MLflow with this user name and password from now on."""
    connection._client.cache_clear()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])


def make_user(server: Server, user: tuple[str, str]) -> None:
    request = urllib.request.Request(f"{server.address}/api/2.0/mlflow/users/create", method="POST",
                                   data=json.dumps(dict(zip(("username", "password"), user, strict=True))).encode(),
                                   headers={"Content-Type": "application/json", "Authorization": "Basic "
                                            + base64.b64encode(":".join(ADMIN).encode()).decode()})
    urllib.request.urlopen(request, timeout=20).close()


@pytest.mark.slow
def test_a_rejected_user_gets_one_line_with_the_variables_to_set(guarded: Server, monkeypatch) -> None:
    connection._client.cache_clear()
    rejected = rf"^MLflow at {guarded.address} rejects the login \(401\): set MLFLOW_TRACKING_USERNAME and [^\n]*$"
    for call in (tracking.check, tracking.client, registry.list_versions, registry.trail):
        with pytest.raises(ValueError, match=rejected):
            call()
    become(("admin", "wr0ng"), monkeypatch)
    with pytest.raises(ValueError, match=rejected) as refusal:
        registry.list_versions()
    assert "wr0ng" not in str(refusal.value)
    become(ADMIN, monkeypatch)
    with registry.sole_writer():
        add("a")
        registry.promote()
    make_user(guarded, OTHER)
    become(OTHER, monkeypatch)
    assert aliases() == {"1": ["candidate", "champion"]} and len(registry.trail()) == 2
    with registry.sole_writer(), pytest.raises(ValueError, match=r"does not give reader permission .*403") as refusal:
        add("a", CIDEr=4.0)
    assert OTHER[1] not in str(refusal.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.address.replace("//", f"//{ADMIN[0]}:wr0ng@"))
    with pytest.raises(ValueError, match=rejected):
        registry.list_versions()


def test_the_message_about_an_unreachable_server_contains_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ValueError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be reached") as refusal:
        registry.list_versions()
    assert "secret" not in str(refusal.value)
