"""Runs the ranks of training as a Slurm job: submits the job, watches it, and asks for a checkpoint before a stop."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from onediff.config import Runtime
from onediff.files import write_json
from onediff.interrupts import Stop, postponed
from onediff.train.launch.ranks import GRACE_S
from onediff.train.status import read_status

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
         "PREEMPTED", "REVOKED", "SPECIAL_EXIT", "UNKNOWN")
SHOWN = 20  # number of lines at the end of a job's output that are shown if the job fails


def script(runtime: Runtime, module: str, folder: Path) -> str:
    """Return the batch script for sbatch, which starts one task for each GPU; the task number is the rank."""
    settings, cpu = runtime.slurm, runtime.device == "cpu"
    options = [f"--job-name={folder.name}", f"--nodes={runtime.nodes}", f"--ntasks-per-node={runtime.gpus}",
               *([] if cpu else [f"--gpus-per-node={runtime.gpus}"]),
               *([f"--partition={settings.partition}"] if settings.partition else []),
               *([f"--account={settings.account}"] if settings.account else []),
               f"--time={settings.time}", f"--signal=TERM@{max(GRACE_S, runtime.grace_s):.0f}", "--requeue",
               "--open-mode=append", f"--output={folder.absolute()}/slurm-%j.out", f"--chdir={Path.cwd()}",
               *settings.options]
    template = files("onediff.train.launch").joinpath("slurm.sh.j2").read_text(encoding="utf-8")
    page = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(template)
    return page.render(options=options, master=runtime.master_addr, port=runtime.master_port, cpu=cpu,
                       command=shlex.join([sys.executable, "-u", "-m", module]))


def run(runtime: Runtime, module: str, folder: Path) -> tuple[str, bool]:
    """Run the training as a Slurm job. Return how the job ended, as text, and whether this process received a signal.

    If a job of this run still exists, this function watches that job instead of submitting another. If the time limit
    or the scheduler stopped a job that made progress, the next job is submitted to continue the training. After a
    signal to this process, the job writes its checkpoint and ends. If SIGKILL ends this process, the job continues, and
    the user can run the same command again to watch it.
    """
    for program in ("sbatch", "squeue", "scancel"):
        if not shutil.which(program):
            raise ValueError(f"runtime.yaml: launcher is slurm, but the program {program} is not installed; run this "
                             "command on a host that can submit jobs, or set launcher: deepspeed")
    with postponed(Stop()) as stop:
        while True:
            first_step = int(read_status(folder)["step"])
            job = running(folder) or submit(runtime, module, folder)
            state, status = watch(job, runtime, stop), read_status(folder)
            cut_short = status["state"] == "preempted" and status["step"] > first_step
            if not cut_short or stop.reason or state.startswith("CANCELLED"):
                break
            _log(f"job {job} was stopped at step {status['step']}; submitting the next job")
    output = folder / f"slurm-{job}.out"
    if state != "COMPLETED" and output.exists():
        print(*output.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:], sep="\n", file=sys.stderr)
    return f"Slurm job {job} ended as {state}, see {output}", bool(stop.reason)


def submit(runtime: Runtime, module: str, folder: Path) -> str:
    """Submit a new job and return its number. Raises ValueError with the message of sbatch if the submission fails."""
    path = folder / "job.sh"
    path.write_text(script(runtime, module, folder), encoding="utf-8")
    sbatch = _slurm("sbatch", "--parsable", str(path))
    if sbatch.returncode:
        raise ValueError(f"sbatch refused {path}: {' '.join(sbatch.stderr.split())}; correct slurm, nodes or gpus "
                         "in runtime.yaml")
    job = sbatch.stdout.strip().split(";")[0]
    write_json(folder / "job.json", {"job": job})
    _log(f"submitted job {job}; output: {folder}/slurm-{job}.out; to cancel, run 'scancel {job}'")
    return job


def running(folder: Path) -> str | None:
    """Return the number of a Slurm job of this run that has not ended, or None if there is no such job.

    The number is read from job.json. A process that was killed before it wrote job.json may have left a job too, so
    jobs are also searched by name.
    """
    path = folder / "job.json"
    jobs = [str(json.loads(path.read_text(encoding="utf-8"))["job"])] if path.exists() else []
    jobs += _slurm("squeue", "--noheader", "--me", "--format=%i", "--name", folder.name).stdout.split()
    job = next((job for job in jobs if not _has_ended(_state(job))), None)
    if job:
        _log(f"job {job} of this run has not ended; waiting for it; to cancel, run 'scancel {job}'")
    return job


def watch(job: str, runtime: Runtime, stop: Stop) -> str:
    """Wait until the job has ended and return the last state of the job.

    After a signal to this process, the job is asked to write a checkpoint and end. If it does not end in time, it is
    cancelled.
    """
    shown, ending, end = "", False, float("inf")
    while not _has_ended(state := _state(job)):
        if state and state != shown:
            _log(f"job {job}: {state}")
            shown = state
        if stop.reason and not ending:
            _log(f"received {stop.reason}; job {job} writes its checkpoint and ends")
            # A running job gets SIGTERM, so that it writes a checkpoint. A pending job is simply cancelled.
            _slurm("scancel", *(["--signal=TERM"] if state == "RUNNING" else []), job)
            ending, end = True, time.monotonic() + max(GRACE_S, runtime.grace_s)
        if time.monotonic() > end:
            _slurm("scancel", job)
            end = float("inf")
        next_poll = time.monotonic() + runtime.slurm.poll_s
        while time.monotonic() < next_poll and (ending or not stop.reason):
            time.sleep(min(0.5, runtime.slurm.poll_s))
    _log(f"job {job}: {state}")
    return state


def _state(job: str) -> str:
    """Return the state of a job as Slurm writes it, such as RUNNING.

    Returns UNKNOWN if Slurm no longer knows the job, and an empty string while Slurm does not answer.
    """
    squeue = _slurm("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)
    if squeue.returncode == 0 and squeue.stdout.strip():
        return squeue.stdout.split()[0]
    if squeue.returncode and "Invalid job id" not in squeue.stderr:
        return ""
    sacct = _slurm("sacct", "--noheader", "--allocations", "--format=State", "--jobs", job)
    return sacct.stdout.split()[0] if sacct.returncode == 0 and sacct.stdout.strip() else "UNKNOWN"


def _has_ended(state: str) -> bool:
    # Slurm also writes states such as "CANCELLED by 1000" and "NODE_FAIL+".
    return bool(state) and state.split()[0].rstrip("+") in ENDED


def _log(text: str) -> None:
    print(f"slurm: {text}", file=sys.stderr, flush=True)


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm program. If it is not installed, as sacct often is not, return exit code 127 and no output."""
    if not shutil.which(command[0]):
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=False)
