"""params.yaml (what decides a result) and runtime.yaml (where and how it runs), checked before any work."""

from onediff.config.params import (
    Align,
    Caption,
    Config,
    Data,
    Delta,
    Diffusion,
    Drift,
    Edits,
    Judge,
    Leaks,
    Lora,
    Model,
    Phase,
    Retrieval,
    Scenes,
    Stress,
    Task,
    Vision,
    Writer,
    load_params,
)
from onediff.config.reading import Section
from onediff.config.runtime import Pools, Runtime, Services, Slurm, load_runtime

__all__ = [
    "Align", "Caption", "Config", "Data", "Delta", "Diffusion", "Drift", "Edits", "Judge", "Leaks", "Lora",
    "Model", "Phase", "Pools", "Retrieval", "Runtime", "Scenes", "Section", "Services", "Slurm", "Stress", "Task",
    "Vision", "Writer", "load_params", "load_runtime",
]
