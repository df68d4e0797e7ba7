"""The commands for captions and scores: `onediff caption`, `predict`, `score`, `compare`, `judge`, `audit` and more."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from onediff.cli.output import Json, Model, out_option, path_argument, path_option, print_result, print_text
from onediff.files import check_new_file, find_file, read_json, write_jsonl, write_text
from onediff.paths import CHAMPION, DIFFCAP, PARAMS, SCORED, TRAINED

EXAMPLE = Path(".onediff/example")
NEXT = """
Report:    data/report.html; 'make report' opens it
MLflow:    'make ui' shows runs, scores and versions
Your pair: source .venv/bin/activate && onediff caption BEFORE AFTER
Your data: docs/own-pairs.md explains how to train on your own pairs"""

Protocol = Annotated[str | None, typer.Option(help="A benchmark's scoring protocol, such as spot_the_diff/single. It "
                                              "scores only the complete official test split, as papers do.")]
Benchmark = Annotated[str, typer.Argument(help="The name of a benchmark in data/diffcap, such as scenes.")]
Split = Annotated[Literal["train", "val", "gate", "test"], typer.Option(help="The split of the benchmark.")]
CaptionFile = Annotated[Path, out_option("The file to write; 'onediff score' and 'onediff compare' read it.")]
Form = Annotated[Literal["jsonl", "coco"], typer.Option("--format", help="The format of the file: JSON lines, or the "
                                                        "results and annotations of COCO.")]


def caption(before: Annotated[Path, path_argument("The image before the change.")],
            after: Annotated[Path, path_argument("The image after the change.")],
            model: Model = CHAMPION,
            instruction: Annotated[str | None, typer.Option(
                help='The question to the model. Default: "What changed between the two images?"')] = None,
            as_json: Json = False) -> None:
    """Describe in one sentence what changed between two images.

    Example: onediff caption before.png after.png

    Example: onediff caption before.png after.png --model data/models/tune --json
    """
    text = _caption(before, after, model, instruction)
    print_result({"before": str(before), "after": str(after), "caption": text, "model": model}, text, as_json)


def example(as_json: Json = False) -> None:
    """Caption one pair of the test split, and show the main scores.

    The command saves the two images of the pair to the folder .onediff/example.

    Example: onediff example
    """
    from onediff.data.record import read_records
    from onediff.ops.results import score_table
    from onediff.registry import model_folder

    record = next((record for record in read_records(DIFFCAP, "test-*.parquet")
                   if record.change_type != "none" and record.source != "scenes_far"), None)
    if record is None:
        raise ValueError("data/diffcap: the split test must have an image pair with a change, but has none: caption "
                         "your own images with 'onediff caption BEFORE AFTER'")
    EXAMPLE.mkdir(parents=True, exist_ok=True)
    before, after = EXAMPLE / "before.png", EXAMPLE / "after.png"
    before.write_bytes(record.before)
    after.write_bytes(record.after)
    model = CHAMPION
    try:
        model_folder(CHAMPION)
    except ValueError:  # No model version is champion yet, so the model in data/models/tune captions the pair.
        model = str(TRAINED)
    text = _caption(before, after, model, None)
    print_result({"before": str(before), "after": str(after), "caption": text, "references": record.references,
                  "model": model},
                 f"An unseen test pair, captioned by {model}:\n  onediff caption {before} {after}"
                 + ("" if model == CHAMPION else f" --model {model}")
                 + f"\n  prediction: {text}\n  reference:  {record.references[0]}\n\n{score_table()}\n{NEXT}", as_json)


def _caption(before: Path, after: Path, model: str, instruction: str | None) -> str:
    """Return the caption of one pair. The images are opened before the model loads, to report a wrong path at once."""
    from onediff.config import load_runtime
    from onediff.inputs.images import open_image
    from onediff.inputs.prompt import DEFAULT_INSTRUCTION
    from onediff.library_logs import silence_libraries
    from onediff.ops.predict import folder_of
    from onediff.serve.usage_log import caption_and_log, usage_log

    before, after = (find_file(path) or path for path in (before, after))
    pair = open_image(before), open_image(after)
    folder = folder_of(model)
    log = usage_log(load_runtime(), model, folder)
    silence_libraries()
    from onediff.model.captioner import Captioner

    return caption_and_log(Captioner.load(folder), log, [(before, after)], [pair],
                           [instruction or DEFAULT_INSTRUCTION])[0]


def predict(benchmark: Benchmark, out: CaptionFile,
            model: Annotated[str | None, typer.Option("--model", "-m", help="A OneDiff model: a folder, or a "
                                                      "registered version.")] = None,
            chat: Annotated[str | None, typer.Option(help="A chat model of transformers that reads two images: a name "
                                                     "on the Hugging Face Hub, or a folder.")] = None,
            cnn: Annotated[Path | None, path_option("--cnn", help="The folder of a Siamese CNN that 'python -m "
                                                    "benchmarks.baselines' trained.")] = None,
            prompt: Annotated[str | None, typer.Option(help="The chat model's prompt after the two images. {question} "
                                                       "in it is replaced by the question of the pair.")] = None,
            batch_size: Annotated[int, typer.Option(min=1, help="The number of pairs that the chat model reads at "
                                                    "once.")] = 8,
            split: Split = "test", form: Form = "jsonl") -> None:
    """Write the captions of one system for every pair of a benchmark.

    Choose the system that writes the captions with one of --model, --chat and --cnn.

    Example: onediff predict scenes -o predictions.jsonl --model data/models/tune
    """
    from onediff.ops import predict as systems

    if (model, chat, cnn).count(None) != 2:
        raise ValueError("exactly one system must write the captions: give one of --model, --chat and --cnn")
    if chat is None and prompt is not None:
        raise ValueError("--prompt works only with --chat: a OneDiff model reads the instruction of each pair, and a "
                         "CNN reads no text")
    systems.check_benchmark(benchmark, split)
    check_new_file(out)
    if chat is not None:
        system, full_prompt = systems.chat(chat, prompt=prompt, batch_size=batch_size)
        print_text(f"prompt, after both images: {full_prompt}")
    else:
        system = systems.siamese_cnn(cnn) if cnn else systems.onediff(systems.folder_of(str(model)))
    num_predictions = systems.write_predictions(benchmark, system, out, split=split, form=form)
    print_text(f"{out}: {num_predictions} predictions, {benchmark}, split {split}")


def references(benchmark: Benchmark, out: CaptionFile, split: Split = "test", form: Form = "jsonl") -> None:
    """Write the reference captions of every pair of a benchmark.

    The file also contains the group of the pair: pairs of one scene share a group.

    Example: onediff references scenes -o references.jsonl

    Example: onediff references scenes -o references.json --format coco
    """
    from onediff.ops.predict import write_references

    num_pairs = write_references(benchmark, out, split=split, form=form)
    print_text(f"{out}: references of {num_pairs} pairs, {benchmark}, split {split}")


def score(predictions: Annotated[list[Path], path_option(
              "--predictions", "-p", help='JSON lines {"pair_id", "prediction"}, or results of COCO. Repeat the option '
                                          "with one file for each seed to get mean and spread.")],
          references: Annotated[Path, path_option(
              "--references", "-r", help='JSON lines {"pair_id", "references": [...]}, or annotations of COCO. With '
                                         "--protocol, also the annotation file that the benchmark's authors "
                                         "publish.")],
          protocol: Protocol = None,
          spice: Annotated[bool, typer.Option("--spice", help="Compute SPICE too. It is slow, and the first use "
                                              "downloads Stanford CoreNLP (384 MB) to "
                                              "~/.cache/onediff/spice.")] = False,
          as_json: Json = False) -> None:
    """Score predicted captions against reference captions.

    The COCO caption toolkit computes BLEU, METEOR and ROUGE-L (0 to 1) and CIDEr (0 to 10). For one file of
    predictions, the command also prints 95 % bootstrap intervals.

    Example: onediff score -p predictions.jsonl -r references.jsonl
    """
    from onediff.eval.metrics.catalog import METRICS, OPTIONAL
    from onediff.eval.protocols import score_files
    from onediff.eval.report.peers import doubts, published

    metrics = METRICS + OPTIONAL if spice else METRICS
    scores = score_files(predictions, references, key=protocol, metrics=metrics)
    lines = [f"{name:<10} {scores[name]:.4f}  "
             + ("[{:.4f}, {:.4f}]".format(*scores["intervals"][name]) if "intervals" in scores
                else f"+- {scores['spread'][name]:.4f}, {scores['num_runs']} runs") for name in metrics]
    lines.append(f"{scores['num_pairs']} pairs in {scores['num_groups']} groups, {scores['protocol']}")
    # Papers print CIDEr times 100, but this command prints it on the scale from 0 to 10.
    peers = [f"{'CIDEr':<10} {row['CIDEr'] / 100:.4f}  {row['system']}" + (f" ({doubts(row)})" if doubts(row) else "")
             for row in (published(protocol) if protocol else ())]
    lines += ["published results, not reproduced here:", *peers] if peers else []
    print_result(scores, "\n".join(lines), as_json)


def compare(first: Annotated[Path, path_argument('The predictions of the first system, as for "onediff score".')],
            second: Annotated[Path, path_argument("The predictions of the second system, for the same pairs.")],
            references: Annotated[Path, path_option(
                "--references", "-r", help='References as for "onediff score". Pairs of one scene or photograph need '
                                           'the same "group_id".')],
            protocol: Protocol = None, as_json: Json = False) -> None:
    """Test whether one system scores higher than another.

    For each metric, the command prints the difference of the two systems with a 95 % bootstrap interval and a p-value.

    Example: onediff compare ours.jsonl theirs.jsonl -r references.jsonl
    """
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


def judge(predictions: Annotated[Path, path_option("--predictions", "-p",
                                                   help='Predictions as for "onediff score".')],
          references: Annotated[Path | None, path_option(
              "--references", "-r", help="References as for 'onediff score', with group_id as for 'onediff "
                                         "compare'.")] = None,
          model: Annotated[str | None, typer.Option("--model", "-m", help="The name of the language model; without it, "
                                                    "the one in section judge of params.yaml.")] = None,
          base_url: Annotated[str | None, typer.Option(help="The address of an OpenAI-compatible server; without it, "
                                                            "writer_url of runtime.yaml.")] = None,
          truth: Annotated[str | None, typer.Option(
              help="A source whose true changes are known: scenes, scenes_far or edits. The command then also measures "
                   "how often the judge is right.")] = None,
          shards: Annotated[Path, path_option("--shards", help="The folder with the pairs for --truth.")] = DIFFCAP,
          out: Annotated[Path | None, out_option("A JSON lines file for every verdict.")] = None,
          as_json: Json = False) -> None:
    """Ask a language model whether captions are correct.

    A caption is correct if it states the change and invents no other change. The answers of the language model are
    stored, so that no request is paid for twice.

    Example: onediff judge -p predictions.jsonl -r references.jsonl
    """
    from dataclasses import asdict

    from onediff.config import Judge, load_params, load_runtime
    from onediff.eval.analysis import judge as judging

    settings = load_params().judge if PARAMS.exists() else None
    if model is not None:
        settings = settings.model_copy(update={"model": model}) if settings else Judge(model=model)
    if settings is None:
        raise ValueError("params.yaml: judge: is not set, so the command does not know which language model to ask: "
                         "give --model, or copy the section judge from presets/paper.yaml")
    runtime = load_runtime().model_copy(update={"writer_url": base_url} if base_url else {})
    if out is not None:
        check_new_file(out)
    result, verdicts = judging.judge_files(predictions, references, settings, runtime, known=truth, shards=shards)
    if out is not None:
        write_jsonl(out, map(asdict, verdicts))
    print_result(result, judging.as_text(result), as_json)


def audit(train: Annotated[Path, path_argument("The training set: a folder of shards, a published set, your own "
                                               "pairs, or a JSON list in LLaVA's format.")],
          benchmark: Annotated[Path, path_argument("The benchmark: a folder of shards, or a published set.")],
          images: Annotated[Path | None, path_option("--images", help="The folder with the images of a LLaVA list; "
                                                     "without it, the folder of the list.")] = None,
          split: Split = "test",
          train_split: Annotated[str, typer.Option(help="The split of the training set, if it has splits.")] = "train",
          source: Annotated[str | None, typer.Option(help="The name of the benchmark's published set, if the folder "
                                                          "has another name.")] = None,
          train_source: Annotated[str | None, typer.Option(help="The name of the training set's published set, if "
                                                                "the folder has another name.")] = None,
          max_distance: Annotated[float, typer.Option(
              min=0, help="Two images are near duplicates up to this mean difference in grey levels.")] = 2.0,
          out: Annotated[Path | None, out_option("A JSON lines file for every finding.")] = None,
          fail: Annotated[bool, typer.Option("--fail", help="Exit with code 1 if any pair leaks.")] = False,
          as_json: Json = False) -> None:
    """Check whether a training set contains test pairs of a benchmark.

    The command compares the images and the captions of both datasets.

    Example: onediff audit data/diffcap data/raw/spot_the_diff --fail
    """
    from onediff.config import load_runtime
    from onediff.data.overlap import audit as auditing
    from onediff.data.overlap.datasets import read_examples

    if out is not None:
        check_new_file(out)
    runtime = load_runtime()
    scratch = Path(runtime.scratch)
    train_examples = read_examples(train, split=train_split, scratch=scratch, source=train_source, images=images)
    test_examples = read_examples(benchmark, split=split, scratch=scratch, source=source)
    result = auditing.audit(train_examples, test_examples, out=out, max_distance=max_distance, runtime=runtime)
    print_result(result | {"verdict": auditing.verdict(result)}, auditing.as_text(result), as_json)
    if fail and result["leaks"]:
        raise typer.Exit(1)


def report(against: Annotated[str, typer.Option(help="The version to compare with, such as "
                                                "models:/onediff@previous.")] = CHAMPION,
           out: Annotated[Path, out_option("The HTML file to write.")] = Path(".onediff/report.html")) -> None:
    """Write the report with a comparison to another model version.

    The page is data/report.html with an additional section: the pairs on which the scored model loses most against
    that version.

    Example: onediff report --against models:/onediff@previous
    """
    from onediff.registry import scored_pairs
    from onediff.stages.report import make_page

    check_new_file(out)
    ours, theirs = read_json(SCORED / "test.json"), scored_pairs(against)
    page, _, num_lost = make_page(against=theirs)
    write_text(out, page)
    if num_lost:
        print_text(f"{out}: compared with {against}")
    elif ours == theirs:
        print_text(f"{out}: without a comparison: the scored model is this version ({against}), so there is nothing to "
                   "compare; choose another version with --against")
    elif ours.keys() & theirs.keys():
        print_text(f"{out}: without a comparison: no pair has a lower CIDEr than with {against}")
    else:
        print_text(f"{out}: without a comparison: {against} was scored on other benchmarks ({', '.join(theirs)})")
