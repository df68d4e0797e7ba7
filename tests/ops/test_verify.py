from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny_project

from onediff import registry
from onediff.cli import main as cli
from onediff.ops import verify
from onediff.ops.verify import Check
from onediff.repro import lock as versioned

SHARD = "data/diffcap/train-00000.parquet"


@pytest.fixture(autouse=True)
def project(tiny_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tiny_version.parent / 'mlflow.db'}")
    monkeypatch.chdir(tiny_version)


def cached(path: Path) -> Path:
    md5 = versioned.md5_of(path)
    return Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]


def registered_weights() -> Path:
    return next(registry.version_files("models:/onediff/1").rglob("model.safetensors"))


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.what.split(" by ")[0]: check.problem for check in checks if check.problem}


@contextmanager
def edited(**changes: Any) -> Iterator[None]:
    """The version's lineage.json says something else for a while."""
    path = registry.version_files("models:/onediff/1") / "lineage/lineage.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    try:
        yield
    finally:
        path.write_text(before)


def test_an_honest_version_is_proven_and_nothing_is_left_behind() -> None:
    before = sorted(Path().rglob("*"))
    checks = list(verify.verify("candidate"))
    assert failed(checks) == {}
    assert str(checks[0]) == "ok      dvc.lock and data card that the version carries"
    assert "scored again" in str(checks[-2]) and "100.0 % of 12 pairs" in str(checks[-1])
    assert [path for path in sorted(Path().rglob("*")) if path not in before] == [Path(".onediff")]
    assert not list(Path(".onediff").iterdir())


def test_one_byte_of_a_cached_shard_of_the_workspace_or_of_the_weights_is_named_and_the_command_exits_with_1(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["onediff", "lineage", "1", "--verify", "--json"])
    with ExitStack() as stack:
        for path in (cached(Path(SHARD)), Path(SHARD), registered_weights()):
            stack.enter_context(tiny_project.flipped(path))
        with pytest.raises(SystemExit) as left:
            cli.main()
    result = json.loads(capsys.readouterr().out)
    failures = failed([Check(**check) for check in result["checks"]])
    workspace, weights = (next(failures[key] for key in failures if part in key) for part in ("workspace", "weights"))
    assert left.value.code == 1 and not result["verified"] and len(failures) == 3
    assert "train-00000.parquet is damaged: md5 " in failures["data/diffcap"]
    assert workspace.startswith(f"{SHARD}: md5 must be ") and "they were changed" in weights
    assert weights.startswith(f"version 1: the files in {registered_weights().parent} must have the registered digest")


def test_a_score_that_was_touched_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = registry.version_scores
    monkeypatch.setattr(registry, "version_scores", lambda uri, split: scores(uri, split) | {"scenes.CIDEr": 999.0}
                        if split == "gate" else scores(uri, split))
    failures = failed(list(verify.verify("1")))
    assert list(failures) == ["scored again"]
    assert "data/gate.json: scenes.CIDEr: the version has 999.0, got " in failures["scored again"]


def test_a_registered_score_file_that_was_changed_is_named() -> None:
    path = registry.version_files("models:/onediff/1") / "scores/gate.json"
    content = path.read_text()
    path.write_text("{}")
    try:
        assert "must have the registered md5" in failed(list(verify.verify("1")))["scored again"]
    finally:
        path.write_text(content)


def test_what_cache_and_remote_lack_is_named_and_what_needs_it_is_not_tried() -> None:
    kept = cached(Path("data/captions/gate/scenes.jsonl"))
    kept.rename("aside")
    try:
        checks = list(verify.verify("1"))
    finally:
        Path("aside").rename(kept)
    assert list(failed(checks)) == ["data/captions"]
    assert "gate/scenes.jsonl is missing: neither cache nor remote has" in failed(checks)["data/captions"]
    assert not [check for check in checks if "again" in check.what]


def test_code_that_is_not_in_the_commit_is_named() -> None:
    with edited(git={"commit": head(), "branch": "main", "dirty": ["onediff/stages/score.py"]}):
        failures = failed(list(islice(verify.verify("1"), 2)))
    assert list(failures.values()) == ["onediff/stages/score.py had changes that are in no commit"]


def test_a_lock_that_is_not_the_one_noted_is_named() -> None:
    with edited(dvc_lock="0" * 64):
        assert f"dvc.lock: SHA-256 must be {'0' * 64}" in str(next(verify.verify("1")))


@pytest.mark.parametrize(("commit", "message"), [
    ("0" * 40, r"commit 0{40}, which is not in this repository: 'git fetch origin' its branch \(retrain/7\) and try"),
    ("none", "was made outside git")])
def test_a_commit_that_cannot_be_had_stops_it(commit: str, message: str) -> None:
    with edited(git={"commit": commit, "branch": "retrain/7", "dirty": []}), pytest.raises(ValueError, match=message):
        list(verify.verify("1"))


def test_artefacts_that_are_gone_stop_it() -> None:
    folder = registry.version_files("models:/onediff/1")
    folder.rename(folder.with_name("aside"))
    try:
        with pytest.raises(ValueError, match=r"version 1 carries no lineage: .* its files are gone"):
            list(verify.verify("1"))
    finally:
        folder.with_name("aside").rename(folder)


def head() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
