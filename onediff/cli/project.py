"""The project: `onediff preset`, `plan`, `manifest`, `doctor`, `drift`, `profile` and `gc`."""

import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from onediff.cli.output import Json, Model, print_result, print_text
from onediff.paths import CHAMPION, PARAMS, RUNTIME

SHOWN = 5  # names of each kind of what 'onediff gc' removes


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


def doctor(as_json: Json = False) -> None:
    """What is installed, which device, which parts are ready, what to do next."""
    from onediff.ops.doctor import examine

    findings = examine()
    text = "\n".join(f"{'ok' if item.ok else '--'}  {item.name:<10} {item.message}"
                     + ("" if item.ok else f"\n      -> {item.cure}") for item in findings)
    print_result([{"name": item.name, "ok": item.ok, "found": item.message, "cure": item.cure, "needed": item.needed}
                  for item in findings], text, as_json)
    if any(item.needed and not item.ok for item in findings):
        raise typer.Exit(1)


def drift(days: Annotated[float, typer.Option(min=0, help="How far back the usage log is read.")] = 7,
          model: Model = CHAMPION,
          profile: Annotated[Path | None, typer.Option(help="Default: what was registered with the model.")] = None,
          as_json: Json = False) -> None:
    """Hold recent captions of the usage log against training; exit code 1 if they drifted. See docs/watching.md."""
    from onediff.ops.drift import as_text, examine

    result = examine(days=days, model=model, profile=profile)
    print_result(result.as_dict(), as_text(result), as_json)
    if result.moved:
        raise typer.Exit(1)


def profile(out: Path, model: Model = CHAMPION) -> None:
    """Measure what `onediff drift` compares with, on split gate, into OUT/profile.json."""
    from onediff.ops.drift import load_settings, write_profile
    from onediff.ops.predict import folder_of

    print_text(write_profile(out, folder_of(model), num_pairs=load_settings().num_pairs))


def gc(yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only shown.")] = False,
       days: Annotated[float, typer.Option(min=0, help="What is younger stays.")] = 30,
       as_json: Json = False) -> None:
    """Remove what is old and no registered version needs: cached data, runs, branches, checkpoints, copies."""
    from flows.processes import pipeline_lock
    from onediff.ops.housekeeping import KINDS, survey, sweep

    with pipeline_lock() if yes else nullcontext():
        surveyed = survey(days)
        deleted_runs = sweep(surveyed) if yes else []
    lines = []
    for kind, description in KINDS.items():
        if items := [item for item in surveyed.items if item.kind == kind]:
            num_bytes = sum(item.num_bytes for item in items)
            lines.append(f"{len(items)} {kind}, {num_bytes / 2**20:.1f} MB: {description}")
            lines += [f"  {item.name}" for item in items[:SHOWN]]
            lines += [f"  and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    lines += [f"!! {line}" for line in surveyed.refused]
    lines.append("nothing to remove" if not surveyed.items else "removed" if yes else
                 "nothing was removed: 'make gc YES=1' or 'onediff gc --yes' does it")
    lines += [_purge(deleted_runs)] if deleted_runs else []
    print_result({**asdict(surveyed), "removed": yes}, "\n".join(lines), as_json)


def _purge(runs: list[str]) -> str:
    """Deletes runs for good on a server of this machine. On another server, an administrator there must do it."""
    from flows.services import databases, topology
    from onediff import tracking
    from onediff.config import load_runtime

    stack = topology.load_stack(load_runtime())
    if tracking.uri().rstrip("/") == stack.mlflow:
        return databases.purge(stack, runs)
    return f"the MLflow server keeps {len(runs)} runs as deleted; how they go for good: deploy/README.md"
