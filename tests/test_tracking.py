from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from registered import Server

from onediff import tracking
from onediff.config import Config, load_params
from onediff.data.record import Record, write_shards

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def store(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.delenv(tracking.PARENT, raising=False)


@pytest.fixture(scope="session")
def config() -> Config:
    return load_params(REPO / "presets/tiny.yaml")


def history(run_id: str, key: str) -> list[tuple[int, float]]:
    return [(item.step, item.value) for item in tracking.client().get_metric_history(run_id, key)]


def test_the_environment_wins_over_runtime_and_runtime_over_sqlite(monkeypatch, address: str) -> None:
    Path("runtime.yaml").write_text("mlflow_uri: http://mlflow.example.org:5000\n")
    assert tracking.uri() == address
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.uri() == "http://mlflow.example.org:5000"
    Path("runtime.yaml").unlink()
    assert tracking.uri() == f"sqlite:///{Path.cwd()}/.onediff/mlflow.db"


def test_a_folder_is_no_address_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ValueError, match=r"'\./mlruns': must be a server"):
        tracking.uri()


def test_logged_values_stand_in_the_run_when_it_ends(config: Config) -> None:
    with tracking.phase_run("align", config) as run:
        for step, loss in enumerate((3.0, 2.0, 1.5)):
            run.log(step, {"step": step, "loss": loss, "pairs_per_s": 10.0 * (step + 1)})
    found = tracking.client().get_run(run.id)
    assert history(run.id, "loss") == [(0, 3.0), (1, 2.0), (2, 1.5)]
    assert found.data.params["align.lr_delta"] == str(config.align.lr_delta) and found.data.params["seed"] == "7"
    assert found.info.status == "FINISHED" and run.problems == []
    described = run.describe(digest="d1")
    assert described == {**described, "run_id": run.id, "phase": "align", "pairs_per_s": 20.0, "digest": "d1"}


def test_logging_does_not_wait_for_mlflow(config: Config) -> None:
    with tracking.phase_run("tune", config) as run:
        start = time.monotonic()
        for step in range(2000):
            run.log(step, {"loss": 1.0, "lr": 1e-3, "pairs_per_s": 5.0})
        assert time.monotonic() - start < 0.5
    assert len(history(run.id, "loss")) == 2000


def test_runs_below_a_parent_nest_under_it(config: Config) -> None:
    with tracking.parent_run("retrain", config) as parent:
        with tracking.phase_run("align", config) as child:
            pass
        assert os.environ[tracking.PARENT] == parent.id
    assert tracking.PARENT not in os.environ
    tags = tracking.client().get_run(child.id).data.tags
    assert tags["mlflow.parentRunId"] == parent.id and tags["kind"] == "phase"


def test_a_killed_phase_goes_on_in_its_run(config: Config) -> None:
    seeded = config.model_copy(update={"seed": 11})
    killed = tracking._start("align", "phase", seeded)  # never ended
    with tracking.phase_run("align", seeded) as run:
        assert run.id == killed.id
    with tracking.phase_run("align", seeded) as again:
        assert again.id != killed.id


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_says_so_and_keeps_its_metrics(config: Config, error: type, status: str) -> None:
    with pytest.raises(error), tracking.phase_run("align", config) as run:
        run.log(1, {"loss": 2.5})
        raise error
    assert tracking.client().get_run(run.id).info.status == status
    assert history(run.id, "loss") == [(1, 2.5)]


def test_a_server_that_is_not_there_stops_the_phase_before_it_trains(monkeypatch, config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    start = time.monotonic()
    for call in (tracking.check, tracking.client, lambda: tracking.phase_run("align", config).__enter__()):
        with pytest.raises(ValueError, match=f"MLflow at {address} cannot be reached .*unset it"):
            call()
    assert time.monotonic() - start < 10


def test_a_server_that_never_answers_stops_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match="timed out"):
            tracking.check()
    assert time.monotonic() - start < 10


def test_an_evaluation_keeps_scores_report_and_pictures_once(config: Config) -> None:
    data = _results()
    first = tracking.log_evaluation(config, num_pictures=1)
    assert tracking.log_evaluation(config, num_pictures=1) == first
    kept = {item.path for item in tracking.client().list_artifacts(first)}
    assert kept == {"metrics.json", "gate.json", "report.html", "pictures"}
    assert [item.path for item in tracking.client().list_artifacts(first, "pictures")] == ["pictures/scenes-0.png"]
    assert tracking.client().get_run(first).data.metrics == {"test/scenes.CIDEr": 2.0, "gate/scenes.CIDEr": 3.0}
    (data / "metrics.json").write_text('{"scenes": {"CIDEr": 2.5}}')
    assert tracking.log_evaluation(config, num_pictures=1) != first


def test_an_evaluation_keeps_the_figures_under_stress_where_there_are_any(config: Config) -> None:
    data = _results()
    (data / "stress.json").write_text('{"scenes": {"curves": {"noise": {"5": {"CIDEr": 1.5, "intervals": {}}}}}}')
    kept = tracking.log_evaluation(config, num_pictures=1)
    assert tracking.log_evaluation(config, num_pictures=1) == kept
    assert tracking.client().get_run(kept).data.metrics["stress/scenes.curves.noise.5.CIDEr"] == 1.5
    assert "stress.json" in {item.path for item in tracking.client().list_artifacts(kept)}


def _results() -> Path:
    data, buffer = Path("data"), io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(buffer, "PNG")
    pairs = [Record(f"p{i}", "scenes", "test", f"g{i}", buffer.getvalue(), buffer.getvalue(), ["a"], "?", "none", {})
             for i in range(3)]
    write_shards(pairs, data / "diffcap", "test", shard_pairs=10)
    (data / "captions/test").mkdir(parents=True)
    (data / "captions/test/scenes.jsonl").write_text(json.dumps({"pair_id": "p0", "prediction": "no change"}) + "\n")
    (data / "metrics.json").write_text('{"scenes": {"CIDEr": 2.0, "floor": {"constant": {"CIDEr": 0.1}}}}')
    (data / "gate.json").write_text('{"scenes": {"CIDEr": 3.0}}')
    (data / "report.html").write_text("<html>")
    return data


def test_a_changed_file_makes_the_commit_dirty_but_the_pipeline_s_own_results_do_not() -> None:
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


def test_a_password_in_the_address_is_not_written_down() -> None:
    assert tracking.without_password("postgresql://me:secret@host/db") == "postgresql://host/db"
    assert tracking.without_password("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_importing_tracking_and_registry_does_not_import_mlflow() -> None:
    code = "import sys, onediff.tracking, onediff.registry; sys.exit('mlflow.version' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


class Guarded(BaseHTTPRequestHandler):
    """Answers as MLflow with basic-auth does: health is open to all, the rest to `me`."""

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


def test_a_server_that_does_not_know_us_says_what_to_set_and_no_password(guarded: str, monkeypatch) -> None:
    told = rf"^MLflow at http://{guarded} does not know us \(401\): set MLFLOW_TRACKING_USERNAME and [^\n]*$"
    with pytest.raises(ValueError, match=told):
        tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:wr0ng@{guarded}")
    with pytest.raises(ValueError, match=told):
        tracking.check()


def test_credentials_come_from_the_address_the_environment_or_a_file(guarded: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{guarded}")
    tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{guarded}")
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/credentials").write_text("[mlflow]\nmlflow_tracking_username = me\n"
                                                  "mlflow_tracking_password = secret\n")
    tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wr0ng")
    with pytest.raises(ValueError, match="does not know us"):
        tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    tracking.check()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server(tmp_path)
    running.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.address)
    yield running
    running.stop()


@pytest.mark.slow
def test_a_server_that_dies_while_training_loses_no_training(server: Server, config: Config, capsys) -> None:
    with tracking.phase_run("align", config) as run:
        run.log(1, {"loss": 2.0})
        assert run._send()
        server.stop()
        run.log(2, {"loss": 1.0})
        trained = "weights"
    assert trained == "weights"
    assert run.describe(digest="d")["run_id"] == run.id
    assert f"MLflow run {run.id} (align) is incomplete: 1 metrics not sent" in capsys.readouterr().err
    server.start()
    assert history(run.id, "loss") == [(1, 2.0)]


@pytest.mark.slow
def test_a_server_that_comes_back_gets_every_metric_once(server: Server, config: Config) -> None:
    with tracking.phase_run("align", config) as run:
        server.stop()
        run.log(1, {"loss": 2.0})
        assert not run._send()
        server.start()
        run.log(2, {"loss": 1.0})
    assert run.problems == []
    assert history(run.id, "loss") == [(1, 2.0), (2, 1.0)]
