from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onediff.energy import counter

RANGE_UJ = 262_143_328_850


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where nvidia-ml-py is not installed


def package(folder: Path, name: str, energy_uj: int) -> Path:
    """A processor as Linux shows it."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (folder / name / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / name / "energy_uj"


def test_watt_hours_are_those_of_all_packages_and_of_no_part_of_one_twice(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 5), package(tmp_path, "intel-rapl:1", 7)
    core = package(tmp_path, "intel-rapl:0:0", 0)
    used = counter(tmp_path)
    assert used is not None and used() == 0
    for path, joules in ((first, 3600), (second, 7200), (core, 1800)):
        path.write_text(str(int(path.read_text()) + joules * 1_000_000))
    assert used() == pytest.approx(3.0)


def test_a_counter_that_began_again_is_followed(tmp_path: Path) -> None:
    path = package(tmp_path, "intel-rapl:0", RANGE_UJ - 1_800_000_000)
    used = counter(tmp_path)
    path.write_text("1800000000")
    assert used is not None and used() == pytest.approx(1.0)


def test_a_machine_that_counts_nothing_says_so(tmp_path: Path) -> None:
    assert counter(tmp_path) is None and counter(tmp_path / "none") is None
