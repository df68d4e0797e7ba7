"""Command line, environment and checks for DeepSpeed's launcher on one or several nodes."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from onediff.config import Runtime

# Prefixes of the environment variables that are sent to other nodes, in addition to the ONEDIFF_* variables.
SENT = ("OMP_", "GLOO_", "NCCL_", "HF_", "TORCH", "TRANSFORMERS_", "CUDA_HOME")
LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*(#.*)?$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Read the number of GPUs (slots) of each node from a hostfile; rank 0 runs on the first node.

    Raises FileNotFoundError if the file does not exist, and ValueError for a malformed line or a repeated node.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"runtime.yaml: hostfile {path} does not exist; write one line 'NAME slots=GPUS' "
                                "for each node, starting with the node of rank 0") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = LINE.match(line)
        if not match:
            raise ValueError(f"{path} line {number}: must be 'NAME slots=GPUS', got '{line}'")
        if match[1] in slots:
            raise ValueError(f"{path} line {number}: node '{match[1]}' occurs twice; keep one line for each node")
        slots[match[1]] = int(match[2])
    return slots


def check(runtime: Runtime) -> None:
    """Check, before any rank starts, that the settings of runtime.yaml can connect the nodes.

    Raises ValueError if a setting is wrong, and FileNotFoundError if the hostfile does not exist.
    """
    if runtime.node_rank is not None and runtime.node_rank >= runtime.nodes:
        raise ValueError(f"runtime.yaml: node_rank {runtime.node_rank} must be less than nodes {runtime.nodes}; "
                         "number the nodes from 0")
    if runtime.hostfile:
        _check_hostfile(Path(runtime.hostfile), runtime)
    if runtime.nodes == 1:
        return
    if runtime.node_rank is None:
        _check_ssh(runtime)
    elif runtime.master_addr is None:
        raise ValueError("runtime.yaml: if node_rank is set, master_addr must be set too; give the address of node 0 "
                         "on every node")
    elif runtime.node_rank == 0:
        _check_port(runtime.master_addr, runtime.master_port)


def _check_hostfile(path: Path, runtime: Runtime) -> None:
    """Check that the hostfile lists enough nodes and GPUs, and that master_addr is the first node in it."""
    slots = read_hostfile(path)
    if len(slots) < runtime.nodes:
        raise ValueError(f"{path}: runtime.yaml needs {runtime.nodes} nodes, but the hostfile lists {len(slots)} "
                         f"({', '.join(slots) or 'none'}); add the missing nodes, or lower nodes in runtime.yaml")
    used = list(slots)[: runtime.nodes]
    for node in used:
        if slots[node] < runtime.gpus:
            raise ValueError(f"{path}: node '{node}' has slots={slots[node]}, but runtime.yaml needs {runtime.gpus} "
                             "GPUs on each node; correct the slots, or lower gpus in runtime.yaml")
    master = runtime.master_addr
    if master and master not in used and not _addresses(master) & _addresses(used[0]):
        raise ValueError(f"{path}: master_addr '{master}' of runtime.yaml must be the first node of the hostfile, "
                         f"which is '{used[0]}'; add a line for '{master}', or correct master_addr")
    if master in used[1:]:
        raise ValueError(f"{path}: master_addr '{master}' of runtime.yaml must be the first node of the hostfile, "
                         f"which is '{used[0]}'; move the line of '{master}' up, or correct master_addr")


def _check_ssh(runtime: Runtime) -> None:
    if not runtime.hostfile:
        raise ValueError(f"runtime.yaml: for {runtime.nodes} nodes, set hostfile (to start them over ssh), or "
                         "node_rank and master_addr (to start each node by hand)")
    for program in ("pdsh", "ssh"):
        if not shutil.which(program):
            raise ValueError(f"{program} is not installed, but DeepSpeed needs it to start the other nodes; install "
                             f"{program}, or set node_rank and master_addr in runtime.yaml and start each node by hand")


def _check_port(address: str, port: int) -> None:
    """Check that this process, which runs on node 0, can listen on the network port `port` of `address`."""
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
    except OSError:  # The host name may be an alias that only the configuration of ssh defines.
        return set()


def command(runtime: Runtime, module: str, folder: Path) -> list[str]:
    """Return the command line of DeepSpeed's launcher, which starts the ranks of this node, or over ssh of all nodes.

    If the nodes are started by hand and runtime.yaml has no hostfile, a hostfile is written to `folder`.
    """
    # Without a hostfile, pass an empty one, because DeepSpeed would read /job/hostfile by default.
    hostfile, port = Path(runtime.hostfile or os.devnull), runtime.master_port
    if runtime.node_rank is not None and not runtime.hostfile:
        # Without ssh, DeepSpeed uses the hostfile only to count nodes, so the node names can be arbitrary.
        hostfile = folder / f"hostfile-{runtime.node_rank}"
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
    """Return the environment variables for the ranks, given the `variables` of this process.

    Over ssh, DeepSpeed sends only a few variables to other nodes. The other variables that ranks need are written to a
    file in `folder` which DeepSpeed reads. Variables that describe this host, and API keys, are not written.
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
