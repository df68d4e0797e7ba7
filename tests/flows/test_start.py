from __future__ import annotations

from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.slow  # a Prefect server


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401 - its settings before Prefect's first import

    with prefect_test_harness(server_startup_timeout=120):
        yield


def test_a_deployment_that_is_not_there_is_said() -> None:
    from flows.start import start_retraining

    said = start_retraining("a")
    assert said.startswith("no retraining was started: retrain/retrain") and said.endswith("'make deploy' deploys it")


def test_one_cause_starts_one_run_however_often_it_is_found() -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client

    from flows.start import start_retraining

    @flow(name="retrain")
    def retrain() -> None: ...

    retrain.to_deployment(name="retrain").apply()
    first, again, other = (start_retraining(key) for key in ("data-1", "data-1", "data-2"))
    assert first == again != other and first.startswith("retraining '")
    with get_client(sync_client=True) as client:
        assert len(client.read_flow_runs()) == 2
