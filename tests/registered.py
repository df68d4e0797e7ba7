"""Small versions in a real MLflow store, and a real `mlflow server`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from onediff import registry

REPO = Path(__file__).parents[1]
GOOD = {"change_type_accuracy": 0.9, "changed_object_accuracy": 0.8, "false_alarm_rate": 0.02, "CIDEr": 3.0,
        "floor": {"constant": {"CIDEr": 0.3, "sentence": "none"}}}
OPEN = {"max_caption_ms": None, "max_size_mib": None, "require": []}


def write_rules(path: Path, **changed: object) -> Path:
    """The repository's gate without what a folder of a few bytes cannot have, and with what is `changed`."""
    rules = YAML(typ="safe").load(REPO / "mlflow/promotion.yaml") | OPEN | changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rules))  # JSON is YAML
    return path


def scored(folder: Path, *, cider: float, edits: float, references: str, noise: float) -> Path:
    """What 200 pairs of 50 scenes scored: around `cider`, as far apart as `noise`."""
    values = np.random.default_rng(0).normal(0, noise, (2, 200)) if noise else np.zeros((2, 200))
    names = {"pair_id": [str(k) for k in range(200)], "group_id": [str(k // 4) for k in range(200)]}
    pairs = {benchmark: {**names, "protocol": "coco-caption/v1", "references": references,
                         "CIDEr": (mean + row - row.mean()).tolist()}
             for benchmark, mean, row in zip(("scenes", "edits"), (cider, edits), values, strict=True)}
    folder.mkdir(exist_ok=True)
    (folder / "gate.json").write_text(json.dumps(pairs))
    return folder


def model(name: str) -> Path:
    """A model folder whose weights are `name`."""
    folder = Path("models") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(name.encode())
    (folder / "config.json").write_text("{}")
    return folder


def results(name: str, *, operation: float = 0.8, references: str = "r1", noise: float = 0, edits: float = 1.0,
            **scenes: float) -> tuple[Path, Path, Path]:
    """What `register` takes beside the model folder."""
    gate = {"scenes": {**GOOD, **scenes}, "edits": {"operation_accuracy": operation, "CIDEr": edits}}
    paths = []
    for split, scores in (("test", {"scenes": {**GOOD, "CIDEr": 0.001}}), ("gate", gate)):
        paths.append(Path("models") / f"{name}-{split}.json")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text(json.dumps(scores))
    pairs = scored(Path("models") / f"{name}-scored", cider=gate["scenes"]["CIDEr"], edits=edits,
                   references=references, noise=noise)
    return paths[0], paths[1], pairs


def add(name: str, **scores: float | str) -> str:
    """Registers a model whose weights are `name`."""
    return registry.register(model(name), *results(name, **scores), run_id="abc")  # type: ignore[arg-type]


def aliases() -> dict[str, list[str]]:
    return {row["version"]: row["aliases"] for row in registry.list_versions()}


def row(version: str) -> dict[str, object]:
    return next(its for its in registry.list_versions() if its["version"] == version)


class Server:
    """A real `mlflow server` on loopback that can be killed and started again at the same address."""

    def __init__(self, folder: Path, *options: str, **environ: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.folder, self.options, self.environ = folder, options, environ

    def start(self) -> None:
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
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


