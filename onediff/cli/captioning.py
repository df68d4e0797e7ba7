"""`onediff caption` and `onediff example`: caption a pair of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onediff.cli.output import Json, print_result
from onediff.paths import CHAMPION, DIFFCAP, TRAINED

EXAMPLE = Path(".onediff/example")

Model = Annotated[str, typer.Option(help="A model folder, or an MLflow address such as models:/onediff/3.")]


def caption(before: Path, after: Path, model: Model = CHAMPION,
            instruction: Annotated[str | None, typer.Option(
                help='Default: "What changed between the two images?"')] = None,
            as_json: Json = False) -> None:
    """Say what changed between two images."""
    text = _caption(before, after, model, instruction)
    print_result({"before": str(before), "after": str(after), "caption": text, "model": model}, text, as_json)


def example(as_json: Json = False) -> None:
    """Caption one pair of the test split, and leave its two images in .onediff/example."""
    from onediff.data.record import read_records
    from onediff.registry import model_folder

    record = next((record for record in read_records(DIFFCAP, "test-*.parquet")
                   if record.change_type != "none" and record.source != "scenes_far"), None)
    if record is None:
        raise ValueError("data/diffcap: no changed pair in split test; give your own: 'onediff caption BEFORE AFTER'")
    EXAMPLE.mkdir(parents=True, exist_ok=True)
    before, after = EXAMPLE / "before.png", EXAMPLE / "after.png"
    before.write_bytes(record.before)
    after.write_bytes(record.after)
    model = CHAMPION
    try:
        model_folder(CHAMPION)
    except ValueError:  # nothing was promoted yet
        model = str(TRAINED)
    text = _caption(before, after, model, None)  # with the instruction of the command that is printed
    print_result({"before": str(before), "after": str(after), "caption": text, "references": record.references,
                  "model": model},
                 f"An unseen test pair, captioned by {model}:\n  onediff caption {before} {after}"
                 + ("" if model == CHAMPION else f" --model {model}")
                 + f"\n  prediction: {text}\n  reference:  {record.references[0]}", as_json)


def _caption(before: Path, after: Path, model: str, instruction: str | None) -> str:
    """Opens the images before it loads the model, so that a wrong path is reported without delay."""
    from onediff.config import load_runtime
    from onediff.inputs.images import open_image
    from onediff.inputs.prompt import DEFAULT_INSTRUCTION
    from onediff.library_logs import silence_libraries
    from onediff.ops.predict import folder_of
    from onediff.serve.in_use import speaker
    from onediff.serve.usage_log import usage_log

    pair = open_image(before), open_image(after)
    folder = folder_of(model)
    log = usage_log(load_runtime(), model, folder)
    silence_libraries()
    from onediff.model.captioner import Captioner

    return speaker(Captioner.load(folder), log)([(before, after)], [pair], [instruction or DEFAULT_INSTRUCTION])[0]
