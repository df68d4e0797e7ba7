"""The paths that more than one module uses, relative to the project's folder, and the MLflow URI of the champion."""

from pathlib import Path

PARAMS = Path("params.yaml")
RUNTIME = Path("runtime.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")

DATA = Path("data")
RAW = DATA / "raw"  # published datasets and pairs that users provide
SYNTHETIC = DATA / "synthetic"  # pairs that the stage `synthesize` generates
PAIRS = DATA / "pairs"  # image pairs that the DVC stages `read`, `retrieve` and `diffuse` write
INSTRUCTED = DATA / "instructed"  # edit instructions by the writer (a language model)
WRITTEN = DATA / "written"  # image pairs with captions by the writer (a language model)
ANSWERS = DATA / "answers"  # all answers of the writer, which cost money and are therefore never deleted
PROBE_TABLE = DATA / "probe.parquet"
QUARANTINE = DATA / "quarantine.parquet"
DIFFCAP = DATA / "diffcap"
CARD = DIFFCAP / "card.json"
READ_REPORTS = DATA / "reports/read"
VALIDATION_REPORT = DATA / "reports/validation"
DIFFCAP_REPORTS = DATA / "reports/diffcap"
MODELS = DATA / "models"
ALIGNED = MODELS / "align"
TRAINED = MODELS / "tune"
CURVES = DATA / "curves"
RUNS = DATA / "runs"
CAPTIONS = DATA / "captions"
SCORED = DATA / "scored"
METRICS = DATA / "metrics.json"
GATE = DATA / "gate.json"
STRESS = DATA / "stress.json"
STRESS_DETAILS = DATA / "stress"
REPORT = DATA / "report.html"
FIGURES = DATA / "figures"

CHAMPION = "models:/onediff@champion"
