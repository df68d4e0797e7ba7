"""Tests of the lock that lets only one process change the aliases of a registry at a time."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
from registered import register, trained

from onediff import registry
from onediff.registry import store


@pytest.mark.parametrize(("address", "shared"), [
    ("sqlite:////a/b.db", False), ("http://127.0.0.1:5000", True), ("https://h", True), ("postgresql://h/db", True)])
def test_a_server_and_a_network_database_are_shared(address: str, shared: bool, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert registry.shared() is shared


@pytest.mark.parametrize("call", [registry.promote, registry.rollback, registry.repair, lambda: registry.propose("1")])
def test_a_shared_registry_can_be_changed_only_inside_sole_writer(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ValueError, match=r"aliases at http://127\.0\.0\.1:9 must be changed by the Prefect deployments "
                                         "promote and rollback only: run 'onediff registry promote'"):
        call()


def test_sole_writer_applies_only_to_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with registry.sole_writer(), store.writing():
        pass
    with pytest.raises(ValueError, match="deployments promote and rollback only"), store.writing():
        pass


def test_on_one_machine_only_one_writer_changes_the_registry_at_a_time() -> None:
    spans = []

    def work() -> None:
        with store.writing():
            start = time.monotonic()
            time.sleep(0.05)
            spans.append((start, time.monotonic()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans.sort()
    assert len(spans) == 3 and all(first[1] <= second[0] for first, second in pairwise(spans))


def test_a_writer_that_waits_too_long_reports_the_path_of_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WAIT_S", 0.1)
    wrong: list[str] = []
    folder = trained("a")

    def work() -> None:
        try:
            register(folder)
        except ValueError as error:
            wrong.append(str(error))

    with store.writing():
        thread = threading.Thread(target=work)  # A thread has a context of its own, like another process.
        thread.start()
        thread.join()
    assert "mlflow.db.lock: another process has held this lock of the registry" in wrong[0]


def test_the_author_of_a_change_is_user_and_machine() -> None:
    assert "@" in store.user_and_machine()
