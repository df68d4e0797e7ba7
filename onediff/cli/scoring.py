"""Scoring: what any system says of a benchmark, what that scores, whether it saw the test set. Thin, like cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from onediff.config import Judge as JudgeSettings

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Protocol = Annotated[str | None, typer.Option(help="Such as spot_the_diff/single: what its papers report, on "
                                              "the official test split or not at all.")]


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
    from onediff.ops import predict as predictions

    if (model, chat, cnn).count(None) != 2:
        raise ValueError("one system is needed: give one of --model, --chat and --cnn")
    if chat is None and prompt is not None:
        raise ValueError("--prompt is for --chat: OneDiff is asked as its records say, the CNN reads no words")
    predictions.check_benchmark(benchmark, split)
    if chat is not None:
        system, asked = predictions.chat(chat, prompt=prompt, batch_size=batch_size)
        typer.echo(f"prompt, after both images: {asked}")
    else:
        system = predictions.siamese_cnn(cnn) if cnn else predictions.onediff(predictions.folder_of(str(model)))
    number = predictions.write_predictions(benchmark, system, out, split=split)
    typer.echo(f"{out}: {number} predictions, {benchmark}, split {split}")


@app.command()
def references(benchmark: Annotated[str, typer.Argument(help="Its name in data/diffcap, such as scenes.")],
               out: Annotated[Path, typer.Option(help="JSONL for 'onediff score' and 'compare'.")],
               split: str = "test") -> None:
    """What people or the generator say about every pair of a benchmark, and which pairs are of one scene."""
    from onediff.ops.predict import write_references

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
    from onediff.eval.metrics.catalog import METRICS, OPTIONAL
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
    from onediff.eval.report.figures import doubts, published

    told = [f"{'CIDEr':<10} {row['CIDEr'] / 100:.4f}  {row['system']}"
            + (f" ({doubts(row)})" if doubts(row) else "") for row in published(benchmark)]
    return ["published, not run here:", *told] if told else []


@app.command()
def compare(first: Annotated[Path, typer.Argument(help='JSONL lines {"pair_id", "prediction"}.')], second: Path,
            references: Annotated[Path, typer.Option(help='JSONL lines {"pair_id", "references": [...]} and, for pairs '
                                                     'of one scene or photograph, the same "group_id".')],
            protocol: Protocol = None, as_json: Json = False) -> None:
    """Whether one system's captions score higher than another's: differences with 95 % intervals, by bootstrap."""
    from onediff.eval.metrics.catalog import METRICS
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
    from onediff.eval.analysis import judge as judging

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
    from onediff.data.overlap import audit as auditing
    from onediff.data.overlap.datasets import rows_of

    runtime = load_runtime()
    trained = rows_of(train, split=train_split, scratch=Path(runtime.scratch), source=train_source, images=images)
    tested = rows_of(benchmark, split=split, scratch=Path(runtime.scratch), source=source)
    result = auditing.audit_to(out, trained, tested, max_distance=max_distance, runtime=runtime)
    _print(result | {"verdict": auditing.verdict(result)}, auditing.as_text(result), as_json)
    if fail and result["leaks"]:
        raise typer.Exit(1)


def _judge(model: str | None) -> JudgeSettings:
    """params.yaml's, with another model if one is named. Raises ValueError if neither names one."""
    from onediff.config import Judge, load_params

    settings = load_params().judge if Path("params.yaml").exists() else None
    if model is None and settings is None:
        raise ValueError("params.yaml: judge: is not set, so no model is known: name one with --model, or write the "
                         "section as presets/paper.yaml has it")
    return settings.model_copy(update={"model": model or settings.model}) if settings else Judge(model=str(model))


def _print(values: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False) if as_json else text)
