"""The schema of runtime.yaml: where and how the project runs. No setting of this file changes a result.

Environment variables ONEDIFF_<KEY> override the file.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onediff.config.reading import Count, Rate, Section, checked, parse_yaml, read_yaml
from onediff.paths import RUNTIME

Port = Annotated[int, Field(ge=1024, le=65535)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Slurm(Section):
    """The settings of a Slurm job, except the numbers of nodes and GPUs, which the class Runtime contains.

    `options` are further options of sbatch, such as --qos=long. OneDiff asks Slurm for the state of the job every
    `poll_s` seconds.
    """

    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    options: list[str] = Field(default=[])
    poll_s: Annotated[float, Field(gt=0)] = 15.0


class Pools(Section):
    """The names of two Prefect work pools: `gpu` for DVC stages that need a GPU, and `cpu` for all other stages."""

    cpu: str = "onediff-cpu"
    gpu: str = "onediff-gpu"


class Services(Section):
    """The settings of the servers that `make services` runs on this machine; they listen only on 127.0.0.1.

    All their files are in `folder`. `database` "auto" means PostgreSQL if it is installed, and otherwise SQLite; an
    existing folder keeps the database that it contains. A service must start within `start_s` seconds.
    """

    folder: str = ".onediff/services"
    database: Literal["auto", "postgresql", "sqlite"] = "auto"
    prefect_port: Port = 4200
    mlflow_port: Port = 5000
    postgres_port: Port = 5433  # Port 5432 may already be used by a PostgreSQL of the operating system.
    start_s: Annotated[float, Field(gt=0)] = 180.0


class Serve(Section):
    """The limits of the server that `onediff serve` starts.

    `body_mb` limits the body of a request, `megapixels` the pixels that must be decoded of one image, and `pairs` the
    number of pairs in one request. At most `waiting_pairs` pairs of all clients wait at a time. A request is refused
    after `timeout_s` seconds. The server captions up to `batch_pairs` pairs with up to `batch_megapixels` megapixels
    at once, and waits up to `batch_wait_ms` milliseconds for a batch to fill. Larger images are shrunk to `image_px`
    pixels. The server asks every `poll_s` seconds which version is the champion.
    """

    body_mb: Positive = 24.0
    megapixels: Positive = 16.0
    pairs: Count = 16
    waiting_pairs: Count = 128
    timeout_s: Positive = 30.0
    batch_pairs: Count = 16
    batch_megapixels: Positive = 16.0
    batch_wait_ms: Rate = 5.0
    image_px: Annotated[int, Field(ge=64)] = 1024
    max_new_tokens: Count = 64
    poll_s: Positive = 10.0

    @model_validator(mode="after")
    def _a_request_can_be_accepted(self) -> Self:
        if self.pairs > self.waiting_pairs:
            raise ValueError(f"pairs must be at most waiting_pairs, got {self.pairs} and {self.waiting_pairs}, because "
                             "the server would refuse larger requests at any time; raise waiting_pairs")
        return self


class Runtime(Section):
    """All settings of runtime.yaml. A key that neither the file nor the environment sets has the default value here.

    runtime.example.yaml explains each key.
    """

    launcher: Literal["local", "deepspeed", "slurm"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0)] = 0
    loader_workers: Annotated[int, Field(ge=0)] | None = None
    micro_batch_size: Count | None = None

    # Training on several GPUs and nodes
    nodes: Count = 1
    gpus: Count = 1
    hostfile: str | None = None
    node_rank: Annotated[int, Field(ge=0)] | None = None
    master_addr: str | None = None
    master_port: Count = 29500
    slurm: Slurm = Slurm()
    zero_level: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    checkpoint_activations: bool = False
    compile: bool = False

    # Caches, checkpoints and limits
    feature_cache_gb: Annotated[float, Field(ge=0)] = 20.0
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 20.0
    grace_s: Annotated[float, Field(gt=0)] = 10.0
    scratch: str = ".onediff/scratch"

    # Tracking, registry and services
    mlflow_uri: str | None = None
    pools: Pools | None = None
    git_remote: str | None = None
    register_by_reference_gb: Rate = 2.0
    services: Services = Services()
    notify: list[str] = Field(default=[])

    # Serving
    serve: Serve = Serve()

    # Data from users
    usage_log: str | None = None
    usage_images: bool = False
    inbox: str | None = None

    # Data generation and the writer
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    writer_url: str | None = None
    writer_concurrency: Count = 8
    writer_requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    writer_tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    writer_max_usd: Rate = 0.0
    writer_usd_per_million_input: Rate | None = None
    writer_usd_per_million_output: Rate | None = None

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_level < least:
            raise ValueError(f"offload '{self.offload}' needs a zero_level of {least} or more, got {self.zero_level}; "
                             "raise zero_level, or set offload to none")
        return self

    @property
    def num_workers(self) -> int:
        """Return the number of worker processes for CPU work: `workers`, or one per available CPU if it is 0."""
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def num_ranks(self) -> int:
        """Return the number of training processes: 1 for the launcher `local`, else one for each GPU of all nodes."""
        return 1 if self.launcher == "local" else self.nodes * self.gpus


def load_runtime(path: Path = RUNTIME) -> Runtime:
    """Read runtime.yaml if it exists. An environment variable ONEDIFF_<KEY> replaces the value of the key.

    Raises ValueError whose message has one line for each wrong value.
    """
    values = read_yaml(path) if path.exists() else {}
    variables = {key: f"ONEDIFF_{key.upper()}" for key in Runtime.model_fields}
    values |= {key: parse_yaml(os.environ[name], name) for key, name in variables.items() if name in os.environ}
    return checked(Runtime, values, path)
