"""A Slurm job of all ranks: submitted once, watched, and asked for a checkpoint before it is stopped."""

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
SHOWN = 20  # last lines of a failed job's output


def script(runtime: Runtime, module: str, folder: Path) -> str:
    """What sbatch runs. As many tasks on each node as GPUs, with the ranks that Slurm numbers them by."""
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
    """How the job ended, in words, and whether a signal stopped this process.

    A job of this run that has not ended is watched, not submitted again. If the time limit or the scheduler stopped a
    job that had made progress, the next one is submitted. After a signal to this process, the job writes its checkpoint
    and ends. After SIGKILL to this process, the job continues, and the same command watches it again.
    """
    for program in ("sbatch", "squeue", "scancel"):
        if not shutil.which(program):
            raise ValueError(f"runtime.yaml: launcher is slurm, but {program} is not found; run this where jobs are "
                             "submitted, or choose launcher: deepspeed")
    with postponed(Stop()) as stop:
        while True:
            first_step = int(read_status(folder)["step"])
            job = running(folder) or submit(runtime, module, folder)
            state, status = watch(job, runtime, stop), read_status(folder)
            cut_short = status["state"] == "preempted" and status["step"] > first_step
            if not cut_short or stop.reason or state.startswith("CANCELLED"):
                break
            _log(f"job {job} was stopped at step {status['step']}: submitting the next")
    output = folder / f"slurm-{job}.out"
    if state != "COMPLETED" and output.exists():
        print(*output.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:], sep="\n", file=sys.stderr)
    return f"Slurm job {job} ended as {state}, see {output}", bool(stop.reason)


def submit(runtime: Runtime, module: str, folder: Path) -> str:
    """The number of the new job. Raises ValueError with Slurm's own words if it refuses."""
    path = folder / "job.sh"
    path.write_text(script(runtime, module, folder), encoding="utf-8")
    sbatch = _slurm("sbatch", "--parsable", str(path))
    if sbatch.returncode:
        raise ValueError(f"sbatch refused {path}: {' '.join(sbatch.stderr.split())}; correct runtime.yaml: slurm, "
                         "nodes or gpus")
    job = sbatch.stdout.strip().split(";")[0]
    write_json(folder / "job.json", {"job": job})
    _log(f"submitted job {job}; output: {folder}/slurm-{job}.out; end it with 'scancel {job}'")
    return job


def running(folder: Path) -> str | None:
    """The job of this run that has not ended, from job.json, or by its name if this process was killed before it wrote
    the file.
    """
    path = folder / "job.json"
    jobs = [str(json.loads(path.read_text(encoding="utf-8"))["job"])] if path.exists() else []
    jobs += _slurm("squeue", "--noheader", "--me", "--format=%i", "--name", folder.name).stdout.split()
    job = next((job for job in jobs if not _has_ended(_state(job))), None)
    if job:
        _log(f"job {job} of this run is still there: watching it; end it with 'scancel {job}'")
    return job


def watch(job: str, runtime: Runtime, stop: Stop) -> str:
    """Waits until the job has ended; returns its last state. After a signal, the job writes its checkpoint first; it is
    cancelled if it has not ended some time later.
    """
    shown, ending, end = "", False, float("inf")
    while not _has_ended(state := _state(job)):
        if state and state != shown:
            _log(f"job {job}: {state}")
            shown = state
        if stop.reason and not ending:
            _log(f"{stop.reason}: job {job} writes its checkpoint and ends")
            _slurm("scancel", *(["--signal=TERM"] if state == "RUNNING" else []), job)  # a job that waits just goes
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
    """In Slurm's words; UNKNOWN if Slurm has forgotten the job, and empty while Slurm does not answer."""
    squeue = _slurm("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)
    if squeue.returncode == 0 and squeue.stdout.strip():
        return squeue.stdout.split()[0]
    if squeue.returncode and "Invalid job id" not in squeue.stderr:
        return ""
    sacct = _slurm("sacct", "--noheader", "--allocations", "--format=State", "--jobs", job)
    return sacct.stdout.split()[0] if sacct.returncode == 0 and sacct.stdout.strip() else "UNKNOWN"


def _has_ended(state: str) -> bool:
    return bool(state) and state.split()[0].rstrip("+") in ENDED  # CANCELLED by 1000, NODE_FAIL+


def _log(text: str) -> None:
    print(f"slurm: {text}", file=sys.stderr, flush=True)


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """A program that is not installed, such as sacct, answers nothing."""
    if not shutil.which(command[0]):
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} not found")
    return subprocess.run(command, capture_output=True, text=True, check=False)
