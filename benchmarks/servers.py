"""The servers that benchmarks/serving.py measures, each in a separate process.

    python -m benchmarks.servers plain FOLDER --port 8001        # a plain FastAPI handler, one pair at a time
    python -m benchmarks.servers following FILE --port 8002      # serves the model folder that the file names
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import httpx
import uvicorn
from fastapi import FastAPI, UploadFile
from typer import Option, Typer

from onediff.config import Serve
from onediff.serve.http.port import listener

START_S = 180.0  # longest time until a server is ready
HOST = "127.0.0.1"
Port = Annotated[int, Option()]
app = Typer()


@app.command()
def plain(model: Path, port: Port) -> None:
    """Serve a handler of a few lines: it decodes two images and captions them, one request at a time."""
    from onediff.inputs.images import open_image
    from onediff.model.captioner import Captioner

    captioner, served = Captioner.load(model), FastAPI()

    @served.get("/readyz")
    async def readyz() -> str:
        return "ready"

    @served.post("/v1/captions")
    async def captions(before: UploadFile, after: UploadFile) -> dict[str, str]:
        pair = open_image(await before.read()), open_image(await after.read())
        return {"caption": captioner.caption([pair])[0]}

    uvicorn.Server(uvicorn.Config(served, log_level="warning", access_log=False)).run([listener(HOST, port)])


@app.command()
def following(names: Path, port: Port, poll_s: float = 0.5) -> None:
    """Serve the model folder whose path is in the file `names`, and follow changes of the file."""
    from onediff.config import load_runtime
    from onediff.ops.serving import load_version
    from onediff.serve.http.app import create_app
    from onediff.serve.http.server import run
    from onediff.serve.http.service import Service

    service = Service(Serve(poll_s=poll_s), current=lambda: names.read_text(encoding="utf-8"),
                      load=lambda name: load_version(name, name, load_runtime()))
    with listener(HOST, port) as opened:
        run(service, create_app(service), opened)


class Process:
    """A running server: its port, its process id, and the seconds from its start until it was ready."""

    def __init__(self, port: int, pid: int, ready_s: float) -> None:
        self.port, self.pid, self.ready_s = port, pid, ready_s

    def memory_mb(self, key: str = "VmRSS") -> float:
        """Return the resident memory now, or with VmHWM the highest since `forget_peak`, in MB."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        return int(status.partition(f"{key}:")[2].split()[0]) / 1e3

    def forget_peak(self) -> None:
        """Let the highest memory be the memory now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="utf-8")


@contextmanager
def running(*command: str) -> Iterator[Process]:
    """Run `python -m ...` with a free port as its option --port, and wait until it is ready. Stop it at the end."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)], stdout=output, stderr=output,
                                   env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            while not _is_ready(port):
                if process.poll() is not None or time.perf_counter() - start > START_S:
                    output.seek(0)
                    raise ValueError(f"{' '.join(command)}: the server must start, but did not: "
                                     f"{output.read()[-1500:]}")
                time.sleep(0.02)
            yield Process(port, process.pid, time.perf_counter() - start)
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{HOST}:{port}/readyz", trust_env=False, timeout=5).status_code == 200
    return False


def import_seconds(classes: Sequence[str]) -> float:
    """Return the seconds of a process that imports torch and these classes of transformers, and nothing else."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import torch; from transformers import {', '.join(classes)}"], check=True,
                   env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return time.perf_counter() - start


if __name__ == "__main__":
    app()
