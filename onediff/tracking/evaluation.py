"""The MLflow run of an evaluation: the headline scores as metrics; score files, report and pictures as artifacts."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onediff.config import Config
from onediff.eval.metrics.catalog import BEHAVIOUR, CAPTION_HEADLINES
from onediff.files import key_of, read_json, read_jsonl
from onediff.tracking.runs import find_run, log_to_parent, start_run

NUM_PICTURES = 4  # number of test pairs that are drawn for each source


def log_evaluation(config: Config, *, data: Path = Path("data")) -> str:
    """Log the pipeline's scores to a new MLflow run and return the id of the run.

    The metrics of the run are the most important scores of the main benchmark. The score files, which contain all
    scores, become artifacts of the run. If a retraining is active, its MLflow run gets these metrics too. If a finished
    run already has the same scores, no run is created and the id of that run is returned.
    """
    scores = {"test": read_json(data / "metrics.json"), "gate": read_json(data / "gate.json"),
              "stress": read_json(data / "stress.json") if (data / "stress.json").exists() else {}}
    # Missing scores of the optional stage `stress` do not change the digest, so it equals digests of older runs.
    key = key_of([tables for split, tables in scores.items() if tables or split != "stress"])
    headlines = headline_metrics(scores["test"], config)
    log_to_parent(headlines)
    finished = find_run(f"tags.scores_digest = '{key}' and attributes.status = 'FINISHED'")
    if finished:
        return finished
    with start_run("evaluate", "evaluation", config) as run, tempfile.TemporaryDirectory() as scratch:
        run.log(0, headlines)
        for name in ("metrics.json", "gate.json", "stress.json", "report.html", "diffcap/card.json"):
            if (data / name).exists():
                run.artifact(data / name)
        _draw_samples(data, Path(scratch))
        run.artifact(Path(scratch), "pictures")
        if not run.problems:
            run.tag({"scores_digest": key})
    return run.id


def headline_metrics(tables: Mapping[str, Mapping[str, Any]], config: Config) -> dict[str, float]:
    """Return the most important scores of the main benchmark, as {"test/scenes.CIDEr": 2.2, ...}.

    `tables` maps each benchmark to its scores on the test split. The main benchmark is the one whose data source has
    the largest weight in the training mixture of phase `tune`.
    """
    weights = config.tune.mixture
    benchmark = max(tables, key=lambda name: weights.get(name.split("/")[0], 0))
    return {f"test/{benchmark}.{name}": tables[benchmark][name] for name in (*CAPTION_HEADLINES, *BEHAVIOUR)
            if isinstance(tables[benchmark].get(name), (int, float))}


def _draw_samples(data: Path, folder: Path) -> None:
    """Draw the first test pairs of each source into PNG files: two images, below them the reference and prediction."""
    from PIL import Image, ImageDraw

    from onediff.data.record import read_records
    from onediff.inputs.images import open_image

    num_drawn: Counter[str] = Counter()
    predictions = {row["pair_id"]: row["prediction"] for path in sorted((data / "captions/test").glob("*.jsonl"))
                   for row in read_jsonl(path)}
    for record in read_records(data / "diffcap", "test-*.parquet"):
        if num_drawn[record.source] == NUM_PICTURES:
            continue
        page = Image.new("RGB", (800, 450), "white")
        for column, image in enumerate((record.before, record.after)):
            page.paste(open_image(image).resize((395, 395)), (column * 405, 0))
        ImageDraw.Draw(page).text((8, 402), f"reference: {record.references[0]}\n"
                                  f"prediction: {predictions.get(record.pair_id, '-')}", fill="black", font_size=16)
        page.save(folder / f"{record.source}-{num_drawn[record.source]}.png")
        num_drawn[record.source] += 1
