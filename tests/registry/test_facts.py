"""Tests of the facts about the data and the code of a model that the promotion rules can require."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from registered import model
from ruamel.yaml import YAML

from onediff.registry.facts import AUDIT, DIFFCAP, QUARANTINE, REPORTS, facts_at_registration, locked_md5, size_mib
from onediff.repro.lock import md5_of


@pytest.fixture
def trained_folder() -> Path:
    """Return a model folder, with the data, reports and dvc.lock that DVC would leave beside it."""
    folder = model("tune")
    for path, text in ((f"{DIFFCAP}/card.json", "{}"), (QUARANTINE, "none"), (f"{REPORTS}/{AUDIT}", audit("clean"))):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    write_lock()
    return folder


def audit(verdict: str) -> str:
    return json.dumps({"benchmarks": {"scenes": {"verdict": verdict}, "edits": {"verdict": "clean"}}})


def write_lock(**digests: str) -> None:
    """Write dvc.lock with three stages. `digests` replaces the digests of the files on disk for some outputs."""
    on_disk = {path: md5_of(Path(path)) for path in (QUARANTINE, DIFFCAP, REPORTS, "models/tune")}

    def line(path: str, digest: str | None = None) -> dict[str, str]:
        return {"path": path, "hash": "md5", "md5": digest or on_disk[path]}

    stages = {"validate": {"cmd": "x", "outs": [line(QUARANTINE, digests.get("validated"))]},
              "build": {"cmd": "x", "deps": [line(QUARANTINE)],
                        "outs": [line(DIFFCAP, digests.get("built")), line(REPORTS, digests.get("reported"))]},
              "tune": {"cmd": "x", "deps": [line(DIFFCAP)], "outs": [line("models/tune", digests.get("trained"))]}}
    with Path("dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)


def test_all_facts_about_a_model_from_validated_and_clean_data_are_true(trained_folder: Path) -> None:
    facts = facts_at_registration(trained_folder)
    assert facts["data_validated"] == facts["leak_audit"] == "yes"
    assert facts == facts_at_registration(trained_folder.absolute(), root=Path().absolute())
    assert locked_md5(trained_folder) == md5_of(trained_folder)


@pytest.mark.parametrize(("changed", "reason"), [
    ({"trained": "0.dir"}, "models/tune must have the digest in dvc.lock"),
    ({"built": "0.dir"}, "data/diffcap that a later stage read must be the output of stage build"),
    ({"validated": "0"}, "data/quarantine.parquet that a later stage read must be the output of stage validate")])
def test_a_broken_chain_of_digests_is_reported(trained_folder: Path, changed: dict[str, str], reason: str) -> None:
    write_lock(**changed)
    facts = facts_at_registration(trained_folder)
    assert reason in facts["data_validated"] and reason in facts["leak_audit"]
    assert facts["data_validated"].startswith("no: ")


def test_a_leak_is_reported_with_its_numbers(trained_folder: Path) -> None:
    Path(REPORTS, AUDIT).write_text(audit("3 of 1000 test pairs leak"))
    assert "must have the digest in dvc.lock" in facts_at_registration(trained_folder)["leak_audit"]
    write_lock()
    leaks = facts_at_registration(trained_folder)["leak_audit"]
    assert leaks.startswith("no: scenes: 3 of 1000 test pairs leak; see data/reports/diffcap/audit")
    Path(REPORTS, AUDIT).unlink()
    leaks = facts_at_registration(trained_folder)["leak_audit"]
    assert "audit.json does not exist; 'dvc pull build' downloads it" in leaks


def test_a_folder_that_no_stage_created_has_no_validated_data(trained_folder: Path) -> None:
    validated = facts_at_registration(model("own"))["data_validated"]
    assert validated.startswith("no: models/own must be an output of a stage in dvc.lock")
    Path("dvc.lock").unlink()
    assert locked_md5(trained_folder) is None


def test_the_size_of_a_folder_is_the_sum_of_all_files(trained_folder: Path) -> None:
    (trained_folder / "more").mkdir()
    (trained_folder / "more/b").write_bytes(b"0" * 2**20)
    assert size_mib(trained_folder) == pytest.approx(1 + 6 / 2**20)
