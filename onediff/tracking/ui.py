"""`python -m onediff.tracking.ui [PORT]`: show MLflow's web page for the runs and versions of this project.

The server runs until Ctrl-C. It starts without background jobs and sends no telemetry. `make ui` calls this module.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

from onediff import interrupts
from onediff.tracking.connection import EXPERIMENT, SERVER, experiment_id, quiet, uri, where

PORT = 5000
START_S = 120.0
END_S = 5.0
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_SERVE_ARTIFACTS": "true",
               "PYTHONWARNINGS": "ignore"}


def show(port: int = PORT) -> None:
    """Start an MLflow server for the project's database, print its address and run it until Ctrl-C.

    If the project already uses an MLflow server, only print the address of that server. Raises ValueError if the
    database does not answer, if another program uses the port, or if the server ends by itself.
    """
    address = uri()
    if address.startswith(SERVER):
        print(f"MLflow is already a server: open {where()} in a browser")
        return
    experiment = experiment_id()  # Raises ValueError if the database does not answer; creates a missing SQLite file.
    _check_port(port)
    quiet()
    # The database address may contain a password, so it is not on the command line, which other users can read.
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--uvicorn-opts", "--log-level warning"],
        env={**os.environ, **ENVIRONMENT, "MLFLOW_BACKEND_STORE_URI": address}, stdout=subprocess.DEVNULL,
        start_new_session=True)
    try:
        page = f"http://127.0.0.1:{port}"
        _wait_for(page, server)
        # Without `workflowType`, a browser that opens MLflow for the first time shows a page for chat traces.
        print(f"MLflow shows {where()}. Open in a browser:\n"
              f"  runs      {page}/#/experiments/{experiment}/runs?workflowType=machine_learning\n"
              f"  versions  {page}/#/models/{EXPERIMENT}?workflowType=machine_learning\n"
              "Ctrl-C ends the server.", flush=True)
        server.wait()
        raise ValueError(f"the MLflow server ended with exit code {server.returncode}; see the message above")
    except KeyboardInterrupt:
        print()
    finally:
        _end(server)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} of this machine must be free for MLflow's page, got: {error.strerror}; "
                             f"choose another one: 'make ui PORT={port + 1}'") from None


def _wait_for(page: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the MLflow server answers. Raises ValueError if it ends or does not answer within START_S seconds."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(f"{page}/health", timeout=5).close()
            return
        time.sleep(0.2)
    reason = "does not answer" if server.poll() is None else f"ended with exit code {server.returncode}"
    raise ValueError(f"the MLflow server at {page} must answer within {START_S:.0f} s, but it {reason}; see the "
                     "message above")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the MLflow server and its worker process, which are in one process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(END_S)
    server.wait()


def main() -> None:
    """Run the command line: the first argument is the port."""
    interrupts.raise_keyboard_interrupt(4 * END_S)
    try:
        show(*map(int, sys.argv[1:2]))
    except (ValueError, OSError) as error:
        sys.exit(f"onediff: {error}")


if __name__ == "__main__":
    main()
