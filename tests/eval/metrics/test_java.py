from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest

from onediff.eval.metrics import words
from onediff.eval.metrics.java import Program, error_line
from onediff.eval.metrics.meteor import Meteor, _command

SCORES = ("from onediff.eval.metrics.catalog import FAST_METRICS, METRICS\n"
          "from onediff.eval.metrics.compute import start, score\n"
          "import psutil, sys, os, signal, time\n"
          "start(METRICS if 'METEOR' in sys.argv else FAST_METRICS)\n"
          "predictions, references = {'a': 'a cat', 'b': 'x'}, {'a': ['a cat'], 'b': ['y']}\n"
          "score(predictions, references, metrics=FAST_METRICS)\n"
          "print(*[child.pid for child in psutil.Process().children()], flush=True)\n")


def tokenizer(timeout_s: float = 60.0) -> Program:
    return Program("the PTB tokenizer", words._command, timeout_s=timeout_s)


def pids_of(program: Program) -> list[int]:
    return [copy.process.pid for copy in program._copies]


def all_ended(pids: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def run_and_end(code: str, *metrics: str) -> tuple[list[int], int]:
    """Run SCORES and then `code` in a new process; return the ids of its Java programs and its exit code."""
    done = subprocess.run([sys.executable, "-c", SCORES + code, *metrics], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, timeout=120, check=False)
    return [int(pid) for pid in done.stdout.split()], done.returncode


@pytest.mark.parametrize(("code", "exits_with"), [
    ("", 0), ("raise RuntimeError", 1), ("sys.exit(3)", 3), ("os._exit(4)", 4),
    ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -15), ("os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_java_ends_with_the_process_in_every_case(code: str, exits_with: int) -> None:
    pids, returned = run_and_end(code)
    assert (len(pids), returned) == (1, exits_with)
    assert all_ended(pids, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "exits_with", "within_s"), [
    # After SIGKILL, METEOR first finishes loading the paraphrase table before it notices that its input has ended.
    ("", 0, 10), ("os.kill(os.getpid(), signal.SIGKILL)", -9, 120)])
def test_meteor_ends_with_the_process(code: str, exits_with: int, within_s: float) -> None:
    pids, returned = run_and_end(code, "METEOR")
    assert (len(pids), returned) == (2, exits_with)
    assert all_ended(pids, within_s)


def test_a_forked_child_does_not_use_the_java_of_the_parent_or_keep_it_alive() -> None:
    code = ("pid = os.fork()\n"
            "if pid == 0:\n"
            "    print(score(predictions, references, metrics=FAST_METRICS).corpus['BLEU-1'] > 0, flush=True)\n"
            "    os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)\n"
            "os.wait()")
    process = subprocess.Popen([sys.executable, "-c", SCORES + code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    try:
        assert process.stdout.readline() == "True\n"
        assert process.wait(30) == -9
        assert all_ended(pids, 30)  # Java ends although the child process still sleeps.
    finally:
        for child in psutil.process_iter(["cmdline"]):
            if child.info["cmdline"] and child.info["cmdline"][-1] == SCORES + code:
                child.kill()


def test_a_killed_java_program_is_an_error_and_the_next_call_starts_a_new_one() -> None:
    with closing(tokenizer()) as program:
        assert program.ask(["A cat"]) == ["a cat"]
        first = pids_of(program)
        lines = [f"a red cat no {i}" for i in range(300_000)]
        threading.Timer(0.2, lambda: os.kill(first[0], signal.SIGKILL)).start()
        with pytest.raises(ValueError, match=r"the PTB tokenizer: Java must answer all of 300000 lines"):
            program.ask(lines)
        assert all_ended(first, 1)
        assert program.ask(["A dog"]) == ["a dog"]
        assert pids_of(program) != first
        os.kill(pids_of(program)[0], signal.SIGKILL)  # This kill happens between two calls.
        time.sleep(0.2)
        assert program.ask(["A bird"]) == ["a bird"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Handle Ctrl-C like an interactive process, because a shell makes background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_does_not_mix_up_later_answers(interruptible: None) -> None:
    with closing(tokenizer()) as program:
        program.ask(["A cat"])
        lines = [f"a red cat no {i}" for i in range(300_000)]
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()
            program.ask(lines)
        assert program.ask(["A dog", "a bird"]) == ["a dog", "a bird"]


def test_a_java_program_that_does_not_answer_is_killed_and_reported() -> None:
    with closing(tokenizer()) as program:
        program.ask(["A cat"])
        os.kill(pids_of(program)[0], signal.SIGSTOP)
        first, program.timeout_s = pids_of(program), 2
        with pytest.raises(ValueError, match=r"Java must answer within 2 s"):
            program.ask(["A dog"])
        assert all_ended(first, 1)
        program.timeout_s = 60
        assert program.ask(["A dog"]) == ["a dog"]
    slow = Meteor(timeout_s=0.2)
    with closing(slow.program), pytest.raises(ValueError, match=r"METEOR: Java must answer within 0.2 s"):
        slow.score([("a cat", ["a dog"])])


def test_lines_longer_than_all_buffers_do_not_block() -> None:
    with closing(tokenizer()) as program:
        lines = ["cat " * 100_000, "dog " * 100_000] * 3
        assert program.ask(lines) == [line.strip() for line in lines]


def test_each_thread_gets_the_answers_to_its_own_lines() -> None:
    answers: dict[int, list[str]] = {}
    with closing(tokenizer()) as program:
        def ask(thread: int) -> None:
            for turn in range(20):
                answers[thread] = program.ask([f"thread {thread} turn {turn} line {i}" for i in range(50)])

        threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {thread: [f"thread {thread} turn 19 line {i}" for i in range(50)] for thread in range(4)}


def test_close_ends_the_process_and_closes_files_and_may_be_called_twice() -> None:
    process = psutil.Process()
    before = process.num_fds()
    with closing(tokenizer()) as program:
        program.ask(["a cat"])
        pids = pids_of(program)
        program.close()
        program.close()
        assert pids_of(program) == []
    assert all_ended(pids, 1)
    assert process.num_fds() == before


def test_close_in_another_thread_ends_a_waiting_call() -> None:
    with closing(Program("METEOR", _command)) as program:
        threading.Timer(0.3, program.close).start()
        with pytest.raises(ValueError, match="Java must answer all of 1 lines, but ended"):
            program.ask(["SCORE ||| a ||| a"])


def test_java_on_path_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    with closing(tokenizer()) as program:
        assert program.ask(["A cat"]) == ["a cat"]


def test_the_error_line_is_the_message_of_java_and_not_the_stack_trace() -> None:
    trace = b'loading\nException in thread "main" java.lang.OutOfMemoryError: Java heap space\n\tat Meteor.main\n'
    assert error_line(trace) == 'Exception in thread "main" java.lang.OutOfMemoryError: Java heap space'
    assert (error_line(b"one\ntwo\n"), error_line(b"")) == ("two", "no message")
