"""The command `onediff`: thin. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from onediff.cli.data import app as data
from onediff.cli.housekeeping import app as housekeeping
from onediff.cli.lineage import app as lineage
from onediff.cli.registry import app as versions
from onediff.cli.scoring import app as scoring
from onediff.cli.watching import app as watching
from onediff.network import exempt_loopback_from_proxies
from onediff.paths import TRAINED

CHAMPION = "models:/onediff@champion"
EXAMPLE = Path(".onediff/example")

app = typer.Typer(help="Two images in, one sentence about what changed out.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(versions, name="registry")
app.add_typer(data, name="data")
for commands in (scoring, lineage, watching, housekeeping):
    app.add_typer(commands)  # at the top level

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Instruction = Annotated[str | None, typer.Option(help='Default: "What changed between the two images?"')]
Phase = Literal["align", "tune"]
Model = Annotated[str, typer.Option(help="A model folder, or an MLflow address such as models:/onediff/3.")]


@app.command()
def caption(before: Path, after: Path, model: Model = CHAMPION, instruction: Instruction = None,
            as_json: Json = False) -> None:
    """Say what changed between two images."""
    said = _captions([(before, after)], model, instruction)[0]
    _print({"before": str(before), "after": str(after), "caption": said, "model": model}, said, as_json)


@app.command()
def preset(name: str, force: Annotated[bool, typer.Option("--force", help="Overwrite own values.")] = False) -> None:
    """Write params.yaml from presets/NAME.yaml, comments included; runtime.yaml too if there is none."""
    from onediff.config import load_params, load_runtime

    known = {path.stem: path for path in sorted(Path("presets").glob("*.yaml")) if not path.stem.endswith(".runtime")}
    if name not in known:
        there = ", ".join(known) or "none here: run this in the project's folder"
        raise ValueError(f"presets/{name}.yaml not found; there are: {there}")
    load_params(known[name])
    target, runtime = Path("params.yaml"), Path("runtime.yaml")
    if target.exists() and not force and target.read_bytes() not in [path.read_bytes() for path in known.values()]:
        raise ValueError(f"{target} is no preset's, so it holds your own values: keep a copy, "
                         f"then 'onediff preset {name} --force'")
    shutil.copyfile(known[name], target)
    typer.echo(f"{target}: {name}")
    beside = Path(f"presets/{name}.runtime.yaml")
    if beside.exists() and not runtime.exists():
        load_runtime(beside)
        shutil.copyfile(beside, runtime)
        typer.echo(f"{runtime}: {beside}")


@app.command()
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

    found = find_gpu(gpu)
    if found is None:
        raise ValueError(f"--gpu {gpu} is not known; known are {', '.join(known.name for known in GPUS)}")
    config = load_params(Path(f"presets/{preset}.yaml") if preset else Path("params.yaml"))
    beside = Path(f"presets/{preset}.runtime.yaml")
    runtime = load_runtime(beside if beside.exists() else Path("runtime.yaml"))
    planned = planner.plan(config, runtime, gpu=found, num_gpus=gpus or runtime.num_ranks, utilisation=utilisation)
    _print(asdict(planned), planner.text(planned), as_json)


@app.command()
def example(as_json: Json = False) -> None:
    """Caption one pair of the test split, and leave its two images in .onediff/example."""
    from onediff.data.record import read_records

    record = next((record for record in read_records(Path("data/diffcap"), "test-*.parquet")
                   if record.change_type != "none" and record.source != "scenes_far"), None)
    if record is None:
        raise ValueError("data/diffcap: no changed pair in split test; give your own: 'onediff caption BEFORE AFTER'")
    EXAMPLE.mkdir(parents=True, exist_ok=True)
    pair = (EXAMPLE / "before.png", EXAMPLE / "after.png")
    for path, content in zip(pair, (record.before, record.after), strict=True):
        path.write_bytes(content)
    model = _champion_or_trained()
    said = _captions([pair], model)[0]  # asked as the printed command asks
    _print({"before": str(pair[0]), "after": str(pair[1]), "caption": said, "references": record.references,
            "model": model},
           f"An unseen test pair, captioned by {model}:\n  onediff caption {pair[0]} {pair[1]}"
           + ("" if model == CHAMPION else f" --model {model}")
           + f"\n  prediction: {said}\n  reference:  {record.references[0]}", as_json)


@app.command()
def report(against: Annotated[str, typer.Option(help="Another version, such as models:/onediff@previous.")] = CHAMPION,
           out: Path = Path(".onediff/report.html")) -> None:
    """data/report.html again, with the pairs on which the scored model loses most against another version."""
    from onediff.registry import scored_pairs
    from onediff.stages.report import make_page

    page, _ = make_page(against=scored_pairs(against))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    typer.echo(f"{out}: against {against}")


@app.command()
def manifest(phase: Annotated[Phase, typer.Argument(help="align or tune.")],
             image: Annotated[str, typer.Option(help="With this project installed.")] = "onediff:latest") -> None:
    """Print a Kubernetes Job that trains a phase on the nodes and GPUs of runtime.yaml; see docs/cluster.md."""
    from onediff.config import load_runtime
    from onediff.train.launch.kubernetes import manifest as rendered

    typer.echo(rendered(phase, load_runtime(), image=image), nl=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, which device, which parts are ready, what to do next."""
    from onediff.ops.doctor import examine

    findings = examine()
    lines = []
    for item in findings:
        lines.append(f"{'ok' if item.ok else '--'}  {item.name:<10} {item.found}")
        if not item.ok:
            lines.append(f"      -> {item.cure}")
    _print([vars(item) for item in findings], "\n".join(lines), as_json)
    if any(item.needed and not item.ok for item in findings):
        raise typer.Exit(1)


def main() -> None:
    exempt_loopback_from_proxies()
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"onediff: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"onediff: this needs the package {error.name}, which scoring alone does not: "
                 "pip install 'onediff-idc[full]', or 'make setup' in a clone")


def _captions(pairs: list[tuple[Path, Path]], model: str, instruction: str | None = None) -> list[str]:
    """The images are opened first: a wrong path is told at once, before a model is loaded."""
    from onediff.config import load_runtime
    from onediff.inputs.images import open_image
    from onediff.inputs.prompt import DEFAULT_INSTRUCTION
    from onediff.library_logs import silence_libraries
    from onediff.ops.predict import folder_of
    from onediff.serve.usage_log import caption_and_log, usage_log

    images = [(open_image(before), open_image(after)) for before, after in pairs]
    folder = folder_of(model)
    log = usage_log(load_runtime(), model, folder)
    silence_libraries()
    from onediff.model.captioner import Captioner

    return caption_and_log(Captioner.load(folder), log, [*pairs], images,
                           [instruction or DEFAULT_INSTRUCTION] * len(pairs))


def _champion_or_trained() -> str:
    from onediff.registry import model_folder

    try:
        model_folder(CHAMPION)
    except ValueError:  # nothing was promoted yet
        return str(TRAINED)
    return CHAMPION


def _print(values: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)


if __name__ == "__main__":
    main()
