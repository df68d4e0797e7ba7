"""The settings of the project, checked when they are read: params.yaml changes results, and runtime.yaml does not."""

from onediff.config.data import Data, Diffusion, Edits, Leaks, Nuisance, Retrieval, Scenes, Writer
from onediff.config.evaluation import Caption, Drift, Judge, Stress
from onediff.config.params import Config, load_params
from onediff.config.reading import Section
from onediff.config.runtime import Pools, Runtime, Serve, Services, Slurm, load_runtime
from onediff.config.training import Align, Auxiliary, Delta, Fusion, Lora, Model, Phase, Task, Tune, Vision, WeightDecay

__all__ = [
    "Align", "Auxiliary", "Caption", "Config", "Data", "Delta", "Diffusion", "Drift", "Edits", "Fusion", "Judge",
    "Leaks", "Lora", "Model", "Nuisance", "Phase", "Pools", "Retrieval", "Runtime", "Scenes", "Section", "Serve",
    "Services", "Slurm", "Stress", "Task", "Tune", "Vision", "WeightDecay", "Writer", "load_params", "load_runtime",
]
