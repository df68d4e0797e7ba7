"""A Kubernetes Job of all ranks, one pod for each node, and the Service by which they find node 0."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff.config import Runtime
from onediff.train.launch.ranks import GRACE_S

PROJECT = "/workspace"  # in the pod: the project's folder, its data and scratch, on one volume that all nodes share
CLAIM = "onediff"


def manifest(phase: str, runtime: Runtime, *, image: str) -> str:
    """YAML for `kubectl apply -f -`. The pods train and leave the weights in scratch; the stage, where DVC is, fetches.

    Raises ValueError if scratch is not on the volume that the pods share.
    """
    if Path(runtime.scratch).is_absolute():
        raise ValueError(f"runtime.yaml: scratch '{runtime.scratch}' must lie in the project's folder, which is the "
                         f"volume of claim '{CLAIM}' that all pods share")
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
    """torchrun starts the ranks, because its time between SIGTERM and SIGKILL can be set; that of DeepSpeed's launcher
    is 30 seconds.
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
    return {"restartPolicy": "Never", "subdomain": name, "terminationGracePeriodSeconds": grace_s + 30,
            "containers": [container],
            "volumes": [{"name": "project", "persistentVolumeClaim": {"claimName": CLAIM}},
                        {"name": "shm", "emptyDir": {"medium": "Memory"}}]}  # NCCL and loaders need more than 64 MiB
