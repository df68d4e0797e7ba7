"""runtime.yaml and ONEDIFF_* variables as one frozen, checked object: where and how the project runs."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from ruamel.yaml import YAML

from onediff.config.reading import Count, Rate, Section, checked, read_yaml
from onediff.paths import RUNTIME

Port = Annotated[int, Field(ge=1024, le=65535)]


class Slurm(Section):
    """What sbatch is asked for beside nodes and GPUs; `options` are further lines, such as --qos=long."""

    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    options: list[str] = Field(default=[])
    poll_s: Annotated[float, Field(gt=0)] = 15.0


class Pools(Section):
    """Names of Prefect work pools."""

    cpu: str = "onediff-cpu"
    gpu: str = "onediff-gpu"


class Services(Section):
    """Servers and workers that `make services` keeps on this machine, on 127.0.0.1 alone; `folder` holds all of it.

    database: auto, PostgreSQL where it is installed. What a folder began with, it stays with.
    """

    folder: str = ".onediff/services"
    database: Literal["auto", "postgresql", "sqlite"] = "auto"
    prefect_port: Port = 4200
    mlflow_port: Port = 5000
    postgres_port: Port = 5433  # Debian's own cluster has 5432
    start_s: Annotated[float, Field(gt=0)] = 180.0  # that a service may take until it answers


class Runtime(Section):
    """Where and how it runs; nothing here may change a result. Environment variables ONEDIFF_<KEY> win."""

    launcher: Literal["local", "deepspeed", "slurm"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0)] = 0  # 0: one per core
    loader_workers: Annotated[int, Field(ge=0)] | None = None  # None: none on a CPU, else the cores shared by the GPUs
    micro_batch_size: Count | None = None  # None: the whole batch at once
    nodes: Count = 1
    gpus: Count = 1  # of each node
    hostfile: str | None = None  # DeepSpeed's: a line `name slots=8` for each node
    node_rank: Annotated[int, Field(ge=0)] | None = None  # set: the launcher is started on every node, without ssh
    master_addr: str | None = None
    master_port: Count = 29500
    slurm: Slurm = Slurm()
    zero_level: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"  # to the CPU's memory; all: weights too (ZeRO 3)
    checkpoint_activations: bool = False
    compile: bool = False
    feature_cache_gb: Annotated[float, Field(ge=0)] = 20.0  # of a frozen tower's features, on disk; above: none
    peak_tflops: Annotated[float, Field(gt=0)] | None = None  # of one GPU, for MFU; None: known for common ones
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 20.0
    grace_s: Annotated[float, Field(gt=0)] = 10.0  # from an interrupt until a stage is killed
    scratch: str = ".onediff/scratch"
    mlflow_uri: str | None = None  # None: SQLite in .onediff
    pools: Pools | None = None  # Prefect's work pools, by what a stage needs; None: stages run where the flow does
    git_remote: str | None = None  # where the branches retrain/RUN are pushed to; None: they stay here
    register_by_reference_gb: Rate = 2.0  # a model folder above is not copied into MLflow: DVC keeps the weights
    services: Services = Services()
    notify: list[str] = Field(default=[])  # Prefect blocks that send notifications, such as custom-webhook/onediff
    usage_log: str | None = None  # folder in which each caption made in use is noted; None: nowhere
    usage_images: bool = False  # with the images themselves, which false alarms in use are measured on
    inbox: str | None = None  # folder whose sub-folders are batches of pairs for sources of your own
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None  # None: a cluster of this machine alone
    writer_url: str | None = None  # an OpenAI-compatible endpoint; None: OpenAI's own
    writer_concurrency: Count = 8
    writer_requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    writer_tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    writer_max_usd: Rate = 0.0
    writer_usd_per_million_input: Rate | None = None  # None: unknown, and nothing is asked
    writer_usd_per_million_output: Rate | None = None

    @model_validator(mode="after")
    def _offloads(self) -> Self:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_level < least:
            raise ValueError(f"offload '{self.offload}' needs zero_level {least} or more, got {self.zero_level}")
        return self

    @property
    def num_workers(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def num_ranks(self) -> int:
        """Processes that train together, one per GPU."""
        return 1 if self.launcher == "local" else self.nodes * self.gpus


def load_runtime(path: Path = RUNTIME) -> Runtime:
    """runtime.yaml if it is there, then ONEDIFF_* variables over it. Raises ValueError."""
    values = read_yaml(path) if path.exists() else {}
    variables = {key: f"ONEDIFF_{key.upper()}" for key in Runtime.model_fields}
    values |= {key: YAML(typ="safe").load(os.environ[name]) for key, name in variables.items() if name in os.environ}
    return checked(Runtime, values, path)
