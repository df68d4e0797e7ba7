"""A small but complete project: git, DVC, stages with the real names and a registered version.

The models are a few bytes. The project contains a package `onediff`, whose stages caption and score again when
`onediff lineage --verify` checks the registered version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

BATCH, PAIRS = 3, 17
BUILD = """
import json
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
out = Path("data/diffcap"); out.mkdir(parents=True)
for split in ("train", "val", "gate", "test"):
    rows = pq.read_table("data/synthetic/scenes/all.parquet").to_pylist()
    table = pa.Table.from_pylist([{**row, "pair_id": f"{split}-{row['pair_id']}"} for row in rows])
    pq.write_table(table, out / f"{split}-00000.parquet")
(out / "card.json").write_text(json.dumps({"digests": {"train-00000.parquet": "0123456789abcdef0123456789abcdef"}}))
"""
TRAIN = """
import json, sys
from pathlib import Path
phase = sys.argv[1]
model = Path("data/models") / phase; model.mkdir(parents=True)
(model / "model.safetensors").write_bytes(phase.encode() * 7)
(model / "config.json").write_text("{}")
Path("data/runs").mkdir(exist_ok=True)
Path(f"data/runs/{phase}.json").write_text(json.dumps({"run_id": f"run-of-{phase}"}))
"""
CAPTION = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
model = Path(sys.argv[1] if len(sys.argv) > 1 else "data/models/tune")
weights = model.joinpath("model.safetensors").read_bytes().hex()[:8]
for split in ("test", "gate"):
    out = Path("data/captions") / split; out.mkdir(parents=True)
    rows = pq.read_table(f"data/diffcap/{split}-00000.parquet").to_pylist()
    out.joinpath("scenes.jsonl").write_text("".join(
        json.dumps({"pair_id": row["pair_id"], "prediction": f"{weights} {row['pair_id']}"}) + "\\n" for row in rows))
"""
SCORE = """
import json
from pathlib import Path
Path("data/scored").mkdir()
for split, name in (("test", "metrics"), ("gate", "gate")):
    lines = Path(f"data/captions/{split}/scenes.jsonl").read_text().splitlines()
    ids = [json.loads(line)["pair_id"] for line in lines]
    each = {"CIDEr": [len(line) / 100 for line in lines], "ROUGE-L": [len(line) / 1000 for line in lines]}
    means = {name: sum(values) / len(values) for name, values in each.items()}
    about = {"protocol": "tiny/v1", "references": "r1"}
    table = {**dict.fromkeys(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR"), 0.5), **means, **about,
             "num_pairs": len(lines), "list": [1, 2]}
    Path(f"data/{name}.json").write_text(json.dumps({"scenes": table}))
    pairs = {**about, "pair_id": ids, "group_id": ids, **each}
    Path(f"data/scored/{split}.json").write_text(json.dumps({"scenes": pairs}))
"""
CODE = {"build": BUILD, "train": TRAIN, "caption": CAPTION, "score": SCORE}


def _stage(name: str, code: str, deps: list[str], outs: list[str], *arguments: str,
           **more: object) -> dict[str, object]:
    return {"cmd": " ".join(["python", "-m", f"onediff.stages.{code}", *arguments]),
            "deps": [f"onediff/stages/{code}.py", *deps], "outs": outs, **more}


STAGES = {
    "build": _stage("build", "build", ["data/synthetic/scenes"], ["data/diffcap"]),
    **{phase: _stage(phase, "train", ["data/diffcap", *deps], [f"data/models/{phase}", f"data/runs/{phase}.json"],
                     phase, params=[phase]) for phase, deps in (("align", []), ("tune", ["data/models/align"]))},
    "caption": _stage("caption", "caption", ["data/diffcap", "data/models/tune"], ["data/captions"],
                      params=["caption"]),
    "score": _stage("score", "score", ["data/captions", "data/diffcap"], ["data/scored"],
                    metrics=[{f"data/{name}.json": {"cache": False}} for name in ("metrics", "gate")]),
}
PARAMS = {"align": {"mixture": {"scenes": 1}}, "tune": {"mixture": {"scenes": 1}}, "caption": {"batch_size": BATCH}}


def make(folder: Path) -> Path:
    """Create the project in a folder, run every stage once, and commit the results."""
    (folder / "onediff/stages").mkdir(parents=True)
    for path in ("onediff/__init__.py", "onediff/stages/__init__.py"):
        (folder / path).write_text("")
    for name, code in CODE.items():
        (folder / f"onediff/stages/{name}.py").write_text(code)
    scenes = folder / "data/synthetic/scenes"
    scenes.mkdir(parents=True)
    pq.write_table(pa.table({"pair_id": [str(number) for number in range(PAIRS)]}), scenes / "all.parquet")
    for name, content in (("dvc.yaml", {"stages": STAGES}), ("params.yaml", PARAMS)):
        with (folder / name).open("w") as file:
            YAML().dump(content, file)
    run(folder, "git", "init", "-q", "-b", "main")
    dvc = [sys.executable, "-m", "dvc"]
    run(folder, *dvc, "init", "-q")
    run(folder, *dvc, "add", "-q", "data/synthetic/scenes")
    run(folder, *dvc, "repro", "-q")
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    """Commit all files of the project."""
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "all")


def run(folder: Path, *command: str) -> None:
    """Run a command in the project, and fail with its output if it fails."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def register(project: Path, carried: Path) -> str:
    """Register the trained model as the flow does, but without a model card, and return the version."""
    from onediff import registry
    from onediff.ops import lineage

    lineage.write_lineage(carried, root=project)
    model, run = project / "data/models/tune", json.loads((project / "data/runs/tune.json").read_text())
    return registry.register(registry.pipeline_evidence(model, root=project), run_id=run["run_id"],
                             carried=carried)


@contextmanager
def flipped(path: Path) -> Iterator[None]:
    """Flip one bit in the last byte of a file during the `with` block, even if the file is read-only."""
    content, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(0o644)
        path.write_bytes(content)
        path.chmod(mode)
