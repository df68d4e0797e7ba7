"""Captions and scores: `onediff caption`, `example`, `predict`, `references`, `score`, `compare` and so on."""

from pathlib import Path
from typing import Annotated

import typer

from onediff.cli.output import Json, Model, print_result, print_text
from onediff.paths import CHAMPION, DIFFCAP, PARAMS, TRAINED

EXAMPLE = Path(".onediff/example")
NEXT = """
Report:    data/report.html; 'make report' opens it
MLflow:    'make ui' shows runs, scores and versions
Your pair: source .venv/bin/activate && onediff caption BEFORE AFTER
Your data: data/README.md describes how to add pairs; then 'make run' again"""

Protocol = Annotated[str | None, typer.Option(help="Such as spot_the_diff/single: what its papers report, on "
                                              "the official test split or not at all.")]


def caption(before: Path, after: Path, model: Model = CHAMPION,
            instruction: Annotated[str | None, typer.Option(
                help='Default: "What changed between the two images?"')] = None,
            as_json: Json = False) -> None:
    """Say what changed between two images."""
    text = _caption(before, after, model, instruction)
    print_result({"before": str(before), "after": str(after), "caption": text, "model": model}, text, as_json)


def example(as_json: Json = False) -> None:
    """Caption one pair of the test split, save the two images in .onediff/example, and show the main scores."""
    from onediff.data.record import read_records
    from onediff.ops.results import score_table
    from onediff.registry import model_folder

    record = next((record for record in read_records(DIFFCAP, "test-*.parquet")
                   if record.change_type != "none" and record.source != "scenes_far"), None)
    if record is None:
        raise ValueError("data/diffcap: split test must have a pair with a change, but has none: caption a pair of "
                         "your own with 'onediff caption BEFORE AFTER'")
    EXAMPLE.mkdir(parents=True, exist_ok=True)
    before, after = EXAMPLE / "before.png", EXAMPLE / "after.png"
    before.write_bytes(record.before)
    after.write_bytes(record.after)
    model = CHAMPION
    try:
        model_folder(CHAMPION)
    except ValueError:  # No version has been promoted yet, so the newest trained model captions the pair.
        model = str(TRAINED)
    text = _caption(before, after, model, None)
    print_result({"before": str(before), "after": str(after), "caption": text, "references": record.references,
                  "model": model},
                 f"An unseen test pair, captioned by {model}:\n  onediff caption {before} {after}"
                 + ("" if model == CHAMPION else f" --model {model}")
                 + f"\n  prediction: {text}\n  reference:  {record.references[0]}\n\n{score_table()}\n{NEXT}", as_json)


def _caption(before: Path, after: Path, model: str, instruction: str | None) -> str:
    """Opens the images before it loads the model, so that a wrong path is reported without delay."""
    from onediff.config import load_runtime
    from onediff.inputs.images import open_image
    from onediff.inputs.prompt import DEFAULT_INSTRUCTION
    from onediff.library_logs import silence_libraries
    from onediff.ops.predict import folder_of
    from onediff.serve.usage_log import caption_and_log, usage_log

    pair = open_image(before), open_image(after)
    folder = folder_of(model)
    log = usage_log(load_runtime(), model, folder)
    silence_libraries()
    from onediff.model.captioner import Captioner

    return caption_and_log(Captioner.load(folder), log, [(before, after)], [pair],
                           [instruction or DEFAULT_INSTRUCTION])[0]


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
    from onediff.ops import predict as systems

    if (model, chat, cnn).count(None) != 2:
        raise ValueError("one system is needed: give one of --model, --chat and --cnn")
    if chat is None and prompt is not None:
        raise ValueError("--prompt is for --chat: OneDiff is asked as its records say, the CNN reads no words")
    systems.check_benchmark(benchmark, split)
    if chat is not None:
        system, full_prompt = systems.chat(chat, prompt=prompt, batch_size=batch_size)
        print_text(f"prompt, after both images: {full_prompt}")
    else:
        system = systems.siamese_cnn(cnn) if cnn else systems.onediff(systems.folder_of(str(model)))
    num_predictions = systems.write_predictions(benchmark, system, out, split=split)
    print_text(f"{out}: {num_predictions} predictions, {benchmark}, split {split}")


def references(benchmark: Annotated[str, typer.Argument(help="Its name in data/diffcap, such as scenes.")],
               out: Annotated[Path, typer.Option(help="JSONL for 'onediff score' and 'compare'.")],
               split: str = "test") -> None:
    """What people or the generator say about every pair of a benchmark, and which pairs are of one scene."""
    from onediff.ops.predict import write_references

    num_pairs = write_references(benchmark, out, split=split)
    print_text(f"{out}: references of {num_pairs} pairs, {benchmark}, split {split}")


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
    from onediff.eval.report.peers import doubts, published

    metrics = METRICS + OPTIONAL if spice else METRICS
    scores = score_files(predictions, references, key=protocol, metrics=metrics)
    lines = [f"{name:<10} {scores[name]:.4f}  "
             + ("[{:.4f}, {:.4f}]".format(*scores["intervals"][name]) if "intervals" in scores
                else f"+- {scores['spread'][name]:.4f}, {scores['num_runs']} runs") for name in metrics]
    lines.append(f"{scores['num_pairs']} pairs in {scores['num_groups']} groups, {scores['protocol']}")
    # Published numbers of the same protocol, in the scale of ours.
    peers = [f"{'CIDEr':<10} {row['CIDEr'] / 100:.4f}  {row['system']}" + (f" ({doubts(row)})" if doubts(row) else "")
             for row in (published(protocol) if protocol else ())]
    lines += ["published, not run here:", *peers] if peers else []
    print_result(scores, "\n".join(lines), as_json)


def compare(first: Annotated[Path, typer.Argument(help='JSONL lines {"pair_id", "prediction"}.')], second: Path,
            references: Annotated[Path, typer.Option(help='JSONL lines {"pair_id", "references": [...]} and, for pairs '
                                                     'of one scene or photograph, the same "group_id".')],
            protocol: Protocol = None, as_json: Json = False) -> None:
    """Whether one system's captions score higher than another's: differences with 95 % intervals, by bootstrap."""
    from onediff.eval.metrics.catalog import METRICS
    from onediff.eval.protocols import compare_files

    differences = compare_files(first, second, references, key=protocol)
    lines = [f"{'':<10} {'first':>8} {'second':>8} {'difference and its 95 % interval':>36}        p"]
    for name in METRICS:
        metric = differences[name]
        first_score, second_score = metric["first"], metric["second"]
        interval = f"{first_score - second_score:+.4f} [{metric['low']:+.4f}, {metric['high']:+.4f}]"
        lines.append(f"{name:<10} {first_score:>8.4f} {second_score:>8.4f} {interval:>36} {metric['p']:>8.4f}")
    lines.append(f"{differences['num_pairs']} pairs in {differences['num_groups']} groups, "
                 f"{differences['resamples']} resamples of them, {differences['protocol']}")
    print_result(differences, "\n".join(lines), as_json)


def judge(predictions: Annotated[Path, typer.Option(help='JSONL lines {"pair_id", "prediction"}.')],
          references: Annotated[Path | None, typer.Option(help='JSONL lines {"pair_id", "references": [...]}, and '
                                                          '"group_id" as for compare.')] = None,
          model: Annotated[str | None, typer.Option(help="Default: params.yaml's judge.")] = None,
          base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible; default: runtime.yaml's "
                                                            "writer_url.")] = None,
          truth: Annotated[str | None, typer.Option(help="Whose grammar knows the truth: scenes, scenes_far or edits. "
                                                         "Tells what the judge is worth.")] = None,
          shards: Annotated[Path, typer.Option(help="Where --truth finds its pairs.")] = DIFFCAP,
          out: Annotated[Path | None, typer.Option(help="JSONL with every verdict.")] = None,
          as_json: Json = False) -> None:
    """Ask a language model whether captions state the change and invent none; answers are paid for once and kept."""
    from dataclasses import asdict

    from onediff.config import Judge, load_params, load_runtime
    from onediff.eval.analysis import judge as judging
    from onediff.files import write_jsonl

    settings = load_params().judge if PARAMS.exists() else None
    if model is not None:
        settings = settings.model_copy(update={"model": model}) if settings else Judge(model=model)
    if settings is None:
        raise ValueError("params.yaml: judge: is not set, so no model is known: name one with --model, or write the "
                         "section as presets/paper.yaml has it")
    runtime = load_runtime()
    runtime = runtime.model_copy(update={"writer_url": base_url or runtime.writer_url})
    result, verdicts = judging.judge_files(predictions, references, settings, runtime, known=truth, shards=shards)
    if out is not None:
        write_jsonl(out, map(asdict, verdicts))
    print_result(result, judging.as_text(result), as_json)


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
    from onediff.data.overlap.datasets import read_examples

    runtime = load_runtime()
    scratch = Path(runtime.scratch)
    train_examples = read_examples(train, split=train_split, scratch=scratch, source=train_source, images=images)
    test_examples = read_examples(benchmark, split=split, scratch=scratch, source=source)
    result = auditing.audit(train_examples, test_examples, out=out, max_distance=max_distance, runtime=runtime)
    print_result(result | {"verdict": auditing.verdict(result)}, auditing.as_text(result), as_json)
    if fail and result["leaks"]:
        raise typer.Exit(1)


def report(against: Annotated[str, typer.Option(help="Another version, such as models:/onediff@previous.")] = CHAMPION,
           out: Path = Path(".onediff/report.html")) -> None:
    """data/report.html again, with the pairs on which the scored model loses most against another version."""
    from onediff.files import write_text
    from onediff.registry import scored_pairs
    from onediff.stages.report import make_page

    page, _ = make_page(against=scored_pairs(against))
    write_text(out, page)
    print_text(f"{out}: against {against}")
