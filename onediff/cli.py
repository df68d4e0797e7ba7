"""The command `onediff`: thin. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from onediff.data_commands import app as data

if TYPE_CHECKING:
    from onediff.config import Judge as JudgeSettings

CHAMPION = "models:/onediff@champion"
TRAINED = Path("data/models/tune")
EXAMPLE = Path(".onediff/example")

app = typer.Typer(help="Two images in, one sentence about what changed out.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
versions = typer.Typer(help="Versions of the model: list, register, promote, rollback.", no_args_is_help=True)
app.add_typer(versions, name="registry")
app.add_typer(data, name="data")

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Instruction = Annotated[str | None, typer.Option(help='Default: "What changed between the two images?"')]
Protocol = Annotated[str | None, typer.Option(help="Such as spot_the_diff/single: what its papers report, on "
                                              "the official test split or not at all.")]
Phase = Literal["align", "tune"]
Model = Annotated[str, typer.Option(help="A model folder, or an MLflow address such as models:/onediff/3.")]


@app.command()
def caption(before: Path, after: Path, model: Model = CHAMPION, instruction: Instruction = None,
            as_json: Json = False) -> None:
    """Say what changed between two images."""
    said = _captions([(before, after)], model, instruction)[0]
    _print({"before": str(before), "after": str(after), "caption": said, "model": model}, said, as_json)


@app.command()
def predict(benchmark: Annotated[str, typer.Argument(help="Its name in data/diffcap, such as scenes.")],
            out: Annotated[Path, typer.Option(help="JSONL for 'onediff score' and 'compare'.")],
            model: Annotated[str | None, typer.Option(help="A model folder, or an MLflow address.")] = None,
            chat: Annotated[str | None, typer.Option(help="A chat model of transformers that reads two images: a name "
                                                     "of the Hub or a folder.")] = None,
            cnn: Annotated[Path | None, typer.Option(help="A folder of 'python -m benchmarks.baselines'.")] = None,
            prompt: Annotated[str | None, typer.Option(help="What the chat model is asked after the two images; "
                                                       "{question} in it is the pair's own.")] = None,
            batch_size: Annotated[int, typer.Option(min=1, help="Pairs that the chat model reads at once.")] = 8,
            split: str = "test") -> None:
    """What a system says about every pair of a benchmark: ours, a chat model as it comes, or the Siamese CNN."""
    from onediff import predict as predictions

    if (model, chat, cnn).count(None) != 2:
        raise ValueError("one system is needed: give one of --model, --chat and --cnn")
    if chat is None and prompt is not None:
        raise ValueError("--prompt is for --chat: OneDiff is asked as its records say, the CNN reads no words")
    predictions.check_benchmark(benchmark, split)
    if chat is not None:
        system, asked = predictions.chat(chat, prompt=prompt, batch_size=batch_size)
        typer.echo(f"prompt, after both images: {asked}")
    else:
        system = predictions.siamese_cnn(cnn) if cnn else predictions.onediff(_folder(str(model)))
    number = predictions.write_predictions(benchmark, system, out, split=split)
    typer.echo(f"{out}: {number} predictions, {benchmark}, split {split}")


@app.command()
def references(benchmark: Annotated[str, typer.Argument(help="Its name in data/diffcap, such as scenes.")],
               out: Annotated[Path, typer.Option(help="JSONL for 'onediff score' and 'compare'.")],
               split: str = "test") -> None:
    """What people or the generator say about every pair of a benchmark, and which pairs are of one scene."""
    from onediff.predict import write_references

    number = write_references(benchmark, out, split=split)
    typer.echo(f"{out}: references of {number} pairs, {benchmark}, split {split}")


@app.command()
def score(predictions: Annotated[list[Path], typer.Option(help='JSONL lines {"pair_id", "prediction"}. Given more than '
                                                          'once, one for each seed: mean and spread.')],
          references: Annotated[Path, typer.Option(help='JSONL lines {"pair_id", "references": [...]}; with a protocol '
                                                   'also the benchmark\'s annotation file as published.')],
          protocol: Protocol = None,
          spice: Annotated[bool, typer.Option("--spice", help="SPICE, too: slow, and at first use it downloads "
                                              "Stanford CoreNLP (384 MB) to ~/.cache/onediff/spice.")] = False,
          as_json: Json = False) -> None:
    """BLEU, METEOR, ROUGE-L (0 to 1) and CIDEr (0 to 10) as by the COCO toolkit, with 95 % intervals by bootstrap."""
    from onediff.eval.metrics import METRICS, OPTIONAL
    from onediff.eval.protocols import score_files

    metrics = METRICS + OPTIONAL if spice else METRICS
    found = score_files(predictions, references, key=protocol, metrics=metrics)
    lines = [f"{name:<10} {found[name]:.4f}  "
             + ("[{:.4f}, {:.4f}]".format(*found["intervals"][name]) if "intervals" in found
                else f"+- {found['spread'][name]:.4f}, {found['num_runs']} runs") for name in metrics]
    lines.append(f"{found['num_pairs']} pairs in {found['num_groups']} groups, {found['protocol']}")
    _print(found, "\n".join([*lines, *(_peers(protocol) if protocol else [])]), as_json)


def _peers(benchmark: str) -> list[str]:
    """Published numbers of the same protocol, in the scale of ours."""
    from onediff.eval.published import doubts, published

    told = [f"{'CIDEr':<10} {row['CIDEr'] / 100:.4f}  {row['system']}"
            + (f" ({doubts(row)})" if doubts(row) else "") for row in published(benchmark)]
    return ["published, not run here:", *told] if told else []


@app.command()
def compare(first: Annotated[Path, typer.Argument(help='JSONL lines {"pair_id", "prediction"}.')], second: Path,
            references: Annotated[Path, typer.Option(help='JSONL lines {"pair_id", "references": [...]} and, for pairs '
                                                     'of one scene or photograph, the same "group_id".')],
            protocol: Protocol = None, as_json: Json = False) -> None:
    """Whether one system's captions score higher than another's: differences with 95 % intervals, by bootstrap."""
    from onediff.eval.metrics import METRICS
    from onediff.eval.protocols import compare_files

    found = compare_files(first, second, references, key=protocol)
    lines = [f"{'':<10} {'first':>8} {'second':>8} {'difference and its 95 % interval':>36}        p"]
    for name in METRICS:
        m = found[name]
        shown = f"{m['first'] - m['second']:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}]"
        lines.append(f"{name:<10} {m['first']:>8.4f} {m['second']:>8.4f} {shown:>36} {m['p']:>8.4f}")
    lines.append(f"{found['num_pairs']} pairs in {found['num_groups']} groups, {found['resamples']} resamples of them, "
                 f"{found['protocol']}")
    _print(found, "\n".join(lines), as_json)


@app.command()
def judge(predictions: Annotated[Path, typer.Option(help='JSONL lines {"pair_id", "prediction"}.')],
          references: Annotated[Path | None, typer.Option(help='JSONL lines {"pair_id", "references": [...]}, and '
                                                          '"group_id" as for compare.')] = None,
          model: Annotated[str | None, typer.Option(help="Default: params.yaml's judge.")] = None,
          base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible; default: runtime.yaml's "
                                                            "writer_url.")] = None,
          truth: Annotated[str | None, typer.Option(help="Whose grammar knows the truth: scenes, scenes_far or edits. "
                                                         "Tells what the judge is worth.")] = None,
          shards: Annotated[Path, typer.Option(help="Where --truth finds its pairs.")] = Path("data/diffcap"),
          out: Annotated[Path | None, typer.Option(help="JSONL with every verdict.")] = None,
          as_json: Json = False) -> None:
    """Ask a language model whether captions state the change and invent none; answers are paid for once and kept."""
    from dataclasses import asdict

    from onediff.config import load_runtime
    from onediff.eval import judge as judging

    runtime = load_runtime()
    runtime = runtime.model_copy(update={"writer_url": base_url or runtime.writer_url})
    result, verdicts = judging.judge_files(predictions, references, _judge(model), runtime, known=truth, shards=shards)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts)
        out.write_text("".join(lines), encoding="utf-8")
    _print(result, judging.as_text(result), as_json)


@app.command()
def audit(train: Annotated[Path, typer.Argument(help="A folder of shards, a folder as published or of your own pairs, "
                                                     "or a JSON list of LLaVA's rows.")],
          benchmark: Annotated[Path, typer.Argument(help="A folder of shards, or one as published.")],
          images: Annotated[Path | None, typer.Option(help="Where the images of LLaVA's rows are; default: beside the "
                                                           "file.")] = None,
          split: Annotated[str, typer.Option(help="Of the benchmark: test, gate or val.")] = "test",
          train_split: Annotated[str, typer.Option(help="Of a training set that has splits.")] = "train",
          source: Annotated[str | None, typer.Option(help="The benchmark's published set, if its folder is not called "
                                                          "so.")] = None,
          train_source: Annotated[str | None, typer.Option(help="The same of the training set.")] = None,
          max_distance: Annotated[float, typer.Option(min=0, help="Grey levels up to which images are near.")] = 2.0,
          out: Annotated[Path | None, typer.Option(help="JSONL with every finding.")] = None,
          fail: Annotated[bool, typer.Option("--fail", help="Exit code 1 if a pair leaks.")] = False,
          as_json: Json = False) -> None:
    """Whether a training set, ours or others', holds images or captions of a benchmark's test pairs."""
    from onediff.config import load_runtime
    from onediff.data import audit as auditing
    from onediff.data.audited import rows_of

    runtime = load_runtime()
    trained = rows_of(train, split=train_split, scratch=Path(runtime.scratch), source=train_source, images=images)
    tested = rows_of(benchmark, split=split, scratch=Path(runtime.scratch), source=source)
    result = auditing.audit_to(out, trained, tested, max_distance=max_distance, runtime=runtime)
    _print(result | {"verdict": auditing.verdict(result)}, auditing.as_text(result), as_json)
    if fail and result["leaks"]:
        raise typer.Exit(1)


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
    from onediff.train.launch.manifest import manifest as rendered

    typer.echo(rendered(phase, load_runtime(), image=image), nl=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, which device, which parts are ready, what to do next."""
    from onediff.doctor import examine

    findings = examine()
    lines = []
    for item in findings:
        lines.append(f"{'ok' if item.ok else '--'}  {item.name:<10} {item.found}")
        if not item.ok:
            lines.append(f"      -> {item.cure}")
    _print([vars(item) for item in findings], "\n".join(lines), as_json)
    if any(item.needed and not item.ok for item in findings):
        raise typer.Exit(1)


@versions.command("list")
def list_versions(as_json: Json = False) -> None:
    """Every version, newest first, with its aliases and gate scores."""
    from onediff import registry

    rows = registry.list_versions()
    _print(rows, "\n".join(_version_text(row) for row in rows) or "no version yet: 'make run' registers one", as_json)


@versions.command()
def register(model: Annotated[Path, typer.Option(help="The model folder.")] = TRAINED) -> None:
    """Make the trained model a version and the candidate; the same weights stay the same version."""
    from onediff import registry

    version = registry.register(model, Path("data/metrics.json"), Path("data/gate.json"), Path("data/scored"))
    typer.echo(f"version {version} is the candidate")


@versions.command()
def promote(version: Annotated[str | None, typer.Argument(help="Default: the candidate.")] = None) -> None:
    """Make a version champion if mlflow/promotion.yaml lets it."""
    from onediff import registry

    verdict = registry.promote(version)
    if not verdict.promoted:
        raise ValueError("\n  ".join([f"version {verdict.version} is refused:", *verdict.reasons]))
    was = f"; version {verdict.replaced} was" if verdict.replaced else ""
    typer.echo(f"version {verdict.version} is champion{was}")


@versions.command()
def rollback() -> None:
    """Make the previous champion champion again."""
    from onediff import registry

    typer.echo(f"version {registry.rollback()} is champion again")


def main() -> None:
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"onediff: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"onediff: this needs the package {error.name}, which scoring alone does not: "
                 "pip install 'onediff-idc[full]', or 'make setup' in a clone")


def _judge(model: str | None) -> JudgeSettings:
    """params.yaml's, with another model if one is named. Raises ValueError if neither names one."""
    from onediff.config import Judge, load_params

    settings = load_params().judge if Path("params.yaml").exists() else None
    if model is None and settings is None:
        raise ValueError("params.yaml: judge: is not set, so no model is known: name one with --model, or write the "
                         "section as presets/paper.yaml has it")
    return settings.model_copy(update={"model": model or settings.model}) if settings else Judge(model=str(model))


def _captions(pairs: list[tuple[Path, Path]], model: str, instruction: str | None = None) -> list[str]:
    """The images are opened first: a wrong path is told at once, before a model is loaded."""
    from onediff.inputs.images import open_image
    from onediff.stages import quiet

    images = [(open_image(before), open_image(after)) for before, after in pairs]
    folder = _folder(model)
    quiet()
    from onediff.model.captioner import Captioner

    return Captioner.load(folder).caption(images, instructions=[instruction] * len(pairs) if instruction else None)


def _folder(model: str) -> Path:
    if model.startswith("models:/"):
        from onediff.registry import model_folder

        return model_folder(model)
    if not (Path(model) / "config.json").exists():
        raise FileNotFoundError(f"{model} is no model folder (no config.json in it): name one that 'make run' made, "
                                f"such as {TRAINED}, or {CHAMPION}")
    return Path(model)


def _champion_or_trained() -> str:
    from onediff.registry import model_folder

    try:
        model_folder(CHAMPION)
    except ValueError:  # nothing was promoted yet
        return str(TRAINED)
    return CHAMPION


def _version_text(row: dict[str, Any]) -> str:
    scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
    why = row["history"].get("refused_because") or row["history"].get("reason") or ""
    return "\n  ".join([f"version {row['version']}  {', '.join(row['aliases']) or '-'}  {row['created']}  "
                        f"weights {row['weights_digest'][:12]}", *filter(None, [scores, why])])


def _print(values: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)


if __name__ == "__main__":
    main()
