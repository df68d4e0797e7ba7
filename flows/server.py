"""Prefect's temporary server, for flows that run where PREFECT_API_URL names no server.

Prefect starts its temporary server in the flow's own process group. There Ctrl-C ends the server first, and the flow
then waits minutes for it. This server has a session of its own, where no signal of a terminal reaches it. It ends when
the pipe on its standard input is closed, which the kernel does when the flow's process ends, whatever ended it.
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

START = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}  # as Prefect does
END_S = 3.0  # from SIGTERM to SIGKILL: all that it keeps is in a database that survives both


@contextmanager
def temporary_server() -> Iterator[None]:
    """Flows in the block have a server. It lives until this process ends: Prefect sends its last events at exit.

    Raises ValueError if the server does not answer in time.
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
    with temporary_settings({PREFECT_API_URL: url, PREFECT_UI_URL: ""}):  # it shows no pages
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
        except httpx.TransportError:  # it has ended, or takes longer than that
            time.sleep(0.1)
    raise ValueError(f"Prefect's temporary server did not answer within {limit_s:.0f} s; {log} says why. Name another "
                     "server in PREFECT_API_URL, or set PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS higher")


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
