"""The commands for a project: `onediff preset`, `plan`, `manifest`, `doctor`, `drift`, `profile` and `gc`."""

import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from onediff.cli.output import (
    Json,
    Model,
    error_message,
    path_argument,
    path_option,
    print_result,
    print_text,
    print_warning,
)
from onediff.paths import CHAMPION, PARAMS, RUNTIME

NUM_SHOWN = 5  # 'onediff gc' lists this many items of each kind by name.
CANNOT_BE_MEASURED = 2  # an exit code; diff and grep also use 2 if they cannot answer


def preset(name: Annotated[str | None, typer.Argument(help="Without a name, the command lists the presets.")] = None,
           force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite a params.yaml that you "
                                               "edited.")] = False) -> None:
    """Write params.yaml from one of the files in presets/.

    Comments are copied too. If the preset has a runtime file and the project has no runtime.yaml, that file is copied
    as well.

    Example: onediff preset tiny
    """
    from onediff.config import load_params, load_runtime

    if name is None:
        print_text("\n".join(f"{name:<12} {_first_sentence(path)}" for name, path in _presets().items())
                   or "There are no presets here: run this command in the folder of the project.")
        return
    path = _preset_file(name)
    load_params(path)
    if PARAMS.exists() and not force and PARAMS.read_bytes() not in [path.read_bytes() for path in _presets().values()]:
        raise ValueError(f"{PARAMS} differs from every preset, so it contains values that you edited: keep a copy, "
                         f"then run 'onediff preset {name} --force'")
    shutil.copyfile(path, PARAMS)
    print_text(f"{PARAMS}: {name}")
    runtime = path.with_suffix(".runtime.yaml")
    if runtime.exists() and not RUNTIME.exists():
        load_runtime(runtime)
        shutil.copyfile(runtime, RUNTIME)
        print_text(f"{RUNTIME}: {runtime}")


def _presets() -> dict[str, Path]:
    """Return the files in presets/ by name, without the runtime files."""
    return {path.stem: path for path in sorted(Path("presets").glob("*.yaml")) if not path.stem.endswith(".runtime")}


def _preset_file(name: str) -> Path:
    """Return the file of a preset. Raises ValueError with the existing names if there is no such preset."""
    presets = _presets()
    if name not in presets:
        names = ", ".join(presets) or "none in this folder, so run the command in the folder of the project"
        raise ValueError(f"presets/{name}.yaml does not exist; the presets are: {names}")
    return presets[name]


def _first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the top of a YAML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in lines[:next(
        (number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))]]
    return re.split(r"(?<=\.)\s", " ".join(comment), maxsplit=1)[0]


def plan(preset: Annotated[str | None, typer.Option(help="The preset to plan; without it, params.yaml.")] = None,
         gpu: Annotated[str, typer.Option(help="The GPU model, such as h100, a100-40gb or l40s.")] = "h100",
         gpus: Annotated[int | None, typer.Option(
             min=1, help="The total number of GPUs; without it, the number in runtime.yaml.")] = None,
         utilisation: Annotated[float, typer.Option(
             min=0.01, max=1, help="The share of the GPU's peak speed that the training reaches.")] = 0.4,
         as_json: Json = False) -> None:
    """Estimate parameters, steps, memory and hours of a training.

    The estimate needs no GPU. It shows the memory for each ZeRO level.

    Example: onediff plan --preset paper --gpu a100-40gb --gpus 8
    """
    from onediff.config import load_params, load_runtime
    from onediff.train import plan as planner
    from onediff.train.cost import GPUS, find_gpu

    gpu_model = find_gpu(gpu)
    if gpu_model is None:
        raise ValueError(f"--gpu must be one of {', '.join(known.name for known in GPUS)}, got {gpu}")
    params = _preset_file(preset) if preset else PARAMS
    config = load_params(params)
    of_preset = params.with_suffix(".runtime.yaml")
    runtime = load_runtime(of_preset if preset and of_preset.exists() else RUNTIME)
    planned = planner.plan(config, runtime, gpu=gpu_model, num_gpus=gpus or runtime.num_ranks, utilisation=utilisation)
    print_result(asdict(planned), planner.text(planned), as_json)


def manifest(phase: Annotated[Literal["align", "tune"], typer.Argument(help="The training phase.")],
             image: Annotated[str, typer.Option(help="A container image that has this project "
                                                "installed.")] = "onediff:latest") -> None:
    """Print a Kubernetes Job that trains one phase.

    The Job uses the number of nodes and GPUs in runtime.yaml. See docs/cluster.md.

    Example: onediff manifest tune --image registry.example.com/onediff:1.0
    """
    from onediff.config import load_runtime
    from onediff.train.launch.kubernetes import manifest as kubernetes_manifest

    print_text(kubernetes_manifest(phase, load_runtime(), image=image).removesuffix("\n"))


def doctor(as_json: Json = False) -> None:
    """Check the installation and the project, and print the cures.

    The exit code is 1 if a necessary check fails.

    Example: onediff doctor
    """
    from onediff.ops.doctor import examine

    findings = examine()
    marks = {True: typer.style("ok", fg="green"), False: typer.style("--", fg="yellow")}
    text = "\n".join(f"{marks[item.ok]}  {item.name:<10} {item.message}"
                     + ("" if item.ok else f"\n      -> {item.cure}") for item in findings)
    print_result([{"name": item.name, "ok": item.ok, "found": item.message, "cure": item.cure, "needed": item.needed}
                  for item in findings], text, as_json)
    if any(item.needed and not item.ok for item in findings):
        raise typer.Exit(1)


def drift(days: Annotated[float, typer.Option(min=0, help="The number of days of the usage log to read.")] = 7,
          model: Model = CHAMPION,
          profile: Annotated[Path | None, path_option(
              "--profile", help="A profile.json; without it, the profile that was registered with the model.")] = None,
          as_json: Json = False) -> None:
    """Check whether recent captions still resemble training.

    The command compares the captions in the usage log with the profile that was measured on the `gate` split. The page
    docs/watching.md explains each figure.

    Exit code 0: nothing drifted. 1: at least one figure drifted. 2: drift cannot be measured, because there are too
    few captions, or because the usage log, a setting or the profile is missing.

    Example: onediff drift --days 30 --json
    """
    try:
        from onediff.ops.drift import as_text, examine

        result = examine(days=days, model=model, profile=profile)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print_warning(error_message(error))
        raise typer.Exit(CANNOT_BE_MEASURED) from None
    print_result(result.as_dict(), as_text(result), as_json)
    if result.moved or not result.figures:
        raise typer.Exit(1 if result.moved else CANNOT_BE_MEASURED)


def profile(out: Annotated[Path, path_argument("The folder in which profile.json is written.")],
            model: Model = CHAMPION) -> None:
    """Measure the profile that 'onediff drift' compares with.

    The model captions pairs of the `gate` split. Registration does this already, so the command is for a version that
    was registered without a profile.

    Example: onediff profile .onediff/profile --model models:/onediff/3
    """
    from onediff.ops.drift import load_settings, write_profile
    from onediff.ops.predict import folder_of

    print_text(write_profile(out, folder_of(model), num_pairs=load_settings().num_pairs))


def gc(yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove the listed items. Without this option, the "
                                         "command only lists them.")] = False,
       days: Annotated[float, typer.Option(min=0, help="Items that are younger than this many days are kept.")] = 30,
       as_json: Json = False) -> None:
    """Remove old files and runs that no registered version needs.

    The command removes cached data, MLflow runs, branches, checkpoints and copies of versions.

    Example: onediff gc --days 90 --yes
    """
    from onediff.ops.housekeeping import KINDS, check_project, survey, sweep

    check_project()
    from flows.processes import pipeline_lock  # Importing flows creates .onediff, so check_project() comes first.

    with pipeline_lock() if yes else nullcontext():
        surveyed = survey(days)
        deleted_runs = sweep(surveyed) if yes else []
    lines = []
    for kind, description in KINDS.items():
        if items := [item for item in surveyed.items if item.kind == kind]:
            num_bytes = sum(item.num_bytes for item in items)
            lines.append(f"{len(items)} {kind}, {num_bytes / 2**20:.1f} MB: {description}")
            lines += [f"  {item.name}" for item in items[:NUM_SHOWN]]
            lines += [f"  and {len(items) - NUM_SHOWN} more"] if len(items) > NUM_SHOWN else []
    lines += [f"!! {line}" for line in surveyed.refused]
    lines.append("There is nothing to remove." if not surveyed.items else "These items were removed." if yes else
                 "Nothing was removed yet: 'onediff gc --yes' or 'make gc YES=1' removes these items.")
    lines += [_purge(deleted_runs)] if deleted_runs else []
    print_result({**asdict(surveyed), "removed": yes}, "\n".join(lines), as_json)


def _purge(runs: list[str]) -> str:
    """Delete runs permanently if this machine runs the MLflow server. Return a sentence that says what was done.

    On another machine's server, only an administrator there can delete them permanently.
    """
    from flows.services import databases, topology
    from onediff import tracking
    from onediff.config import load_runtime

    stack = topology.load_stack(load_runtime())
    if tracking.uri().rstrip("/") == stack.mlflow:
        return databases.purge(stack, runs)
    return (f"The MLflow server still stores {len(runs)} runs, marked as deleted: deploy/README.md says how an "
            "administrator removes them permanently.")
