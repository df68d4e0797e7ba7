"""`onediff preset`, `onediff plan` and `onediff manifest`: prepare a training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from onediff.cli.output import Json, print_result, print_text
from onediff.paths import PARAMS, RUNTIME


def preset(name: str, force: Annotated[bool, typer.Option("--force", help="Overwrite own values.")] = False) -> None:
    """Write params.yaml from presets/NAME.yaml, comments included; runtime.yaml too if there is none."""
    from onediff.config import load_params, load_runtime

    presets = {path.stem: path for path in sorted(Path("presets").glob("*.yaml")) if not path.stem.endswith(".runtime")}
    if name not in presets:
        names = ", ".join(presets) or "none here: run this in the project's folder"
        raise ValueError(f"presets/{name}.yaml not found; there are: {names}")
    load_params(presets[name])
    if PARAMS.exists() and not force and PARAMS.read_bytes() not in [path.read_bytes() for path in presets.values()]:
        raise ValueError(f"{PARAMS} differs from every preset, so it holds your own values: keep a copy, "
                         f"then 'onediff preset {name} --force'")
    shutil.copyfile(presets[name], PARAMS)
    print_text(f"{PARAMS}: {name}")
    runtime = Path(f"presets/{name}.runtime.yaml")
    if runtime.exists() and not RUNTIME.exists():
        load_runtime(runtime)
        shutil.copyfile(runtime, RUNTIME)
        print_text(f"{RUNTIME}: {runtime}")


def plan(preset: Annotated[str | None, typer.Option(help="Of presets/; default: params.yaml.")] = None,
         gpu: Annotated[str, typer.Option(help="Its name, such as h100, a100-40gb or l40s.")] = "h100",
         gpus: Annotated[int | None, typer.Option(min=1, help="In all; default: what runtime.yaml says.")] = None,
         utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak.")] = 0.4,
         as_json: Json = False) -> None:
    """What a training will take, before any GPU is touched: parameters, steps, memory by ZeRO level, hours."""
    from dataclasses import asdict

    from onediff.config import load_params, load_runtime
    from onediff.train import plan as planner
    from onediff.train.cost import GPUS, find_gpu

    model = find_gpu(gpu)
    if model is None:
        raise ValueError(f"--gpu {gpu} is not known; known are {', '.join(known.name for known in GPUS)}")
    config = load_params(Path(f"presets/{preset}.yaml") if preset else PARAMS)
    of_preset = Path(f"presets/{preset}.runtime.yaml")
    runtime = load_runtime(of_preset if of_preset.exists() else RUNTIME)
    planned = planner.plan(config, runtime, gpu=model, num_gpus=gpus or runtime.num_ranks, utilisation=utilisation)
    print_result(asdict(planned), planner.text(planned), as_json)


def manifest(phase: Annotated[Literal["align", "tune"], typer.Argument(help="align or tune.")],
             image: Annotated[str, typer.Option(help="With this project installed.")] = "onediff:latest") -> None:
    """Print a Kubernetes Job that trains a phase on the nodes and GPUs of runtime.yaml; see docs/cluster.md."""
    from onediff.config import load_runtime
    from onediff.train.launch.kubernetes import manifest as kubernetes_manifest

    print_text(kubernetes_manifest(phase, load_runtime(), image=image).removesuffix("\n"))
