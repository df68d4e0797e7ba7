"""Tests of the MLflow runs of training phases: metrics, names, nesting, interrupted runs and lost servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from registered import Server

from onediff import tracking
from onediff.config import Config
from onediff.tracking import connection

REPO = Path(__file__).parents[2]


def history(run_id: str, key: str) -> list[tuple[int, float]]:
    return [(item.step, item.value) for item in tracking.client().get_metric_history(run_id, key)]


def test_logged_values_are_in_the_run_when_it_ends(config: Config) -> None:
    with tracking.phase_run("align", config) as run:
        for step, loss in enumerate((3.0, 2.0, 1.5)):
            run.log(step, {"step": step, "loss": loss, "pairs_per_s": 10.0 * (step + 1)})
    stored = tracking.client().get_run(run.id)
    assert history(run.id, "loss") == [(0, 3.0), (1, 2.0), (2, 1.5)]
    assert stored.data.params["align.lr_delta"] == str(config.align.lr_delta) and stored.data.params["seed"] == "7"
    assert stored.info.status == "FINISHED" and run.problems == []
    described = run.describe(digest="d1")
    assert described == {**described, "run_id": run.id, "phase": "align", "pairs_per_s": 20.0, "digest": "d1"}


def test_logging_does_not_wait_for_mlflow(config: Config) -> None:
    with tracking.phase_run("tune", config) as run:
        start = time.monotonic()
        for step in range(2000):
            run.log(step, {"loss": 1.0, "lr": 1e-3, "pairs_per_s": 5.0})
        assert time.monotonic() - start < 0.5
    assert len(history(run.id, "loss")) == 2000


def test_runs_inside_a_retraining_nest_under_its_run(config: Config) -> None:
    with tracking.parent_run("retrain", config) as parent:
        with tracking.phase_run("align", config) as child:
            pass
        assert os.environ[tracking.PARENT] == parent.id
    assert tracking.PARENT not in os.environ
    tags = tracking.client().get_run(child.id).data.tags
    assert tags["mlflow.parentRunId"] == parent.id and tags["kind"] == "phase"
    assert tags["mlflow.runName"] == "align"


def test_a_run_is_named_after_its_work_the_date_and_the_preset(config: Config) -> None:
    with tracking.parent_run("retrain", config) as run:
        pass
    assert name_of(run.id) == f"retrain {date.today():%Y-%m-%d} own parameters"
    Path("presets").mkdir()
    for path in ("presets/tiny.yaml", "params.yaml"):
        shutil.copy(REPO / "presets/tiny.yaml", path)
    with tracking.phase_run("align", config.model_copy(update={"seed": 13})) as run:
        pass
    assert name_of(run.id) == f"align {date.today():%Y-%m-%d} tiny"


def name_of(run_id: str) -> str:
    return str(tracking.client().get_run(run_id).info.run_name)


def test_the_experiment_is_marked_as_model_training_also_if_earlier_code_created_it(config: Config) -> None:
    experiment = tracking.experiment_id()
    kind, value = connection.KIND
    assert tracking.client().get_experiment(experiment).tags[kind] == value
    tracking.client().delete_experiment_tag(experiment, kind)
    with tracking.phase_run("align", config):
        pass
    assert tracking.client().get_experiment(experiment).tags[kind] == value


def test_a_phase_that_was_killed_continues_its_run(config: Config) -> None:
    seeded = config.model_copy(update={"seed": 11})
    killed = tracking.phase_run("align", seeded)  # This run is never ended, like the run of a killed process.
    with tracking.phase_run("align", seeded) as run:
        assert run.id == killed.id
    with tracking.phase_run("align", seeded) as again:
        assert again.id != killed.id


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_ends_with_an_exception_keeps_its_metrics(config: Config, error: type, status: str) -> None:
    with pytest.raises(error), tracking.phase_run("align", config) as run:
        run.log(1, {"loss": 2.5})
        raise error
    assert tracking.client().get_run(run.id).info.status == status
    assert history(run.id, "loss") == [(1, 2.5)]


def test_a_changed_file_makes_the_commit_dirty_but_results_of_the_pipeline_do_not() -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *who, *words], check=True, capture_output=True)

    Path("data").mkdir()
    for name in ("code.py", "dvc.lock", "data/metrics.json"):
        Path(name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = tracking.provenance()
    assert len(clean["git_commit"]) == 40 and clean["git_dirty"] == "false" and clean["data_digest"] == "none"
    for name in ("dvc.lock", "data/metrics.json"):
        Path(name).write_text("2")
    assert tracking.provenance()["git_dirty"] == "false"
    assert tracking.provenance()["dvc_lock"] != clean["dvc_lock"]
    Path("code.py").write_text("2")
    assert tracking.provenance()["git_dirty"] == "true"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running MLflow server, which the test may stop and start again."""
    running = Server(tmp_path)
    running.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.address)
    yield running
    running.stop()


@pytest.mark.slow
def test_training_continues_when_the_server_dies(server: Server, config: Config, capsys) -> None:
    with tracking.phase_run("align", config) as run:
        run.log(1, {"loss": 2.0})
        assert run._send()
        server.stop()
        run.log(2, {"loss": 1.0})
        trained = "weights"
    assert trained == "weights"
    assert run.describe(digest="d")["run_id"] == run.id
    assert f"MLflow run {run.id} (align) is incomplete: 1 metrics could not be sent" in capsys.readouterr().err
    server.start()
    assert history(run.id, "loss") == [(1, 2.0)]


@pytest.mark.slow
def test_a_server_that_restarts_gets_every_metric_once(server: Server, config: Config) -> None:
    with tracking.phase_run("align", config) as run:
        server.stop()
        run.log(1, {"loss": 2.0})
        assert not run._send()
        server.start()
        run.log(2, {"loss": 1.0})
    assert run.problems == []
    assert history(run.id, "loss") == [(1, 2.0), (2, 1.0)]
