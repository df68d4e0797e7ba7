"""The paths that more than one module uses, relative to the project's folder, and the MLflow URI of the champion.

`check_project` refuses a working directory that is not a project.
"""

from pathlib import Path

PARAMS = Path("params.yaml")
RUNTIME = Path("runtime.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")

DATA = Path("data")
RAW = DATA / "raw"  # folder of published datasets and of image pairs from users
SYNTHETIC = DATA / "synthetic"  # folder of image pairs that the DVC stage `synthesize` generates
PAIRS = DATA / "pairs"  # folder of image pairs that the DVC stages `read`, `retrieve` and `diffuse` write
INSTRUCTED = DATA / "instructed"  # folder of edit instructions that a language model wrote
WRITTEN = DATA / "written"  # folder of image pairs with captions that a language model wrote
ANSWERS = DATA / "answers"  # folder of all answers of the language model, never deleted because they cost money
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
OWN_QUESTION = CAPTIONS / "own_question"  # captions that answer the question in each record
PARAPHRASED = CAPTIONS / "paraphrases"  # captions that answer paraphrases of the default question
SCORED = DATA / "scored"
METRICS = DATA / "metrics.json"
GATE = DATA / "gate.json"
STRESS = DATA / "stress.json"
STRESS_DETAILS = DATA / "stress"
REPORT = DATA / "report.html"
FIGURES = DATA / "figures"
SEEDS = Path("docs/seeds.json")  # mean and range of each figure over several seeds; in git

CHAMPION = "models:/onediff@champion"


def check_project() -> None:
    """Raise FileNotFoundError if the working directory is not the folder of a project, which contains dvc.yaml."""
    if not DVC_YAML.exists():
        raise FileNotFoundError(f"{DVC_YAML.absolute()} does not exist: run this command in the folder of the project")
