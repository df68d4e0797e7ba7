"""Kubernetes manifest for training: a Job with one pod per node, and a Service by which the pods find node 0."""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff.config import Runtime
from onediff.train.launch.ranks import GRACE_S

# Each pod mounts the project folder, including data and scratch, at this path, from a volume that all pods share.
PROJECT = "/workspace"
CLAIM = "onediff"  # name of the PersistentVolumeClaim for the project folder


def manifest(phase: str, runtime: Runtime, *, image: str) -> str:
    """Return the YAML manifest of a training phase, for `kubectl apply -f -`.

    The pods train and save the weights in scratch, from which a later run of the DVC stage copies them. Raises
    ValueError if `image` cannot be a name, or if scratch is not on the volume that the pods share.
    """
    if not re.fullmatch(r"\S+", image):
        raise ValueError("--image must be the name of a container image without spaces, such as onediff:latest, got "
                         f"'{image}'")
    if Path(runtime.scratch).is_absolute():
        raise ValueError(f"runtime.yaml: scratch must be a relative path inside the project folder, got "
                         f"'{runtime.scratch}'; the pods share only the project folder (PersistentVolumeClaim "
                         f"'{CLAIM}')")
    name = f"onediff-{phase}"
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
               "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name},
                        "ports": [{"name": "rendezvous", "port": runtime.master_port}]}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {
        "completionMode": "Indexed", "completions": runtime.nodes, "parallelism": runtime.nodes, "backoffLimit": 0,
        "template": {"metadata": {"labels": {"app": name}}, "spec": _pod(phase, name, runtime, image)}}}
    page = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.dump_all([service, job], page)
    return page.getvalue()


def _pod(phase: str, name: str, runtime: Runtime, image: str) -> dict[str, Any]:
    """Return the specification of a pod, which starts the ranks of one node with torchrun.

    DeepSpeed's launcher is not used here, because it kills ranks 30 seconds after SIGTERM, which can be too early for
    writing a checkpoint. In torchrun this time can be set.
    """
    grace_s = round(max(GRACE_S, runtime.grace_s))
    gpus = {} if runtime.device == "cpu" else {"resources": {"limits": {"nvidia.com/gpu": runtime.gpus}}}
    container = {
        "name": "ranks", "image": image, "workingDir": PROJECT,
        "command": ["python", "-m", "torch.distributed.run", f"--nnodes={runtime.nodes}",
                    f"--nproc-per-node={runtime.gpus}", "--node-rank=$(NODE_RANK)", f"--master-addr={name}-0.{name}",
                    f"--master-port={runtime.master_port}", f"--shutdown-timeout={grace_s}",
                    "-m", f"onediff.stages.{phase}"],
        "env": [{"name": "NODE_RANK", "valueFrom": {"fieldRef": {
                    "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}},
                {"name": "OMP_NUM_THREADS", "value": "1"}],
        **gpus, "volumeMounts": [{"name": "project", "mountPath": PROJECT}, {"name": "shm", "mountPath": "/dev/shm"}]}
    # The pod mounts memory at /dev/shm, because NCCL and data loaders need more than the default of 64 MiB there.
    return {"restartPolicy": "Never", "subdomain": name, "terminationGracePeriodSeconds": grace_s + 30,
            "containers": [container],
            "volumes": [{"name": "project", "persistentVolumeClaim": {"claimName": CLAIM}},
                        {"name": "shm", "emptyDir": {"medium": "Memory"}}]}
