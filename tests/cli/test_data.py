"""Tests of the commands `onediff data`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import run_cli
from PIL import Image

from onediff.data.record import Record, write_shards

ROOT = Path(__file__).resolve().parents[2]


def _data(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    return run_cli(monkeypatch, "data", *arguments)


def test_status_lists_every_source_with_its_next_step(
        project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _data(monkeypatch, "status", "--json") == 0
    rows = {row["source"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"spot_the_diff", "clevr_change", "instruct_pix2pix", "llava_665k", "coco"} <= rows.keys()
    assert "onediff data fetch spot_the_diff" in rows["spot_the_diff"]["todo"]


def test_reading_a_folder_counts_its_pairs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                       project: Path) -> None:
    assert _data(monkeypatch, "read", "mine", str(ROOT / "examples/folder"), "--json") == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert sum(counts["records"] for counts in splits.values()) == 5
    assert all(counts["missing_images"] == 0 for counts in splits.values())


def test_reading_a_folder_reports_a_truncated_jpeg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                   project: Path) -> None:
    Path("mine").mkdir()
    Image.effect_noise((97, 89), 50).convert("RGB").save("mine/a.jpg")
    content = Path("mine/a.jpg").read_bytes()
    Path("mine/b.jpg").write_bytes(content[:len(content) // 2])
    Path("mine/pairs.csv").write_text("before,after,split\na.jpg,b.jpg,train\n")
    assert _data(monkeypatch, "read", "mine", "mine") == 0
    assert "broken: mine/b.jpg: corrupt or truncated image" in capsys.readouterr().out


def test_an_error_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = str(_data(monkeypatch, "read", "spot_the_dif", str(project)))
    assert message.startswith("onediff: ") and "did you mean 'spot_the_diff'?" in message and "\n" not in message


def test_a_folder_that_does_not_exist_is_refused_with_the_page_about_own_pairs(
        project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = str(_data(monkeypatch, "read", "mine", "nope"))
    assert "nope does not exist or is not a folder" in message and "docs/own-pairs.md" in message


def test_a_dry_run_of_an_unknown_source_lists_the_valid_sources(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = str(_data(monkeypatch, "dry-run", "nope"))
    assert message.endswith("does not list 'nope'; add this source, or choose one of the listed sources: "
                            "instruct_pix2pix, coco")
    shutil.copy(ROOT / "presets/tiny.yaml", "params.yaml")
    message = str(_data(monkeypatch, "dry-run", "nope"))
    assert message.endswith("the list is empty; presets/paper.yaml has an example of a list")


def test_a_dry_run_prints_requests_and_cost_and_sends_nothing(
        project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("INPUT", "OUTPUT"):
        monkeypatch.setenv(f"ONEDIFF_WRITER_USD_PER_MILLION_{key}", "1.0")
    monkeypatch.setenv("ONEDIFF_WRITER_KEY", "very-secret")
    pair = Record("coco-train-1", "coco", "train", "g", b"1", b"2", [], "?", "unlabelled",
                  {"captions": ["a red car", "a blue car"]})
    write_shards([pair], project / "data/pairs/coco", "train", shard_pairs=9)
    assert _data(monkeypatch, "dry-run", "coco") == 0
    output = capsys.readouterr().out
    assert "a red car" in output and "USD" in output and "very-secret" not in output
    assert not (project / "data/answers").exists()


def test_browse_writes_a_page_with_the_captions(
        project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        scene_pairs: list[Record]) -> None:
    write_shards(scene_pairs, project / "data/diffcap", "train", shard_pairs=99)
    assert _data(monkeypatch, "browse") == 0
    page = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert scene_pairs[0].references[0] in page
