"""DeepSpeed's launcher on one node or many: what it is called with, and what must be true before."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from onediff.config import Runtime

SENT = ("OMP_", "GLOO_", "NCCL_", "HF_", "TORCH", "TRANSFORMERS_", "CUDA_HOME")  # to other nodes, beside ONEDIFF_*
LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*(#.*)?$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Node -> its slots, in order; the first is rank 0's. Raises FileNotFoundError or ValueError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"runtime.yaml: hostfile {path} not found; write one line 'NAME slots=GPUS' "
                                "for each node, rank 0's first") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = LINE.match(line)
        if not match:
            raise ValueError(f"{path} line {number}: must be 'NAME slots=GPUS', got '{line}'")
        if match[1] in slots:
            raise ValueError(f"{path} line {number}: node '{match[1]}' stands there twice; one line for each node")
        slots[match[1]] = int(match[2])
    return slots


def check(runtime: Runtime) -> None:
    """Raises ValueError or FileNotFoundError, before anything starts, if the nodes cannot come together."""
    if runtime.node_rank is not None and runtime.node_rank >= runtime.nodes:
        raise ValueError(f"runtime.yaml: node_rank {runtime.node_rank} must be below nodes {runtime.nodes}: "
                         "the first node is 0")
    if runtime.hostfile:
        _check_hostfile(Path(runtime.hostfile), runtime)
    if runtime.nodes == 1:
        return
    if runtime.node_rank is None:
        _check_ssh(runtime)
    elif runtime.master_addr is None:
        raise ValueError("runtime.yaml: node_rank is set, so master_addr must name node 0, the same on every node")
    elif runtime.node_rank == 0:
        _check_port(runtime.master_addr, runtime.master_port)


def _check_hostfile(path: Path, runtime: Runtime) -> None:
    slots = read_hostfile(path)
    if len(slots) < runtime.nodes:
        raise ValueError(f"{path}: runtime.yaml asks for nodes: {runtime.nodes}, but it names {len(slots)} "
                         f"({', '.join(slots) or 'none'}); add the missing, or lower nodes")
    used = list(slots)[: runtime.nodes]
    for node in used:
        if slots[node] < runtime.gpus:
            raise ValueError(f"{path}: node '{node}' has slots={slots[node]}, but runtime.yaml asks for gpus: "
                             f"{runtime.gpus} of each node; correct the slots, or lower gpus")
    master = runtime.master_addr
    if master and master not in used and not _addresses(master) & _addresses(used[0]):
        raise ValueError(f"{path}: master_addr '{master}' of runtime.yaml is missing; it must be the first node, "
                         f"which is '{used[0]}': add it, or correct master_addr")
    if master in used[1:]:
        raise ValueError(f"{path}: master_addr '{master}' must be the first node, which is '{used[0]}'; "
                         "move its line up, or correct master_addr")


def _check_ssh(runtime: Runtime) -> None:
    if not runtime.hostfile:
        raise ValueError(f"runtime.yaml: nodes {runtime.nodes} need a hostfile (to start them over ssh), "
                         "or node_rank and master_addr (started by hand on every node)")
    for program in ("pdsh", "ssh"):
        if not shutil.which(program):
            raise ValueError(f"{program} not found: DeepSpeed starts other nodes with it; install it, or set node_rank "
                             "and master_addr in runtime.yaml and start the same command on every node")


def _check_port(address: str, port: int) -> None:
    """On node 0, which opens it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ValueError(f"runtime.yaml: master_addr '{address}' port {port} cannot be opened on node 0 "
                             f"({error.strerror or error}); it must be an address of this host and a free "
                             "master_port") from None


def _addresses(name: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:  # known to ssh's configuration only
        return set()


def command(runtime: Runtime, module: str, folder: Path) -> list[str]:
    """`deepspeed ...` for this process. If runtime.yaml names no hostfile, one is written to `folder`."""
    hostfile, port = Path(runtime.hostfile or os.devnull), runtime.master_port  # else DeepSpeed reads /job/hostfile
    if runtime.node_rank is not None and not runtime.hostfile:
        hostfile = folder / f"hostfile-{runtime.node_rank}"  # without ssh DeepSpeed only counts its lines
        hostfile.write_text("".join(f"node-{rank} slots={runtime.gpus}\n" for rank in range(runtime.nodes)),
                            encoding="utf-8")
    if runtime.nodes == 1 and "master_port" not in runtime.model_fields_set:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
    arguments = ["--hostfile", str(hostfile), "--num_nodes", str(runtime.nodes), "--num_gpus", str(runtime.gpus),
                 "--master_port", str(port)]
    if runtime.master_addr:
        arguments += ["--master_addr", runtime.master_addr]
    if runtime.node_rank is not None:
        arguments += ["--no_ssh", "--node_rank", str(runtime.node_rank)]
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, *arguments, "--log_level", "warning", "--no_local_rank", "--module", module]


def environment(runtime: Runtime, folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables for the ranks. DeepSpeed passes few of them on over ssh, so it reads the others from a file in
    `folder`, without those that describe this host and without the writer's key.
    """
    result = dict(variables)
    if runtime.device == "cpu" or not os.path.exists("/dev/nvidia0"):
        result = {"OMP_NUM_THREADS": "1"} | result | {"DS_ACCELERATOR": "cpu"}
    if runtime.nodes > 1 and runtime.node_rank is None:
        path = (folder / "environment").absolute()
        names = {"DS_ACCELERATOR", *(f"ONEDIFF_{field.upper()}" for field in Runtime.model_fields)}
        path.write_text("".join(f"{name}={value}\n" for name, value in result.items()
                                if (name in names or name.startswith(SENT)) and "\n" not in value), encoding="utf-8")
        result["DS_ENV_FILE"] = str(path)
    return result
