"""Tests of `onediff lineage VERSION --verify` on a small complete project."""

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
    """Return the file in DVC's cache that has the content of this file."""
    md5 = versioned.md5_of(path)
    return Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]


def registered_weights() -> Path:
    return next(registry.version_files("models:/onediff/1").rglob("model.safetensors"))


def failed(checks: list[Check]) -> dict[str, str]:
    """Return the problem of each failed check, by the first words of the check."""
    return {check.what.split(" by ")[0].split(" with ")[0]: check.problem for check in checks if check.problem}


@contextmanager
def edited_lineage(**changes: Any) -> Iterator[None]:
    """Change keys in lineage.json of the registered version during the `with` block, and then restore the file."""
    path = registry.version_files("models:/onediff/1") / "lineage/lineage.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    try:
        yield
    finally:
        path.write_text(before)


def test_a_correct_version_passes_every_check_and_no_file_remains() -> None:
    before = sorted(Path().rglob("*"))
    checks = list(verify.verify("candidate"))
    assert failed(checks) == {}
    assert str(checks[0]) == "ok      dvc.lock and data card of the version"
    assert "scoring again" in str(checks[-2]) and "100.0 % identical captions of 12 pairs" in str(checks[-1])
    assert [path for path in sorted(Path().rglob("*")) if path not in before] == [Path(".onediff")]
    assert not list(Path(".onediff").iterdir())


def test_one_wrong_byte_in_cache_workspace_or_weights_is_reported_and_the_exit_code_is_1(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["onediff", "lineage", "1", "--verify", "--json"])
    with ExitStack() as stack:
        for path in (cached(Path(SHARD)), Path(SHARD), registered_weights()):
            stack.enter_context(tiny_project.flipped(path))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    result = json.loads(capsys.readouterr().out)
    failures = failed([Check(**check) for check in result["checks"]])
    workspace, weights = (next(failures[key] for key in failures if part in key) for part in ("workspace", "weights"))
    assert exit_.value.code == 1 and not result["verified"] and len(failures) == 3
    assert "train-00000.parquet is damaged: its md5 must be " in failures["data/diffcap"]
    assert workspace.startswith(f"{SHARD}: md5 must be ") and "they were changed" in weights
    assert weights.startswith(f"version 1: the files in {registered_weights().parent} must have the registered digest")


def test_a_changed_score_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = registry.version_scores
    monkeypatch.setattr(registry, "version_scores", lambda uri, split: scores(uri, split) | {"scenes.CIDEr": 999.0}
                        if split == "gate" else scores(uri, split))
    failures = failed(list(verify.verify("1")))
    assert list(failures) == ["scoring again"]
    assert "data/gate.json: scenes.CIDEr: the version has 999.0, got " in failures["scoring again"]


def test_a_changed_file_of_registered_scores_is_reported() -> None:
    path = registry.version_files("models:/onediff/1") / "scores/gate.json"
    content = path.read_text()
    path.write_text("{}")
    try:
        assert "must have the registered md5" in failed(list(verify.verify("1")))["scoring again"]
    finally:
        path.write_text(content)


def test_a_missing_file_is_reported_and_checks_that_need_it_are_skipped() -> None:
    cached_file = cached(Path("data/captions/gate/scenes.jsonl"))
    cached_file.rename("aside")
    try:
        checks = list(verify.verify("1"))
    finally:
        Path("aside").rename(cached_file)
    assert list(failed(checks)) == ["data/captions"]
    assert "gate/scenes.jsonl is missing: neither the cache nor a remote contains" in failed(checks)["data/captions"]
    assert not [check for check in checks if "again" in check.what]


def test_uncommitted_code_is_reported() -> None:
    with edited_lineage(git={"commit": head(), "branch": "main", "dirty": ["onediff/stages/score.py"]}):
        failures = failed(list(islice(verify.verify("1"), 2)))
    assert list(failures.values()) == ["onediff/stages/score.py had uncommitted changes"]


def test_a_dvc_lock_with_another_digest_is_reported() -> None:
    with edited_lineage(dvc_lock="0" * 64):
        assert f"dvc.lock: SHA-256 must be {'0' * 64}" in str(next(verify.verify("1")))


@pytest.mark.parametrize(("commit", "message"), [
    ("0" * 40, r"commit 0{40}, which this repository does not contain: fetch the branch of the commit \(retrain/7\)"),
    ("none", "was trained without git")])
def test_a_version_without_an_available_commit_is_refused(commit: str, message: str) -> None:
    git = {"commit": commit, "branch": "retrain/7", "dirty": []}
    with edited_lineage(git=git), pytest.raises(ValueError, match=message):
        list(verify.verify("1"))


def test_a_version_whose_files_were_deleted_is_refused() -> None:
    folder = registry.version_files("models:/onediff/1")
    folder.rename(folder.with_name("aside"))
    try:
        with pytest.raises(ValueError, match=r"version 1 has no lineage: .* files were deleted"):
            list(verify.verify("1"))
    finally:
        folder.with_name("aside").rename(folder)


def head() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
