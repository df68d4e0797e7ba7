"""Run the application with uvicorn: load the model while the port is open, and end cleanly on Ctrl-C."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from onediff.interrupts import Stop, postponed
from onediff.serve.http.connections import Connection
from onediff.serve.http.service import Service

KEEP_ALIVE_S = 75  # seconds for which an idle connection stays open, so that clients rarely meet a closed one
DRAIN_S = 25  # seconds in which requests in progress may end after the signal to stop; Docker kills after 30 seconds


class Server(uvicorn.Server):
    """A uvicorn server that ends without a stack trace on SIGINT, SIGTERM and SIGHUP."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop the server at the first signal. uvicorn's own method sends the signal again after the server's end."""
        with postponed(_StopServer(server=self)):
            yield


@dataclass(kw_only=True)
class _StopServer(Stop):
    server: uvicorn.Server

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Let the server end its requests at the first signal. A second signal ends the process at once."""
        if self.reason:
            os._exit(128 + number)
        super().ask(number, frame)
        self.server.should_exit = True


def server_of(app: FastAPI) -> Server:
    """Return the server of an application. Its method `run` gets the open sockets.

    uvicorn's warnings are not logged, because they are about invalid requests, so that a client could fill the log.
    """
    return Server(uvicorn.Config(app, http=Connection, ws="none", lifespan="on", log_config=None,
                                 log_level=logging.ERROR, access_log=False, server_header=False,
                                 timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=DRAIN_S))


def run(service: Service, app: FastAPI, opened: socket.socket) -> None:
    """Serve on an open socket until SIGINT, SIGTERM or SIGHUP, then let the requests in progress end.

    Raises the error of the first version if it cannot be loaded.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("onediff.serve").setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # It would log a warning for each invalid form.
    server = server_of(app)

    def stop() -> None:
        server.should_exit = True

    service.give_up = stop
    server.run(sockets=[opened])
    if service.failure is not None:
        raise service.failure
