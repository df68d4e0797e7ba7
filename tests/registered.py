"""Helpers for tests of the registry: register small models in a real MLflow store, and run a real MLflow server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from onediff import registry
from onediff.repro.lock import md5_of

REPO = Path(__file__).parents[1]
BENCHMARK = {"BLEU-1": 0.8, "BLEU-2": 0.7, "BLEU-3": 0.6, "BLEU-4": 0.5, "METEOR": 0.4, "ROUGE-L": 0.6, "CIDEr": 1.0,
             "num_pairs": 200, "protocol": "coco-caption/v1", "references": "r1"}
GOOD = {**BENCHMARK, "change_type_accuracy": 0.9, "changed_object_accuracy": 0.8, "false_alarm_rate": 0.02,
        "CIDEr": 3.0, "intervals": {"false_alarm_rate": [0.01, 0.03]},
        "floor": {"constant": {"CIDEr": 0.3, "sentence": "none"}}}
OPEN = {"max_caption_ms": None, "max_size_mib": None, "require": []}
PAIR_METRICS = ("CIDEr", "ROUGE-L")


def write_rules(path: Path, **changed: object) -> Path:
    """Write promotion rules to a file and commit them: those of the repository, with the `changed` values.

    Limits and required facts are left out, because the small models of the tests cannot meet them.
    """
    rules = YAML(typ="safe").load(REPO / "mlflow/promotion.yaml") | OPEN | changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rules))  # JSON is YAML
    if Path(".git").exists():
        commit(path)
    return path


def commit(*paths: Path | str) -> None:
    """Commit the given paths with git, even if they are ignored."""
    git("add", "--force", *map(str, paths))
    git("commit", "--quiet", "--allow-empty", "--message", "one")


def git(*words: str) -> None:
    """Run a git command as a test user."""
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], check=True)


def pairs_of(tables: dict[str, dict[str, object]], *, noise: float = 0, groups: int = 50) -> dict[str, object]:
    """Return scores of the pairs of each benchmark, whose mean is the score in `tables`.

    `noise` is the standard deviation over the pairs. The pairs are split into `groups` groups of equal size.
    """
    rows = np.random.default_rng(0).normal(0, noise, (len(tables), 200)) if noise else np.zeros((len(tables), 200))
    scores = {}
    for (benchmark, table), row in zip(tables.items(), rows, strict=True):
        num = int(table["num_pairs"])  # type: ignore[call-overload]
        scores[benchmark] = {**{key: table[key] for key in ("protocol", "references")},
                             "pair_id": [str(k) for k in range(num)], "group_id": [str(k % groups) for k in range(num)],
                             **{name: (table[name] + row[:num] - row[:num].mean()).tolist() for name in PAIR_METRICS}}
    return scores


def model(name: str) -> Path:
    """Create a model folder whose weights file contains the text `name`."""
    folder = Path("models") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(name.encode())
    (folder / "config.json").write_text("{}")
    return folder


def write_results(root: Path = Path(), *, operation: float = 0.8, references: str = "r1", edits: float = 1.0,
                  groups: int = 50, **scenes: float) -> None:
    """Write the outputs of the stages `caption` and `score`: captions, score tables, and scores of each pair.

    The keyword arguments replace scores of the benchmarks `scenes` and `edits`.
    """
    edit_table = {**BENCHMARK, "operation_accuracy": operation, "CIDEr": edits, "references": references}
    tables = {"gate": {"scenes": {**GOOD, "references": references, **scenes}, "edits": edit_table},
              "test": {"scenes": {**GOOD, "CIDEr": 0.001, "references": references}}}
    for split, name in (("test", "metrics"), ("gate", "gate")):
        write_json(root / f"data/{name}.json", tables[split])
        write_json(root / f"data/scored/{split}.json", pairs_of(tables[split], groups=groups))
    write_json(root / "data/captions/gate/scenes.jsonl", {"pair_id": "0", "prediction": "none"})


def write_data(root: Path = Path(), verdict: str = "clean") -> None:
    """Write the outputs of the stages `validate` and `build`; `verdict` is the result of the leak audit."""
    write_json(root / "data/diffcap/card.json", {})
    write_json(root / "data/quarantine.parquet", "none")
    write_json(root / "data/reports/diffcap/audit.json", {"benchmarks": {"scenes": {"verdict": verdict}}})


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lock(folder: Path, root: Path = Path(), **changed: dict[str, dict[str, str]]) -> None:
    """Write dvc.lock as DVC does after it has trained the model folder and scored it in `root`.

    `changed` replaces digests of stages, as in score={"outs": {"data/gate.json": "0"}}.
    """
    outs = ("data/captions", "data/scored", "data/metrics.json", "data/gate.json")
    scored = {path: md5_of(root / path) for path in outs}
    built = {path: md5_of(root / path) if (root / path).exists() else "d" * 32 + ".dir"
             for path in ("data/diffcap", "data/reports/diffcap", "data/quarantine.parquet")}
    checked = {"data/quarantine.parquet": built.pop("data/quarantine.parquet")}
    data, trained = {"data/diffcap": built["data/diffcap"]}, {"data/models/tune": md5_of(folder)}
    captions = {"data/captions": scored.pop("data/captions")}
    stages = {"validate": {"outs": checked}, "build": {"deps": checked, "outs": built},
              "tune": {"deps": data, "outs": trained}, "caption": {"deps": data | trained, "outs": captions},
              "score": {"deps": data | captions, "outs": scored}}
    stages = {name: {"cmd": "x"} | {kind: [{"path": path, "hash": "md5", "md5": digest} for path, digest in (
        paths | changed.get(name, {}).get(kind, {})).items()] for kind, paths in stage.items()}
        for name, stage in stages.items()}
    write_json(root / "dvc.lock", {"schema": "2.0", "stages": stages})  # JSON is YAML


def trained(name: str, **scores: float | str) -> Path:
    """Create a model folder whose weights are `name`, with its scores in data/ and dvc.lock, as the pipeline does."""
    folder = model(name)
    write_results(**scores)  # type: ignore[arg-type]
    write_lock(folder)
    return folder


def register(folder: Path, **options: Any) -> str:
    """Register a model folder with the scores in data/, and return the number of the version."""
    return registry.register(registry.pipeline_evidence(folder), **options)


def add(name: str, **scores: float | str) -> str:
    """Create and register a model whose weights are `name`, and return the number of the version."""
    return register(trained(name, **scores), run_id="abc")


def score_again(version: str, **scores: float | str) -> None:
    """Replace the scores of a version, as `flows/evaluate.py` does."""
    root = Path("again")
    write_results(root, **scores)  # type: ignore[arg-type]
    registry.rescore(version, registry.evidence_of(registry.model_folder(f"models:/onediff/{version}"), root))


def aliases() -> dict[str, list[str]]:
    """Return the aliases of all registered versions by version."""
    return {row["version"]: row["aliases"] for row in registry.list_versions()}


def row(version: str) -> dict[str, object]:
    """Return the row of one version in the list of versions."""
    return next(version_row for version_row in registry.list_versions() if version_row["version"] == version)


class Server:
    """A real `mlflow server` on 127.0.0.1 that a test can kill and start again at an unchanged address."""

    def __init__(self, folder: Path, *options: str, **environ: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.folder, self.options, self.environ = folder, options, environ

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        words = ["server", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--artifacts-destination",
                 str(self.folder / "served"), "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                 *self.options]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_TRACKING")}
        self.process = subprocess.Popen([sys.executable, "-m", "mlflow", *words], cwd=self.folder,
                                        env=environment | quiet | self.environ, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None, "mlflow server did not start"
                time.sleep(0.2)

    def stop(self) -> None:
        """Kill the server and its worker processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


