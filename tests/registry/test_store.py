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
def test_a_server_and_a_database_of_several_machines_are_shared(address: str, shared: bool, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert registry.shared() is shared


@pytest.mark.parametrize("call", [registry.promote, registry.rollback, registry.repair, lambda: registry.propose("1")])
def test_a_shared_registry_is_changed_by_its_one_writer_alone(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ValueError, match=r"aliases at http://127\.0\.0\.1:9 are changed by the deployments promote and "
                                         "rollback alone: 'onediff registry promote' submits to them"):
        call()


def test_sole_writer_holds_for_its_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with registry.sole_writer(), store.writing():
        pass
    with pytest.raises(ValueError, match="deployments promote and rollback alone"), store.writing():
        pass


def test_on_one_machine_writers_wait_for_each_other() -> None:
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


def test_one_that_waits_too_long_names_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WAIT_S", 0.1)
    wrong: list[str] = []
    folder = trained("a")

    def work() -> None:
        try:
            register(folder)
        except ValueError as error:
            wrong.append(str(error))

    with store.writing():
        thread = threading.Thread(target=work)  # another context, as another process is
        thread.start()
        thread.join()
    assert "mlflow.db.lock: another process has been changing the registry" in wrong[0]


def test_who_changes_is_user_and_machine() -> None:
    assert "@" in store.user_and_machine()
