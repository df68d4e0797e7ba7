"""The commands for a project: `onediff preset`, `plan`, `manifest`, `doctor`, `drift`, `profile` and `gc`."""

import re
import shutil
import traceback
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from onediff.cli.output import (
    Json,
    Model,
    error_message,
    output_path,
    path_argument,
    path_option,
    print_result,
    print_text,
    print_warning,
)
from onediff.paths import CHAMPION, PARAMS, RUNTIME, check_project

NUM_SHOWN = 5  # largest number of items of each kind that 'onediff gc' lists by name
CANNOT_BE_MEASURED = 2  # exit code of 'onediff drift'; diff and grep also exit with 2 after an error


def preset(name: Annotated[str | None, typer.Argument(help="Without a name, the command lists the presets.")] = None,
           force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite a params.yaml that you "
                                               "edited.")] = False,
           changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value, for "
                                                             "example align.lr_delta=3e-4. Repeatable.")] = None
           ) -> None:
    """Copy a preset, one of the files in presets/, to params.yaml.

    If the preset also has a file NAME.runtime.yaml and the project has no runtime.yaml, this file is copied to
    runtime.yaml.

    Example: onediff preset tiny
    """
    from onediff.config import Config, load_runtime
    from onediff.config.reading import checked, parse_yaml, with_values
    from onediff.encoding import read_text
    from onediff.files import new_file

    if name is None:
        print_text("\n".join(f"{name:<12} {_first_sentence(path)}" for name, path in _presets().items()))
        return
    path = _preset_file(name)
    if PARAMS.exists() and not force and PARAMS.read_bytes() not in [path.read_bytes() for path in _presets().values()]:
        raise ValueError(f"{PARAMS} differs from every preset, so it contains values that you edited: keep a copy, "
                         f"then run 'onediff preset {name} --force'")
    text = with_values(path, changes) if changes else read_text(path, "a preset")
    checked(Config, parse_yaml(text, str(PARAMS)), PARAMS)
    with new_file(PARAMS) as part:
        part.write_text(text, encoding="utf-8")
    print_text(f"{PARAMS}: {', '.join([name, *(changes or [])])}")
    runtime = path.with_suffix(".runtime.yaml")
    if runtime.exists() and not RUNTIME.exists():
        load_runtime(runtime)
        shutil.copyfile(runtime, RUNTIME)
        print_text(f"{RUNTIME}: {runtime}")


def _presets() -> dict[str, Path]:
    """Return a dict from the name of each preset to its file in presets/, without the runtime files.

    Raises FileNotFoundError if there is no preset.
    """
    folder = Path("presets")
    presets = {path.stem: path for path in sorted(folder.glob("*.yaml")) if not path.stem.endswith(".runtime")}
    if not presets:
        raise FileNotFoundError(f"{folder.absolute()} contains no presets: run this command in the folder of the "
                                "project")
    return presets


def _preset_file(name: str) -> Path:
    """Return the file of a preset. If it does not exist, raise ValueError with the names of all presets."""
    presets = _presets()
    if name not in presets:
        raise ValueError(f"presets/{name}.yaml does not exist; the presets are: {', '.join(presets)}")
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

    The estimate needs no GPU. It shows the memory per GPU for each ZeRO level of DeepSpeed.

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
    """Print the manifest of a Kubernetes Job that runs one training phase.

    The Job uses the numbers of nodes and GPUs in runtime.yaml. See docs/cluster.md.

    Example: onediff manifest tune --image registry.example.com/onediff:1.0
    """
    from onediff.config import load_runtime
    from onediff.train.launch.kubernetes import manifest as kubernetes_manifest

    check_project()
    print_text(kubernetes_manifest(phase, load_runtime(), image=image).removesuffix("\n"))


def doctor(as_json: Json = False) -> None:
    """Check the installation and the project, and print how to fix each problem.

    The exit code is 1 if a problem prevents the use of OneDiff, and 0 otherwise.

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


def drift(days: Annotated[float, typer.Option(help="The number of days of the usage log to read, greater than 0 and at "
                                              "most 36500.")] = 7,
          model: Model = CHAMPION,
          profile: Annotated[Path | None, path_option(
              "--profile", help="A profile.json; without it, the profile that was registered with the model.")] = None,
          as_json: Json = False) -> None:
    """Check whether recent images and captions still resemble the dataset.

    The command compares the usage log, which lists the captions that users requested, with a profile that was measured
    on the `gate` split of the dataset. docs/watching.md explains each measured figure.

    The exit code is 0 if nothing drifted, 1 if at least one figure drifted, and 2 if drift cannot be measured, because
    there are too few captions, because the usage log, a setting or the profile is missing, or after any other error.

    Example: onediff drift --days 30 --json
    """
    try:
        from onediff.ops.drift import as_text, examine

        result = examine(days=days, model=model, profile=profile)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print_warning(error_message(error))
        raise typer.Exit(CANNOT_BE_MEASURED) from None
    except Exception:  # noqa: BLE001 - Python would exit with 1 after an unexpected error, which means "drifted".
        print_warning(traceback.format_exc())
        raise typer.Exit(CANNOT_BE_MEASURED) from None
    print_result(result.as_dict(), as_text(result), as_json)
    if result.moved or not result.figures:
        raise typer.Exit(1 if result.moved else CANNOT_BE_MEASURED)


def profile(out: Annotated[Path, path_argument("The folder in which profile.json is written.",
                                               parser=output_path)],
            model: Model = CHAMPION) -> None:
    """Measure the profile with which 'onediff drift' compares recent captions.

    The model captions pairs of the `gate` split. The registration of a model version measures a profile, so this
    command is needed only for a version that was registered without one.

    Example: onediff profile .onediff/profile --model models:/onediff/3
    """
    from onediff.files import check_new_file
    from onediff.ops.drift import PROFILE, load_settings, write_profile
    from onediff.ops.predict import folder_of

    check_new_file(out / PROFILE)
    print_text(write_profile(out, folder_of(model), num_pairs=load_settings().num_pairs))


def gc(yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove the listed items. Without this option, the "
                                         "command only lists them.")] = False,
       days: Annotated[float, typer.Option(min=0, help="Items that are younger than this many days are kept.")] = 30,
       as_json: Json = False) -> None:
    """Remove old files and MLflow runs that no registered model version needs.

    The command removes files of the DVC cache, MLflow runs, git branches, checkpoints and local copies of model
    versions.

    Example: onediff gc --days 90 --yes
    """
    from onediff.ops.housekeeping import KINDS, survey, sweep

    check_project()
    from flows.processes import pipeline_lock  # The import of flows creates .onediff, so check_project() runs first.

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
    """Delete MLflow runs permanently, if the MLflow server runs on this machine. Return a sentence about the result.

    If the server runs on another machine, only an administrator of that machine can delete the runs permanently.
    """
    from flows.services import databases, topology
    from onediff import tracking
    from onediff.config import load_runtime

    stack = topology.load_stack(load_runtime())
    if tracking.uri().rstrip("/") == stack.mlflow:
        return databases.purge(stack, runs)
    return (f"The MLflow server still stores {len(runs)} runs, marked as deleted: deploy/README.md says how an "
            "administrator removes them permanently.")
