from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import script, seed_tables, seeds
from onediff.files import write_json
from onediff.git import git, head

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pages and promotion rules of this project, in which scores of seeds can be written."""
    for path in (*seeds.PAGES, seeds.PROMOTION):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_result(seed: int, commit: str, **changes: float) -> None:
    figures = {"scenes.CIDEr": 2.0, "scenes.num_pairs": 1000, "scenes.floor.constant.CIDEr": 0.93,
               "scenes.false_alarm_rate": 0.03, "gate.scenes.false_alarm_rate": 0.04,
               "gate.scenes.by_change_type.none.num_pairs": 300,
               "edits.operation_accuracy_by_operation.blur": 0.9,
               "edits.swapped_accuracy_by_operation.blur.num_pairs": 7,
               "scenes.own_question.false_alarm_rate": 0.05, "scenes.paraphrases.false_alarm_rate.mean": 0.07,
               "stress.scenes.curves.noise.20.false_alarm_rate": 0.15, "stress.scenes.curves.noise.5.false_alarm_rate":
               0.1, "stress.scenes.curves.noise.none.false_alarm_rate": 0.05}
    seeds.HOME.mkdir(parents=True, exist_ok=True)
    write_json(seeds.HOME / f"{seed}.json", {"commit": commit, "figures": figures | changes})


def cells(page: Path, label: str) -> list[str]:
    line = next(line for line in page.read_text().splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_tables_show_the_mean_and_the_range_of_all_seeds(project: Path) -> None:
    for seed, cider, alarms in ((7, 2.0, 0.03), (8, 2.3, 0.02), (9, 2.6, 0.0)):
        write_result(seed, "abc", **{"scenes.CIDEr": cider, "gate.scenes.false_alarm_rate": alarms})
    seeds.table()
    written = json.loads(Path("docs/seeds.json").read_text())
    assert written["seeds"] == [7, 8, 9] and written["commit"] == "abc"
    assert written["figures"]["scenes.CIDEr"] == {"mean": 2.3, "low": 2.0, "high": 2.6}
    assert cells(Path("README.md"), "`scenes`, 1,000 pairs")[:2] == ["230.0 [200.0, 260.0]", "93.0"]
    results = Path("docs/results.md")
    assert cells(results, "best constant sentence")[3] == "93.0"
    assert cells(results, "`scenes`: false alarms")[:2] == ["3.0", "5.0"]
    assert cells(results, "*blur*") == ["90.0", "", "", "7"]
    text = results.read_text()
    assert text.index("noise none") < text.index("noise 5") < text.index("noise 20")
    assert "  scenes.false_alarm_rate: 0.06\n" in seeds.PROMOTION.read_text()
    before = results.read_text()
    seeds.table()
    assert results.read_text() == before


def test_scores_of_different_commits_are_not_mixed(project: Path) -> None:
    with pytest.raises(ValueError, match="must contain the scores of at least one seed"):
        seeds.table()
    write_result(7, "abc")
    write_result(8, "abd")
    with pytest.raises(ValueError, match="must belong to one commit, but belong to 2"):
        seeds.table()


def test_numbers_of_nested_tables_have_joined_names() -> None:
    scores = {"scenes": {"CIDEr": 2.5, "protocol": "v1", "intervals": {"CIDEr": [2, 3]}, "floor": {"x": {"y": 1}}}}
    assert dict(seeds.numbers(scores)) == {"scenes.CIDEr": 2.5, "scenes.floor.x.y": 1}


def test_a_figure_that_a_seed_lacks_is_left_out() -> None:
    assert list(seeds.summary([{"a": 1.0, "b": 2.0}, {"a": 2.0}])) == ["a"]


def test_a_page_without_the_lines_of_a_block_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    with pytest.raises(ValueError, match="must have the lines '<!-- scores -->' and '<!-- end of scores -->'"):
        script.write_block(page, "scores", ["| a |"])


def test_every_block_of_the_tables_exists_in_its_page() -> None:
    for page in seeds.PAGES:
        for name in seed_tables.BLOCKS[page.name]:
            assert (ROOT / page).read_text().count(f"<!-- {name} -->\n") == 1


def test_a_clone_gets_the_seed_and_keeps_its_progress_after_a_new_commit(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, clone = tmp_path / "root", tmp_path / "seeds/8"
    (root / "presets").mkdir(parents=True)
    (root / "presets/tiny.yaml").write_text("seed: 7\nsteps: 100\n")
    for name in ("dvc.lock", "params.yaml", "code.py"):
        (root / name).write_text("old")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    commit = ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam")
    git("add", ".", root=root)
    git(*commit, "first", root=root)
    monkeypatch.setattr(script, "ROOT", root)
    seeds.prepare(clone, 8)
    assert (clone / "params.yaml").read_text() == "seed: 8\nsteps: 100\n"
    (clone / "dvc.lock").write_text("progress of seed 8")
    for name in ("dvc.lock", "code.py"):
        (root / name).write_text("new")
    git(*commit, "second", root=root)
    seeds.prepare(clone, 8)
    assert head(clone) == head(root)
    assert [(clone / name).read_text() for name in ("dvc.lock", "code.py")] == ["progress of seed 8", "new"]


def test_the_processor_time_of_interrupted_trainings_is_added(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, outcomes = seeds.HOME / "7", iter([1, 0, 0, 0])  # the exit codes of four trainings
    weights = folder / seeds.TRAINED / "model.safetensors"
    weights.parent.mkdir(parents=True)
    spent = iter([0.0, 3.0, 3.0, 8.0, 8.0, 8.1, 8.1, 12.1])  # minutes before and after each training

    def repro(folder: Path, seed: int, *stages: str) -> None:
        if stages == ("tune",) and next(outcomes):
            raise ValueError("interrupted")

    monkeypatch.setattr(seeds, "repro", repro)
    monkeypatch.setattr(seeds, "_children_minutes", lambda: next(spent))
    with pytest.raises(ValueError, match="interrupted"):
        seeds.train(folder, 7)
    weights.write_bytes(b"first")
    assert seeds.train(folder, 7) == pytest.approx(8.0)
    assert seeds.train(folder, 7) == pytest.approx(8.0)  # The stage was up to date.
    weights.write_bytes(b"second")
    assert seeds.train(folder, 7) == pytest.approx(4.0)
