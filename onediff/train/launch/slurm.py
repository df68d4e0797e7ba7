"""A Slurm job of all ranks: submitted once, watched, found again by its number, told to write its checkpoint."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from onediff.config import Runtime
from onediff.interrupts import Stop, postponed
from onediff.train.launch.ranks import GRACE_S
from onediff.train.launch.status import read_status

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
         "PREEMPTED", "REVOKED", "SPECIAL_EXIT", "UNKNOWN")
SHOWN = 20  # last lines of a failed job's output


def script(runtime: Runtime, module: str, folder: Path) -> str:
    """What sbatch runs. As many tasks on each node as GPUs, with the ranks that Slurm numbers them by."""
    asked = runtime.slurm
    cpu = runtime.device == "cpu"
    options = [f"--job-name={folder.name}", f"--nodes={runtime.nodes}", f"--ntasks-per-node={runtime.gpus}",
               *([] if cpu else [f"--gpus-per-node={runtime.gpus}"]),
               *([f"--partition={asked.partition}"] if asked.partition else []),
               *([f"--account={asked.account}"] if asked.account else []),
               f"--time={asked.time}", f"--signal=TERM@{max(GRACE_S, runtime.grace_s):.0f}", "--requeue",
               "--open-mode=append", f"--output={folder.absolute()}/slurm-%j.out", f"--chdir={Path.cwd()}",
               *asked.options]
    template = files("onediff.train.launch").joinpath("job.sh.j2").read_text(encoding="utf-8")
    page = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(template)
    return page.render(options=options, master=runtime.master_addr, port=runtime.master_port, cpu=cpu,
                       command=shlex.join([sys.executable, "-u", "-m", module]))


def run(runtime: Runtime, module: str, folder: Path) -> tuple[str, bool]:
    """How the job ended, in words, and whether a signal stopped this process.

    A job of this run that is still there is watched, not submitted again. One that the time limit or the scheduler
    stopped after it had got on is followed by the next. A signal here tells the job to write its checkpoint and end;
    after SIGKILL here the job goes on, and the same command finds it again.
    """
    for program in ("sbatch", "squeue", "scancel"):
        if not shutil.which(program):
            raise ValueError(f"runtime.yaml: launcher is slurm, but {program} is not found; run this where jobs are "
                             "submitted, or choose launcher: deepspeed")
    with postponed(Stop()) as stop:
        while True:
            begun = int(read_status(folder)["step"])
            job = running(folder) or submit(runtime, module, folder)
            state = watch(job, runtime, stop)
            if not _goes_on(folder, begun) or stop.reason or state.startswith("CANCELLED"):
                break
            _say(f"job {job.number} was stopped at step {read_status(folder)['step']}: submitting the next")
    if state != "COMPLETED":
        print(*_last_lines(folder / f"slurm-{job.number}.out"), sep="\n", file=sys.stderr)
    return f"Slurm job {job.number} ended as {state}, see {folder}/slurm-{job.number}.out", bool(stop.reason)


@dataclass(frozen=True)
class Job:
    number: str

    def state(self) -> str:
        """In Slurm's words; UNKNOWN if Slurm has forgotten it, the last known (empty) while Slurm does not answer."""
        asked = _ask("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", self.number)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.split()[0]
        if asked.returncode and "Invalid job id" not in asked.stderr:
            return ""
        kept = _ask("sacct", "--noheader", "--allocations", "--format=State", "--jobs", self.number)
        return kept.stdout.split()[0] if kept.returncode == 0 and kept.stdout.strip() else "UNKNOWN"

    def end(self) -> None:
        """One that runs writes its checkpoint first; one that waits goes."""
        if self.state() == "RUNNING":
            _ask("scancel", "--signal=TERM", self.number)
        else:
            _ask("scancel", self.number)


def submit(runtime: Runtime, module: str, folder: Path) -> Job:
    """Raises ValueError with Slurm's own words if it refuses."""
    path = folder / "job.sh"
    path.write_text(script(runtime, module, folder), encoding="utf-8")
    asked = _ask("sbatch", "--parsable", str(path))
    if asked.returncode:
        raise ValueError(f"sbatch refused {path}: {' '.join(asked.stderr.split())}; correct runtime.yaml: slurm, "
                         "nodes or gpus")
    job = Job(asked.stdout.strip().split(";")[0])
    part = folder / "job.json.part"
    part.write_text(json.dumps({"job": job.number}) + "\n", encoding="utf-8")
    part.replace(folder / "job.json")
    _say(f"submitted job {job.number}; output: {folder}/slurm-{job.number}.out; end it with 'scancel {job.number}'")
    return job


def running(folder: Path) -> Job | None:
    """The job of this run that has not ended; its name tells it too, should we have died before its number was kept."""
    numbers = []
    if (folder / "job.json").exists():
        numbers = [str(json.loads((folder / "job.json").read_text(encoding="utf-8"))["job"])]
    numbers += _ask("squeue", "--noheader", "--me", "--format=%i", "--name", folder.name).stdout.split()
    for job in map(Job, numbers):
        if _word(job.state()) not in ENDED:
            _say(f"job {job.number} of this run is still there: watching it; end it with 'scancel {job.number}'")
            return job
    return None


def watch(job: Job, runtime: Runtime, stop: Stop) -> str:
    """Its last state, when it has ended; told once more to end if it has not some time after it was told to."""
    seen, told, end = "", False, float("inf")
    while _word(state := job.state()) not in ENDED:
        if state and state != seen:
            _say(f"job {job.number}: {state}")
            seen = state
        if stop.reason and not told:
            _say(f"{stop.reason}: job {job.number} writes its checkpoint and ends")
            job.end()
            told, end = True, time.monotonic() + max(GRACE_S, runtime.grace_s)
        if time.monotonic() > end:
            _ask("scancel", job.number)
            end = float("inf")
        _rest(runtime.slurm.poll_s, stop, told=told)
    _say(f"job {job.number}: {state}")
    return state


def _rest(seconds: float, stop: Stop, *, told: bool) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and (told or not stop.reason):
        time.sleep(min(0.5, seconds))


def _goes_on(folder: Path, begun: int) -> bool:
    """Whether the job was only cut short: its ranks say preempted, and are further than before."""
    status = read_status(folder)
    return status["state"] == "preempted" and status["step"] > begun


def _word(state: str) -> str:
    return state.split()[0].rstrip("+") if state else ""  # CANCELLED by 1000, NODE_FAIL+


def _last_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:] if path.exists() else []


def _say(text: str) -> None:
    print(f"slurm: {text}", file=sys.stderr, flush=True)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """A missing sacct is one that knows nothing."""
    if not shutil.which(command[0]):
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} not found")
    return subprocess.run(command, capture_output=True, text=True, check=False)
