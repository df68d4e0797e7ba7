"""Edits the photographs of a folder that nobody here chose, and measures whether a model names the edit.

    python -m benchmarks.photos FOLDER --model models:/onediff@champion
    python -m benchmarks.photos FOLDER --model .onediff/seeds/7/data/models/tune --model other/model
    python -m benchmarks.photos FOLDER --model data/models/tune --leave-out aloeL.jpg --leave-out other/graf1.png
    python -m benchmarks.photos FOLDER --model data/models/tune --folds 5    # hours; an interrupted run continues

Each photograph gets each simple edit of this project once, and the model answers the default question. Photographs that
training or the pretrained vision tower saw are found by their pixels and left out. `--leave-out` leaves out more: the
name of a photograph in FOLDER, or an image file that shows the same as one of them.

`--folds` measures what a folder of your own photographs (`data.edits.photos`) in training is worth: for each fold, the
tiny preset is trained in a clone of the last commit with the photographs of the other folds in place of those of the
packages, and captions the photographs of the fold.
"""

import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from typer import Argument, Option

from benchmarks import script
from onediff.config import load_params, load_runtime
from onediff.data.quality.leaks import thumbnail
from onediff.data.record import SPLITS, Record
from onediff.data.synthesis.edits.operations import OPERATIONS
from onediff.data.synthesis.edits.photographs import photo_paths, split_of
from onediff.data.synthesis.edits.pictures import Picture
from onediff.eval.analysis.behaviour import edit_behaviour, edit_checks, interval
from onediff.eval.metrics.words import Predictions
from onediff.files import key_of, new_folder, read_json, refusing_lock, write_json, write_text
from onediff.inputs.formats import IMAGE_ENDINGS
from onediff.inputs.images import open_image, png
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.ops import predict
from onediff.paths import CHAMPION, PARAMS, TRAINED

HOME, TABLE = Path(".onediff/photos"), Path("docs/photos.md")
EDITS = ("brighten", "darken", "more_contrast", "less_contrast", "black_and_white", "blur", "crop", "rotate", "none")
LONGER_PX = 480  # Photographs are reduced until their longer side has this many pixels.
SAME = 6.0  # Two images show the same photograph if their thumbnails differ by at most this many grey levels.
SEED = 20261129
PRESET = "tiny"


def main(folder: Annotated[Path, Argument(help="The folder of photographs.")],
         model: Annotated[list[str] | None, Option(
             help="A model folder, or the address of a registered version; repeat it for each seed.")] = None,
         leave_out: Annotated[list[str] | None, Option(help="Name in FOLDER, or file of an equal image.")] = None,
         folds: Annotated[int, Option(help="Number of folds; 0: do not train.")] = 0) -> None:
    """Score a model on simple edits of photographs, and write docs/photos.md."""
    photos, left_out = chosen_photos(folder, leave_out or [])
    records = [record for name, path in photos.items() for record in edited(name, path)]
    predictions = {f"`{name}`": captions(records, predict.folder_of(name)) for name in model or [CHAMPION]}
    lines = [f"{len(photos)} photographs, {len(records)} pairs. Left out: {', '.join(left_out) or 'none'}.", "",
             *score_table(records, predictions), "", over_models(records, predictions)]
    if folds:
        packages, own = next(iter(predictions.values())), cross_validate(photos, folds)
        lines += ["", f"Trained with own photographs, {folds} folds:", "",
                  *score_table(records, {"photographs of the packages": packages, "own photographs": own}),
                  "", gain(records, packages, own)]
    script.write_table(TABLE, lines)


def chosen_photos(folder: Path, leave_out: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Return the photographs {name: path} of a folder that are scored, and the names of those that are left out.

    Raises ValueError if a value of `leave_out` is neither an image file nor a photograph of the folder, or if no
    photograph is left.
    """
    photos = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_ENDINGS}
    images = [Path(value) for value in leave_out if Path(value).is_file()]
    names = {value for value in leave_out if not Path(value).is_file()}
    if unknown := names - photos.keys():
        raise ValueError(f"--leave-out {sorted(unknown)[0]}: must be an image file or a photograph of {folder}, but is "
                         f"neither; the folder has {', '.join(photos) or 'no photographs'}")
    seen = [thumbnail(open_image(path)) for path in (*photo_paths("train", None).values(), *images)]
    left_out = [name for name, path in photos.items() if name in names or shows_one_of(path, seen)]
    if len(left_out) == len(photos):
        raise ValueError(f"{folder}: must contain photographs that training did not see, but all {len(photos)} are "
                         "left out; add photographs")
    return {name: path for name, path in photos.items() if name not in left_out}, left_out


def shows_one_of(path: Path, thumbnails: Sequence[np.ndarray]) -> bool:
    """Return whether an image has nearly the pixels of one of the thumbnails, whatever their sizes are."""
    own = thumbnail(open_image(path)).astype(np.int16)
    return any(float(np.abs(own - other).mean()) <= SAME for other in thumbnails)


def edited(name: str, path: Path) -> list[Record]:
    """Return one pair for each operation in EDITS: the photograph, and the photograph after the edit."""
    image = open_image(path)
    image.thumbnail((LONGER_PX, LONGER_PX), Image.Resampling.LANCZOS)
    picture, records = Picture(name, np.array(image)), []
    for number, operation in enumerate(EDITS):
        edit = OPERATIONS[operation](np.random.default_rng([SEED, zlib.crc32(name.encode()), number]), picture)
        records.append(Record(
            pair_id=f"{name}/{operation}", source="edits", split="test", group_id=name, before=png(image),
            after=png(Image.fromarray(edit.after)), references=[], instruction=DEFAULT_INSTRUCTION,
            change_type=operation, provenance={"new": edit.new}))
    return records


def captions(records: Sequence[Record], model: Path) -> Predictions:
    """Return the captions {pair_id: text} of a model, whose question is the default one for every pair."""
    from onediff.eval.caption import caption_records
    from onediff.model.captioner import Captioner

    captioner = Captioner.load(model, device=load_runtime().device)
    return {record.pair_id: text for record, text in caption_records(captioner, records, load_params().caption, {},
                                                                     progress="caption")}


def score_table(records: Sequence[Record], predictions: Mapping[str, Predictions]) -> list[str]:
    """Return the Markdown lines of a table: right operations in percent, with 95 % intervals over photographs."""
    rows = [vars(record) for record in records]
    shares = {name: edit_behaviour(texts, rows) for name, texts in predictions.items()}

    def cells(key: str) -> list[str]:
        return [with_interval(each[key], each["intervals"][key]) for each in shares.values()]

    def by_operation(operation: str) -> list[str]:
        return [with_interval(each["operation_accuracy_by_operation"][operation], interval(
            [(row["group_id"], edit_checks(predictions[name][row["pair_id"]], row)["operation"]) for row in rows
             if row["change_type"] == operation])) for name, each in shares.items()]

    return script.table(["", *predictions], [
        ["**operation right**", *cells("operation_accuracy")],
        *([f"*{operation}*", *by_operation(operation)] for operation in EDITS),
        ["false alarms", *cells("false_alarm_rate")], ["unreadable captions", *cells("unreadable_rate")]])


def over_models(records: Sequence[Record], predictions: Mapping[str, Predictions]) -> str:
    """Return a sentence with the mean, lowest and highest share of right operations of several models."""
    rows = [vars(record) for record in records]
    shares = [100 * edit_behaviour(texts, rows)["operation_accuracy"] for texts in predictions.values()]
    return (f"Operation right, over {len(shares)} model{'s' * (len(shares) > 1)}: mean "
            f"{sum(shares) / len(shares):.1f}, lowest {min(shares):.1f}, highest {max(shares):.1f}.")


def with_interval(value: float, bounds: Sequence[float]) -> str:
    return f"{100 * value:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def gain(records: Sequence[Record], packages: Predictions, own: Predictions) -> str:
    """Return a sentence with the difference of both systems, and its 95 % interval over photographs."""
    right = [(record, *(edit_checks(texts[record.pair_id], vars(record))["operation"] for texts in (packages, own)))
             for record in records]
    differences = [(record.group_id, float(second) - float(first)) for record, first, second in right]
    mean = sum(value for _, value in differences) / len(differences)
    low, high = interval(differences)
    return (f"Own photographs change the share of right operations by {100 * mean:+.1f} [{100 * low:+.1f}, "
            f"{100 * high:+.1f}] percentage points.")


def cross_validate(photos: Mapping[str, Path], folds: int) -> dict[str, str]:
    """Return the captions of every photograph by a model that was trained with the photographs of the other folds.

    The captions of each finished fold are kept in HOME. Raises ValueError if there are fewer photographs than folds.
    """
    if not 2 <= folds <= len(photos):
        raise ValueError(f"--folds must be 2 to {len(photos)}, the number of photographs, got {folds}; change the "
                         "option")
    order = np.random.default_rng(SEED).permutation(sorted(photos)).tolist()
    result: dict[str, str] = {}
    with refusing_lock(HOME / "lock", f"{HOME}: another run ({{holder}}) uses this folder; wait until it ends"):
        for fold in range(folds):
            held_out = order[fold::folds]
            training = {name: path for name, path in photos.items() if name not in held_out}
            kept = HOME / f"fold-{key_of([sorted(training), held_out])[:16]}.json"
            if not kept.exists():
                model = train(training, HOME / "project")
                records = [record for name in held_out for record in edited(name, photos[name])]
                write_json(kept, captions(records, model))
            result |= read_json(kept)
    return result


def train(photos: Mapping[str, Path], project: Path) -> Path:
    """Train the preset in a clone of this project with these photographs, and return the folder of the model.

    DVC keeps finished stages, and training keeps its last step, so an interrupted training continues.
    """
    if not project.exists():
        with new_folder(project) as part:
            script.clone(part)
    with new_folder(project / "data/own/edits/photos") as part:
        fill(part, photos)
    preset = (project / f"presets/{PRESET}.yaml").read_text(encoding="utf-8")
    write_text(project / PARAMS, re.sub(r"^(\s+photos:) null", r"\1 data/own/edits/photos", preset, count=1,
                                        flags=re.MULTILINE))
    done = subprocess.run([sys.executable, "-P", "-m", "dvc", "repro", "tune"], cwd=project, check=False,
                          env=script.project_environment(project.absolute()))
    if done.returncode:
        raise ValueError(f"'dvc repro tune' failed in {project}; see its message above; after the cure, the same "
                         "command continues")
    return project / TRAINED


def fill(folder: Path, photos: Mapping[str, Path]) -> None:
    """Copy the photographs into a folder, under names that put them into the split `train`.

    The other splits get the photographs that the packages have for them, because no split may be empty. Those that show
    one of the photographs are left out, because no photograph may be in two splits.
    """
    own = [thumbnail(open_image(path)) for path in photos.values()]
    for split in SPLITS:
        for name, path in (photos if split == "train" else photo_paths(split, None)).items():
            if split == "train" or not shows_one_of(path, own):
                shutil.copy(path, folder / name_in(split, f"{Path(name).stem}{path.suffix}"))


def name_in(split: str, name: str) -> str:
    """Return the name with the smallest number in front that puts a photograph into the split."""
    number = 0
    while split_of(f"{number}_{name}") != split:
        number += 1
    return f"{number}_{name}"


if __name__ == "__main__":
    script.main(main)
