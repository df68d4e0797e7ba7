"""The MLflow run of an evaluation: scores, report and sample pictures of the results in data/."""

import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from onediff.config import Config
from onediff.files import key_of
from onediff.tracking.runs import find_run, flatten, start_run

NUM_PICTURES = 4  # of each source


def log_evaluation(config: Config, *, data: Path = Path("data")) -> str:
    """Stores scores, report and sample pictures of the pipeline's results; returns the run's id.

    The same results are stored once: if a finished run has the same scores, its id is returned.
    """
    scores = {"test": _read_scores(data / "metrics.json"), "gate": _read_scores(data / "gate.json"),
              "stress": _read_scores(data / "stress.json") if (data / "stress.json").exists() else {}}  # optional
    key = key_of([tables for split, tables in scores.items() if tables or split != "stress"])
    finished = find_run(f"tags.scores_digest = '{key}' and attributes.status = 'FINISHED'")
    if finished:
        return finished
    with start_run("evaluate", "evaluation", config) as run, tempfile.TemporaryDirectory() as scratch:
        run.log(0, {f"{split}/{key}": value for split, tables in scores.items()
                    for key, value in flatten(tables).items()
                    if isinstance(value, (int, float)) and not key.count(".floor.")})
        for name in ("metrics.json", "gate.json", "stress.json", "report.html", "diffcap/card.json"):
            if (data / name).exists():
                run.artifact(data / name)
        _draw_samples(data, Path(scratch))
        run.artifact(Path(scratch), "pictures")
        if not run.problems:
            run.tag({"scores_digest": key})
    return run.id


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: 'dvc repro' makes it") from None


def _draw_samples(data: Path, folder: Path) -> None:
    """The first test pairs of each source, before and after side by side, reference and prediction below."""
    from PIL import Image, ImageDraw

    from onediff.data.record import read_records

    num_drawn: Counter[str] = Counter()
    predictions = {row["pair_id"]: row["prediction"] for path in sorted((data / "captions/test").glob("*.jsonl"))
                   for row in map(json.loads, path.read_text().splitlines())}
    for record in read_records(data / "diffcap", "test-*.parquet"):
        if num_drawn[record.source] == NUM_PICTURES:
            continue
        page = Image.new("RGB", (800, 450), "white")
        for column, image in enumerate((record.before, record.after)):
            page.paste(Image.open(io.BytesIO(image)).convert("RGB").resize((395, 395)), (column * 405, 0))
        ImageDraw.Draw(page).text((8, 402), f"reference: {record.references[0]}\n"
                                  f"prediction: {predictions.get(record.pair_id, '-')}", fill="black", font_size=16)
        page.save(folder / f"{record.source}-{num_drawn[record.source]}.png")
        num_drawn[record.source] += 1
