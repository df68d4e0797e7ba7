"""A temporary Prefect server for flows, used when PREFECT_API_URL is not set.

Prefect's own temporary server runs in the process group of the flow, so Ctrl-C ends the server first, and the flow then
waits minutes for an answer. The server of this module runs in a separate session, which a terminal sends no signals to.
It ends when the pipe on its standard input closes; the kernel closes the pipe when the flow's process ends.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onediff import interrupts

# Environment variables of the temporary server; Prefect sets the same variables when it starts such a server itself.
START = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
END_S = 3.0  # seconds that the server gets between SIGTERM and SIGKILL; its database survives SIGKILL


@contextmanager
def temporary_server() -> Iterator[None]:
    """Start a temporary Prefect server for the flows inside the `with` block, unless PREFECT_API_URL is set.

    The server runs until this process ends, because Prefect sends its last events at exit. Raises ValueError if the
    server does not answer in time.
    """
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        PREFECT_UI_URL,
        temporary_settings,
    )

    if PREFECT_API_URL.value():
        yield
        return
    url = _start(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    with temporary_settings({PREFECT_API_URL: url, PREFECT_UI_URL: ""}):  # The temporary server needs no web pages.
        yield


def _start(limit_s: float) -> str:
    import httpx

    log = Path(os.environ["PREFECT_HOME"]) / "server.log"
    with socket.create_server(("127.0.0.1", 0)) as listener, log.open("ab") as output:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        command = [sys.executable, "-m", "flows.server", str(listener.fileno())]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                                  pass_fds=[listener.fileno()], env=os.environ | START)
    atexit.register(_end, server)
    last = time.monotonic() + limit_s
    while server.poll() is None and time.monotonic() < last:
        try:
            if httpx.get(f"{url}/health", timeout=limit_s, trust_env=False).is_success:
                return url
        except httpx.TransportError:  # The server has ended or does not listen yet.
            time.sleep(0.1)
    raise ValueError(f"Prefect's temporary server did not answer within {limit_s:.0f} s; {log} contains the reason. "
                     "Set PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to a larger number, or PREFECT_API_URL to "
                     "the address of a running server")


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(END_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _end_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os._exit(1)


if __name__ == "__main__":
    import uvicorn

    interrupts.handle_as_python_does()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
