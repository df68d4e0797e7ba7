"""Tests of `flows/services`: start, stop, back up and upgrade Prefect, MLflow, PostgreSQL and workers on a machine."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.services import background, databases, postgres, topology
from flows.services.background import Service
from onediff.config import Runtime, load_runtime

REPO = Path(__file__).parents[2]


def free_ports() -> dict[str, int]:
    """Return a free port for each port setting of the services."""
    keys = ("prefect_port", "mlflow_port", "postgres_port")
    sockets = [socket.socket() for _ in keys]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = {key: item.getsockname()[1] for key, item in zip(keys, sockets, strict=True)}
    for item in sockets:
        item.close()
    return ports


def sleeper(folder: Path, command: str = "sleep 60") -> Service:
    """Return a service that runs a shell command and never becomes healthy."""
    return Service("sleeper", ["sh", "-c", command], dict(os.environ), folder, "nowhere", None, refuse)


def refuse() -> None:
    """Fail like the health check of a service that does not answer."""
    raise ValueError("Connection refused")


@pytest.fixture
def sqlite_stack(tmp_path: Path) -> topology.Stack:
    """A folder of services with SQLite, none of which is running; each database contains one row."""
    runtime = Runtime.model_validate({"services": {"folder": str(tmp_path / "services"), "database": "sqlite"}})
    stack = topology.load_stack(runtime)
    topology.begin(stack)
    for name in postgres.DATABASES:
        write_rows(stack, name, ["old"])
    return stack


def write_rows(stack: topology.Stack, name: str, rows: list[str]) -> None:
    with closing(sqlite3.connect(stack.folder / f"databases/{name}.db")) as opened, opened:
        opened.execute("create table if not exists kept (what text)")
        opened.executemany("insert into kept values (?)", [(row,) for row in rows])


def read_rows(stack: topology.Stack, name: str) -> list[str]:
    with closing(sqlite3.connect(stack.folder / f"databases/{name}.db")) as opened:
        return [row[0] for row in opened.execute("select what from kept")]


def test_all_processes_of_a_service_are_ended_even_if_the_first_process_was_killed(tmp_path: Path) -> None:
    background.launch(sleeper(tmp_path, "sleep 61 & sleep 62 & wait"), tmp_path)
    leader = background.running(tmp_path, "sleeper")
    while len(members := background.family(tmp_path, "sleeper")) < 3:
        time.sleep(0.05)
    leader.kill()
    leader.wait()
    assert background.running(tmp_path, "sleeper") is None
    assert len(background.family(tmp_path, "sleeper")) == 2
    assert background.end(tmp_path, "sleeper", grace_s=5) is True
    assert not [process for process in members if process.is_running() and process.status() != "zombie"]
    assert background.end(tmp_path, "sleeper") is False


def test_a_process_that_got_the_pid_of_an_ended_service_is_not_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        background.pid_file(tmp_path, "mlflow").parent.mkdir()
        background.pid_file(tmp_path, "mlflow").write_text(json.dumps({"pid": other.pid, "born": 12345.0}))
        assert background.running(tmp_path, "mlflow") is None
        assert background.end(tmp_path, "mlflow", grace_s=1) is False
        assert other.poll() is None
        other.kill()


def test_a_service_that_ends_or_does_not_answer_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    service = sleeper(tmp_path, "echo no such column; exit 3")
    background.launch(service, tmp_path)
    with pytest.raises(ValueError, match=r"sleeper ended at once; .*ends with:\n(.*\n)*  \| no such column"):
        background.wait_until_it_answers(service, tmp_path, 20)
    service = sleeper(tmp_path)
    background.launch(service, tmp_path)
    with pytest.raises(ValueError, match=r"sleeper does not answer after 0 s \(Connection refused\)"):
        background.wait_until_it_answers(service, tmp_path, 0.3)
    background.end(tmp_path, "sleeper", grace_s=5)


def test_the_lock_file_of_a_killed_postgres_is_removed_while_its_process_is_a_zombie(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "postgres").symlink_to(shutil.which("sleep") or "")
    (tmp_path / "pgpass").touch()
    lock = tmp_path / "postgres/postmaster.pid"
    server = subprocess.Popen([str(tmp_path / "postgres/postgres"), "600"])
    while psutil.Process(server.pid).name() != "postgres":
        time.sleep(0.05)
    lock.write_text(f"{server.pid}\n/data\n")
    postgres.prepare(tmp_path)
    assert lock.exists()
    server.kill()
    while psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    postgres.prepare(tmp_path)
    assert not lock.exists()
    server.wait()


def test_the_error_about_a_port_in_use_suggests_another_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use: .* services: {{mlflow_port: {port + 1000}}}"):
            background.check_port_is_free(port, "mlflow_port")
    background.check_port_is_free(port, "mlflow_port")


def test_addresses_and_commands_of_services_contain_no_password(monkeypatch: pytest.MonkeyPatch,
                                                                sqlite_stack: topology.Stack) -> None:
    monkeypatch.setenv(topology.MLFLOW_PASSWORD, "secret-of-mlflow")
    monkeypatch.setenv(topology.PREFECT_LOGIN, "admin:secret-of-prefect")
    stack = topology.Stack(sqlite_stack.folder, sqlite_stack.runtime, "postgresql")
    assert stack.database_address("mlflow") == "postgresql+psycopg2://onediff@127.0.0.1:5433/mlflow"
    texts = [stack.database_address("prefect"), topology.shell_lines(stack)]
    for service in (*topology.servers(stack), *topology.workers(stack)):
        texts += [*service.command, service.address]
    assert "secret-of" not in " ".join(texts)
    assert "${ONEDIFF_MLFLOW_ADMIN_PASSWORD:?}" in topology.shell_lines(stack)


def test_flows_of_a_worker_get_the_servers_addresses_but_no_database_settings(monkeypatch: pytest.MonkeyPatch,
                                                                              sqlite_stack: topology.Stack) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "of another server")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    stack = topology.Stack(sqlite_stack.folder, sqlite_stack.runtime, "postgresql")
    env = topology.workers(stack)[0].env
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:4200/api" and env["MLFLOW_TRACKING_URI"] == stack.mlflow
    assert "PREFECT_API_KEY" not in env and env["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert not {"PGPASSFILE", "MLFLOW_BACKEND_STORE_URI", "PREFECT_SERVER_DATABASE_CONNECTION_URL"} & env.keys()


def test_workers_serve_the_gpu_pool_only_if_the_device_is_cuda() -> None:
    assert topology.pools(Runtime(device="cuda")) == ["onediff-cpu", "onediff-gpu"]
    assert topology.pools(Runtime(device="cpu")) == ["onediff-cpu"]


def test_a_services_folder_keeps_its_kind_of_database(sqlite_stack: topology.Stack) -> None:
    folder = str(sqlite_stack.folder)
    assert topology.load_stack(Runtime.model_validate({"services": {"folder": folder}})).database == "sqlite"
    with pytest.raises(ValueError, match=r"services.database is postgresql, but .* already has a sqlite"):
        topology.load_stack(Runtime.model_validate({"services": {"folder": folder, "database": "postgresql"}}))


@pytest.mark.skipif(os.geteuid() != 0 or postgres.binaries() is None, reason="needs root and PostgreSQL")
def test_a_folder_that_user_postgres_cannot_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    runtime = {"services": {"folder": str(tmp_path / "services"), "database": "postgresql"}}
    with pytest.raises(ValueError, match=rf"user 'postgres' has no access to {tmp_path}: set services.folder"):
        topology.load_stack(Runtime.model_validate(runtime))


def test_a_server_that_had_a_password_is_not_started_without_a_password(monkeypatch: pytest.MonkeyPatch,
                                                                        sqlite_stack: topology.Stack) -> None:
    monkeypatch.setenv(topology.PREFECT_LOGIN, "admin:secret-of-prefect")
    topology.begin(sqlite_stack)
    monkeypatch.delenv(topology.PREFECT_LOGIN)
    with pytest.raises(ValueError, match="was protected by PREFECT_SERVER_API_AUTH_STRING before"):
        topology.begin(sqlite_stack)


def test_a_second_start_is_refused_while_another_one_is_running(tmp_path: Path) -> None:
    refusal = "another start, stop, backup or restore is running"
    with topology.exclusive(tmp_path), pytest.raises(ValueError, match=refusal), topology.exclusive(tmp_path):
        pass


def test_an_environment_variable_configures_the_services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONEDIFF_SERVICES", "{mlflow_port: 5001}")
    assert load_runtime(tmp_path / "runtime.yaml").services.mlflow_port == 5001
    monkeypatch.setenv("ONEDIFF_SERVICES", "{mlflow_prot: 5001}")
    with pytest.raises(ValueError, match=r"services.mlflow_prot: unknown key; did you mean 'mlflow_port'"):
        load_runtime(tmp_path / "runtime.yaml")


def test_a_restore_gives_the_rows_of_the_time_of_the_backup(sqlite_stack: topology.Stack, tmp_path: Path) -> None:
    databases.backup(sqlite_stack, tmp_path / "kept")
    for name in postgres.DATABASES:
        write_rows(sqlite_stack, name, ["new"])
    assert "restored the backup of" in databases.restore(sqlite_stack, tmp_path / "kept")
    assert [read_rows(sqlite_stack, name) for name in postgres.DATABASES] == [["old"], ["old"]]
    with pytest.raises(ValueError, match="is not empty: choose a new folder"):
        databases.backup(sqlite_stack, tmp_path / "kept")


def test_a_damaged_or_unsuitable_backup_is_refused_and_changes_nothing(sqlite_stack: topology.Stack,
                                                                       tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    databases.backup(sqlite_stack, kept)
    write_rows(sqlite_stack, "prefect", ["new"])
    with (kept / "mlflow.db").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"mlflow.db is missing or differs from its digest in manifest.json"):
        databases.restore(sqlite_stack, kept)
    manifest = json.loads((kept / "manifest.json").read_text())
    (kept / "manifest.json").write_text(json.dumps({**manifest, "database": "postgresql"}))
    with pytest.raises(ValueError, match=r"is a backup of postgresql, but .* uses sqlite"):
        databases.restore(sqlite_stack, kept)
    with pytest.raises(FileNotFoundError, match="is not a complete backup"):
        databases.restore(sqlite_stack, tmp_path)
    assert read_rows(sqlite_stack, "prefect") == ["old", "new"]


def test_a_restore_that_was_killed_is_undone_by_the_next_start(sqlite_stack: topology.Stack) -> None:
    folder = sqlite_stack.folder
    (folder / "databases").rename(folder / "databases.old")
    (folder / "databases.new").mkdir()
    topology.begin(sqlite_stack)
    assert read_rows(sqlite_stack, "mlflow") == ["old"]
    assert not list(folder.glob("databases.*"))


class RunningServices:
    """Real services in a separate folder, which the tests control with the command line `python -m flows.services`."""

    def __init__(self, database: str, folder: Path, **env: str) -> None:
        self.database, self.folder, self.ports = database, folder, free_ports()
        settings = {"folder": str(folder / "services"), "database": database, **self.ports}
        self.env = {**os.environ, "PYTHONPATH": str(REPO), "ONEDIFF_SERVICES": json.dumps(settings), **env}

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m flows.services` with these arguments."""
        return subprocess.run([sys.executable, "-m", "flows.services", *arguments], cwd=self.folder, env=self.env,
                              capture_output=True, text=True, check=False)

    def run(self, *arguments: str) -> str:
        """Run `python -m flows.services` and return what it prints; fail if the command fails."""
        done = self.command(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the status of every service by name."""
        return {row["name"]: row for row in json.loads(self.command("status", "--json").stdout)}

    def ask(self, service: str, path: str, body: dict[str, Any] | None = None, login: str | None = None) -> Any:
        """Send a request to the API of `prefect` or `mlflow` and return the decoded answer.

        With `body` the request is a POST. `login` is USER:PASSWORD.
        """
        base = {"prefect": f"http://127.0.0.1:{self.ports['prefect_port']}/api/",
                "mlflow": f"http://127.0.0.1:{self.ports['mlflow_port']}/api/2.0/mlflow/"}[service]
        request = urllib.request.Request(base + path, None if body is None else json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        if login:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def create(self, name: str) -> None:
        """Create an MLflow experiment and a Prefect variable with this name."""
        self.ask("mlflow", "experiments/create", {"name": name})
        self.ask("prefect", "variables/", {"name": name, "value": 1})

    def created(self) -> tuple[set[str], set[str]]:
        """Return the names of all MLflow experiments and of all Prefect variables that `create` made."""
        runs = self.ask("mlflow", "experiments/search", {"max_results": 100})["experiments"]
        return ({item["name"] for item in runs} - {"Default"},
                {item["name"] for item in self.ask("prefect", "variables/filter", {})})


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def services(request: pytest.FixtureRequest) -> Iterator[RunningServices]:
    if request.param == "postgresql" and postgres.binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    # The user `postgres` has no access to tmp_path.
    folder = Path(tempfile.mkdtemp(prefix="onediff-services-"))
    folder.chmod(0o755)
    running = RunningServices(request.param, folder)
    try:
        print(running.run("start"))
        yield running
    finally:
        running.command("stop")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_all_services_are_healthy_and_a_second_start_starts_none_of_them_again(services: RunningServices) -> None:
    before = services.rows()
    assert all(row["healthy"] and row["running"] and row["database"] == services.database for row in before.values())
    assert list(before)[-3:] == ["prefect", "mlflow", "onediff-cpu"]
    assert "all services run" in services.run("start")
    assert {name: row["pid"] for name, row in services.rows().items()} == {
        name: row["pid"] for name, row in before.items()}
    assert "MLFLOW_TRACKING_URI=http://127.0.0.1:" in (services.folder / "services/env").read_text()


@pytest.mark.slow
def test_a_killed_service_is_reported_and_starts_again_with_its_data(services: RunningServices) -> None:
    services.create("before_the_kills")
    for name in services.rows():
        before = services.rows()
        psutil.Process(before[name]["pid"]).send_signal(signal.SIGKILL)
        while services.rows()[name]["running"]:
            time.sleep(0.1)
        assert services.command("status").returncode == 1
        assert f"\n--  {name}" in f"\n{services.command('status').stdout}"
        assert name in services.run("start").split(" started in ")[0]
        after = services.rows()
        assert all(row["healthy"] for row in after.values()), after
        assert [other for other in after if after[other]["pid"] != before[other]["pid"]] == [name]
        assert services.created() == ({"before_the_kills"}, {"before_the_kills"})


@pytest.mark.slow
def test_a_backup_of_running_services_can_be_restored_only_while_they_are_stopped(services: RunningServices) -> None:
    kept, state = services.folder / "kept", services.created()
    services.run("backup", str(kept))
    services.create("after_the_backup")
    refused = services.command("restore", str(kept))
    assert refused.returncode == 1 and "the prefect server is running: run 'make services-stop'" in refused.stderr
    services.run("stop")
    services.run("restore", str(kept))
    services.run("start")
    assert services.created() == state


@pytest.mark.slow
def test_an_upgrade_keeps_the_data_and_makes_a_backup_first(services: RunningServices) -> None:
    state = services.created()
    assert "is running: run 'make services-stop', then make upgrade" in services.command("upgrade").stderr
    services.run("stop")
    stdout = services.run("upgrade")
    assert "mlflow: schema of version" in stdout and "prefect: schema of version" in stdout
    assert len(list((services.folder / "services/backups").glob("*/manifest.json"))) == 1
    services.run("start")
    assert services.created() == state


@pytest.mark.slow
def test_the_mlflow_server_stores_artifacts_in_the_services_folder(services: RunningServices) -> None:
    code = ("from mlflow import MlflowClient\nimport sys\nc = MlflowClient()\n"
            "run = c.create_run(c.create_experiment('with_artifact'))\nc.log_text(run.info.run_id, 'hello', 'a.txt')\n")
    address = f"http://127.0.0.1:{services.ports['mlflow_port']}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=services.folder,
                   env={**services.env, "MLFLOW_TRACKING_URI": address})
    kept = list((services.folder / "services/mlflow/artifacts").rglob("a.txt"))
    assert [path.read_text() for path in kept] == ["hello"]


@pytest.mark.slow
def test_runs_marked_as_deleted_are_purged_with_their_artifacts(services: RunningServices, monkeypatch) -> None:
    monkeypatch.setenv("ONEDIFF_SERVICES", services.env["ONEDIFF_SERVICES"])
    stack = topology.load_stack(load_runtime())
    [run] = services.ask("mlflow", "runs/search", {"experiment_ids": [services.ask(
        "mlflow", "experiments/get-by-name?experiment_name=with_artifact")["experiment"]["experiment_id"]]})["runs"]
    services.ask("mlflow", "runs/delete", {"run_id": run["info"]["run_id"]})
    assert databases.purge(stack, [run["info"]["run_id"]]) == "1 runs are gone from the MLflow server for good"
    assert not list((services.folder / "services/mlflow/artifacts").rglob("a.txt"))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        services.ask("mlflow", f"runs/get?run_id={run['info']['run_id']}")


FLOW = """
import os, time
from pathlib import Path
from prefect import flow

@flow
def wait(folder: str) -> None:
    Path(folder, "seen.part").write_text(f"{os.getpid()} {os.environ['MLFLOW_TRACKING_URI']}")
    Path(folder, "seen.part").rename(Path(folder, "seen"))
    time.sleep(300)
"""
DEPLOY = """
import sys
from prefect import flow
from prefect.deployments import run_deployment

flow.from_source(sys.argv[1], "waiting.py:wait").deploy("wait", work_pool_name="onediff-cpu", print_next_steps=False)
run_deployment("wait/wait", parameters={"folder": sys.argv[1]}, timeout=0)
"""


@pytest.mark.slow
def test_a_flow_uses_the_mlflow_server_survives_its_worker_and_ends_at_stop(services: RunningServices) -> None:
    folder = services.folder / "flow"
    folder.mkdir()
    (folder / "waiting.py").write_text(FLOW)
    env = {**services.env, "PREFECT_API_URL": f"http://127.0.0.1:{services.ports['prefect_port']}/api"}
    subprocess.run([sys.executable, "-c", DEPLOY, str(folder)], check=True, env=env, capture_output=True)
    deadline = time.monotonic() + 120
    while not (folder / "seen").exists():
        assert time.monotonic() < deadline, "the worker did not start the flow within 120 seconds"
        time.sleep(0.5)
    pid, address = (folder / "seen").read_text().split()
    assert address == f"http://127.0.0.1:{services.ports['mlflow_port']}"
    worker = psutil.Process(services.rows()["onediff-cpu"]["pid"])
    worker.kill()
    while services.rows()["onediff-cpu"]["running"]:
        time.sleep(0.1)
    services.run("start")
    assert psutil.pid_exists(int(pid))
    assert "onediff-cpu" in services.run("stop")
    assert not psutil.pid_exists(int(pid))
    services.run("start")


@pytest.mark.slow
def test_a_start_with_a_port_in_use_fails_and_leaves_no_service_running(services: RunningServices) -> None:
    services.run("stop")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", services.ports["mlflow_port"]))
        taken.listen()
        refused = services.command("start")
    assert refused.returncode == 1 and f"port {services.ports['mlflow_port']} is in use" in refused.stderr
    assert not [name for name, row in services.rows().items() if row["running"]]


@pytest.mark.slow
def test_logs_command_lines_and_public_files_contain_no_password(services: RunningServices) -> None:
    """This test comes last, so that it reads the logs of everything that the tests before it did."""
    services.run("start")
    hidden = [(services.folder / "services/flask_key").read_text()]
    if services.database == "postgresql":
        hidden.append((services.folder / "services/pgpass").read_text().strip().rpartition(":")[2])
    logs = "".join(path.read_text(errors="replace") for path in (services.folder / "services/logs").iterdir())
    commands = " ".join(" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    for secret in hidden:
        assert len(secret) > 30 and secret not in logs and secret not in commands
    files = [path for path in (services.folder / "services").iterdir() if path.is_file()]
    open_to_others = [path.read_text() for path in files if path.stat().st_mode & 0o077]
    assert not [secret for secret in hidden if secret in "".join(open_to_others)]


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_servers_with_passwords_accept_only_requests_with_the_password(database: str) -> None:
    if database == "postgresql" and postgres.binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    secrets = {topology.MLFLOW_PASSWORD: "a-secret-of-mlflow", topology.PREFECT_LOGIN: "admin:a-secret-of-prefect"}
    folder = Path(tempfile.mkdtemp(prefix="onediff-services-"))
    folder.chmod(0o755)
    services = RunningServices(database, folder, **secrets)
    without = {key: value for key, value in services.env.items() if key not in secrets}
    try:
        services.run("start")
        assert all(row["healthy"] for row in services.rows().values())  # The worker has the passwords, too.
        for service, path, login in (("mlflow", "experiments/search?max_results=1", "admin:a-secret-of-mlflow"),
                                     ("prefect", "admin/version", "admin:a-secret-of-prefect")):
            for wrong in (None, "admin:a-guess"):
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    services.ask(service, path, login=wrong)
            assert services.ask(service, path, login=login)
        status = subprocess.run([sys.executable, "-m", "flows.services", "status"], env=without, cwd=folder,
                              capture_output=True, text=True, check=False)
        assert status.returncode == 1
        assert f"the server requires credentials: set {topology.MLFLOW_PASSWORD}" in status.stdout
        address = f"http://127.0.0.1:{services.ports['mlflow_port']}"
        refused = subprocess.run([sys.executable, "-c", "from onediff import tracking; tracking.client()"], cwd=folder,
                                 env={**without, "MLFLOW_TRACKING_URI": address}, capture_output=True, text=True,
                                 check=False)
        message = refused.stderr.splitlines()[-1]
        assert re.match(f"ValueError: MLflow at {address} .*(401|credentials|password)", message)
        written = [path for path in (folder / "services").rglob("*") if path.is_file()]
        assert len(written) > 10 and not [path for path in written if b"a-secret-of" in path.read_bytes()]
    finally:
        services.command("stop")
        shutil.rmtree(folder)
