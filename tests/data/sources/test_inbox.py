from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from onediff.data.sources import inbox, tracked
from onediff.data.sources.inbox import Inbox, import_batches
from onediff.data.sources.published import open_files
from onediff.data.sources.read import records, summarize

EXAMPLES = Path(__file__).parents[3] / "examples"
SOURCES = ["mine", "other"]


@pytest.fixture
def drop_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inbox:
    """Without DVC, which tests/flows/test_refresh_data.py has; what was added is kept in the file `added`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inbox").mkdir()
    monkeypatch.setattr(tracked, "add", lambda folder: Path("added").write_text(str(folder)))
    return Inbox(Path("inbox"), Path("scratch"), SOURCES, settle_s=0, max_megapixels=64)


def drop(example: str, source: str = "mine") -> Path:
    return Path(shutil.copytree(EXAMPLES / example, Path("inbox") / source))


def pairs_in(folder: Path, source: str = "mine") -> list[tuple[bytes, bytes, tuple[str, ...]]]:
    files = open_files(folder, Path("scratch"))
    every = [record for split in ("train", "val", "gate", "test") for record in records(source, files, split)]
    return sorted((record.before, record.after, tuple(record.references)) for record in every)


@pytest.mark.parametrize("example", ["folder", "folder_jsonl"])
def test_a_batch_becomes_a_source_that_reads_as_the_batch_did(drop_box: Inbox, example: str) -> None:
    drop(example)
    dropped = pairs_in(Path("inbox/mine"))
    assert import_batches(drop_box).batches == [("mine", len(dropped))]
    assert pairs_in(Path("data/raw/mine")) == dropped
    assert list(Path("inbox").iterdir()) == [] and Path("added").read_text() == "data/raw/mine"
    assert summarize("mine", Path("data/raw/mine"), scratch=Path("scratch"))["missing"] == []


@pytest.mark.parametrize(("first", "second"), [("folder", "folder_jsonl"), ("folder_jsonl", "folder")])
def test_a_second_batch_is_added_to_what_was_there(drop_box: Inbox, first: str, second: str) -> None:
    """What was there is a folder made by hand, in either format."""
    shutil.copytree(EXAMPLES / first, "data/raw/mine")
    old = pairs_in(Path("data/raw/mine"))
    ids = [pair.official_id for pair in inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch")))]
    drop(second)
    new = pairs_in(Path("inbox/mine"))
    assert import_batches(drop_box).problems == []
    assert pairs_in(Path("data/raw/mine")) == sorted([*old, *new])
    every = [pair.official_id for pair in inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch")))]
    assert every[: len(ids)] == ids and len(set(every)) == len(old) + len(new)


def test_a_split_a_group_and_an_id_of_ones_own_are_kept(drop_box: Inbox) -> None:
    folder = drop("folder_jsonl")
    row = {"before": "1_before.png", "after": "1_after.png", "references": ["a|b", "c"], "split": "gate", "group": "g",
           "pair_id": "x7", "change_type": "color", "instruction": "What?"}
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    shutil.copytree(EXAMPLES / "folder", "data/raw/mine")  # a CSV, in which "a|b" would be two references
    assert import_batches(drop_box).problems == []
    [pair] = [pair for pair in inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch")))
              if pair.official_id == "x7"]
    assert (pair.split, pair.group, pair.references, pair.change_type, pair.instruction) == (
        "gate", "g", ["a|b", "c"], "color", "What?")


def test_the_same_images_come_into_the_same_split_whatever_they_are_called(drop_box: Inbox) -> None:
    for number in range(2):
        folder = drop("folder_jsonl")
        for side in ("before", "after"):
            (folder / f"1_{side}.png").rename(folder / f"{number}{side}.png")
        row = {"before": f"{number}before.png", "after": f"{number}after.png", "references": ["a"]}
        (folder / "pairs.jsonl").write_text(json.dumps(row))
        assert import_batches(drop_box).problems == []
    pairs = list(inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch"))))
    assert len(pairs) == 2 and len({(pair.group, pair.split) for pair in pairs}) == 1


def test_nothing_is_imported_while_something_changes(drop_box: Inbox) -> None:
    drop("folder")
    report = import_batches(replace(drop_box, settle_s=60))
    assert (report.batches, report.problems, report.waiting) == ([], [], ["mine"])
    assert Path("inbox/mine/pairs.csv").exists() and not Path("data/raw").exists()


def break_image(folder: Path) -> None:
    path = folder / "images/2_after.png"
    path.write_bytes(path.read_bytes()[:50])


def lose_image(folder: Path) -> None:
    (folder / "images/2_after.png").unlink()


def spoil_table(folder: Path) -> None:
    rows = list(csv.reader((folder / "pairs.csv").open()))
    rows[2][0] = "../../etc/passwd"
    with (folder / "pairs.csv").open("w") as file:
        csv.writer(file).writerows(rows)


def link_out(folder: Path) -> None:
    lose_image(folder)
    (folder / "images/2_after.png").symlink_to("/etc/passwd")


def no_table(folder: Path) -> None:
    (folder / "pairs.csv").unlink()


@pytest.mark.parametrize(("spoil", "message"), [
    (break_image, r"pair 2: .*2_after\.png: corrupt or truncated"),
    (lose_image, r"pair 2: the image images/2_after\.png is not in the folder; add the image"),
    (spoil_table, r"pairs\.csv line 3: before must be a path below the folder"),
    (link_out, r"images/2_after\.png is a symbolic link; replace the link by the file itself"),
    (no_table, r"must contain pairs\.csv or pairs\.jsonl"),
])
def test_a_bad_batch_stays_where_it_is_and_stops_no_other(drop_box: Inbox, spoil: Callable[[Path], Any],
                                                          message: str) -> None:
    spoil(drop("folder"))
    drop("folder_jsonl", "other")
    before = sorted(Path("inbox/mine").rglob("*"))
    report = import_batches(drop_box)
    assert report.batches == [("other", 2)] and len(report.problems) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(report.problems[0])
    assert report.problems[0].startswith("inbox/mine")
    assert sorted(Path("inbox/mine").rglob("*")) == before and not Path("data/raw/mine").exists()


@pytest.mark.parametrize(("name", "message"), [
    ("mnie", "a source in params.yaml: data.raw, which lists mine, other; did you mean 'mine'?"),
    ("spot_the_diff", "a published data set has this name"),
    ("My pairs", "rename the folder, or add the source there"),
])
def test_a_folder_of_a_wrong_name_is_reported(drop_box: Inbox, name: str, message: str) -> None:
    drop("folder", name)
    assert message in import_batches(drop_box).problems[0] and Path("inbox", name, "pairs.csv").exists()


def test_a_loose_file_is_reported(drop_box: Inbox) -> None:
    Path("inbox/pairs.csv").write_text("before,after")
    [problem] = import_batches(drop_box).problems
    assert problem == "inbox/pairs.csv: not a folder: put each batch into a sub-folder that has the name of its source"


def test_an_id_that_the_source_has_is_refused(drop_box: Inbox) -> None:
    for reference in ("a", "b"):
        folder = drop("folder_jsonl")
        row = {"before": "1_before.png", "after": "1_after.png", "references": [reference], "pair_id": "x7"}
        (folder / "pairs.jsonl").write_text(json.dumps(row))
        report = import_batches(drop_box)
    assert "pair 1: pair_id 'x7' already exists in the source" in report.problems[0]
    assert len(pairs_in(Path("data/raw/mine"))) == 1


def test_the_very_same_batch_again_is_reported_and_kept(drop_box: Inbox) -> None:
    drop("folder")
    import_batches(drop_box)
    drop("folder")
    assert "exactly these files were imported before, as data/raw/mine/" in import_batches(drop_box).problems[0]
    assert Path("inbox/mine/pairs.csv").exists() and len(pairs_in(Path("data/raw/mine"))) == 5


def test_a_source_that_dvc_has_but_this_clone_has_not_is_not_begun_anew(drop_box: Inbox) -> None:
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/mine.dvc").write_text("outs: []\n")
    drop("folder")
    assert "'dvc pull data/raw/mine.dvc' first" in import_batches(drop_box).problems[0]
    assert not Path("data/raw/mine").exists()


def test_without_an_inbox_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"create this folder, or set inbox in runtime\.yaml"):
        import_batches(Inbox(tmp_path / "none", tmp_path, SOURCES, settle_s=0, max_megapixels=64))


STEPS = ("rename", "replace", "mkdir", "unlink", "rmdir")


def _killed_before(step: int, drop_box: Inbox) -> None:
    """Takes the batches, and dies by SIGKILL before the step-th thing that it does to the file system."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done > step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    shutil.copyfile = counted(shutil.copyfile)
    tracked.add = counted(tracked.add)
    import_batches(drop_box)


@pytest.mark.parametrize("there", [None, "folder"])
def test_nothing_is_lost_or_doubled_wherever_it_is_killed(drop_box: Inbox, there: str | None) -> None:
    context = multiprocessing.get_context("fork")
    steps = 0
    while True:
        for folder in ("inbox/mine", "data"):
            shutil.rmtree(folder, ignore_errors=True)
        if there:
            shutil.copytree(EXAMPLES / there, "data/raw/mine")
        drop("folder_jsonl")
        wanted = sorted([*(pairs_in(Path("data/raw/mine")) if there else []), *pairs_in(Path("inbox/mine"))])
        Path("added").unlink(missing_ok=True)
        process = context.Process(target=_killed_before, args=(steps, drop_box))
        process.start()
        process.join()
        report = import_batches(drop_box)
        assert report.problems == [] and pairs_in(Path("data/raw/mine")) == wanted, steps
        assert list(Path("inbox").iterdir()) == [] and Path("added").exists(), steps
        assert not list(Path("data/raw/mine").glob(".*")), steps
        if process.exitcode == 0:
            break
        steps += 1
    assert steps > 8


def test_a_batch_of_large_images_is_refused_as_the_probe_would(drop_box: Inbox) -> None:
    folder = drop("folder")
    Image.new("RGB", (1100, 1000)).save(folder / "images/1_before.png")
    report = import_batches(replace(drop_box, max_megapixels=1))
    assert "pair 1: inbox/mine/images/1_before.png: 1.1 megapixels, at most 1 allowed" in report.problems[0]
