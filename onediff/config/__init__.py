"""The settings of the project, checked when they are read: params.yaml changes results, and runtime.yaml does not."""

from onediff.config.params import (
    Align,
    Auxiliary,
    Caption,
    Config,
    Data,
    Delta,
    Diffusion,
    Drift,
    Edits,
    Fusion,
    Judge,
    Leaks,
    Lora,
    Model,
    Nuisance,
    Phase,
    Retrieval,
    Scenes,
    Stress,
    Task,
    Tune,
    Vision,
    Writer,
    load_params,
)
from onediff.config.reading import Section
from onediff.config.runtime import Pools, Runtime, Services, Slurm, load_runtime

__all__ = [
    "Align", "Auxiliary", "Caption", "Config", "Data", "Delta", "Diffusion", "Drift", "Edits", "Fusion", "Judge",
    "Leaks", "Lora", "Model", "Nuisance", "Phase", "Pools", "Retrieval", "Runtime", "Scenes", "Section", "Services",
    "Slurm", "Stress", "Task", "Tune", "Vision", "Writer", "load_params", "load_runtime",
]
