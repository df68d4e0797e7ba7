from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
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
    """Return an empty inbox. Instead of calling DVC, importing a batch writes the folder name to the file `added`.

    tests/flows/test_refresh_data.py tests the import with DVC.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inbox").mkdir()
    monkeypatch.setattr(tracked, "add", lambda folder: Path("added").write_text(str(folder)))
    return Inbox(Path("inbox"), Path("scratch"), SOURCES, settle_s=0, max_megapixels=64)


def drop(example: str, source: str = "mine") -> Path:
    return Path(shutil.copytree(EXAMPLES / example, Path("inbox") / source))


def pairs_in(folder: Path, source: str = "mine") -> list[tuple[bytes, bytes, tuple[str, ...]]]:
    """Return the images and references of all pairs that the reader for users' own pairs reads from a folder."""
    files = open_files(folder, Path("scratch"))
    return sorted((record.before, record.after, tuple(record.references))
                  for split in ("train", "val", "gate", "test") for record in records(source, files, split))


@pytest.mark.parametrize("example", ["folder", "folder_jsonl"])
def test_a_first_batch_creates_a_source_with_the_pairs_of_the_batch(drop_box: Inbox, example: str) -> None:
    drop(example)
    dropped = pairs_in(Path("inbox/mine"))
    assert import_batches(drop_box).batches == [("mine", len(dropped))]
    assert pairs_in(Path("data/raw/mine")) == dropped
    assert list(Path("inbox").iterdir()) == [] and Path("added").read_text() == "data/raw/mine"
    assert summarize("mine", Path("data/raw/mine"), scratch=Path("scratch"))["missing"] == []


@pytest.mark.parametrize(("first", "second"), [("folder", "folder_jsonl"), ("folder_jsonl", "folder")])
def test_a_batch_is_appended_to_a_source_that_a_user_created_by_hand(drop_box: Inbox, first: str, second: str) -> None:
    shutil.copytree(EXAMPLES / first, "data/raw/mine")
    old = pairs_in(Path("data/raw/mine"))
    old_ids = [pair.official_id for pair in inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch")))]
    drop(second)
    new = pairs_in(Path("inbox/mine"))
    assert import_batches(drop_box).problems == []
    assert pairs_in(Path("data/raw/mine")) == sorted([*old, *new])
    ids = [pair.official_id for pair in inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch")))]
    assert ids[: len(old_ids)] == old_ids and len(set(ids)) == len(old) + len(new)


def test_split_group_pair_id_and_other_values_of_a_row_are_kept(drop_box: Inbox) -> None:
    folder = drop("folder_jsonl")
    row = {"before": "1_before.png", "after": "1_after.png", "references": ["a|b", "c"], "split": "gate", "group": "g",
           "pair_id": "x7", "change_type": "color", "instruction": "What?"}
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    # This source has a CSV table, in which the text "a|b" would be read as two references.
    shutil.copytree(EXAMPLES / "folder", "data/raw/mine")
    assert import_batches(drop_box).problems == []
    [pair] = [pair for pair in inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch")))
              if pair.official_id == "x7"]
    assert (pair.split, pair.group, pair.references, pair.change_type, pair.instruction) == (
        "gate", "g", ["a|b", "c"], "color", "What?")


def test_pairs_with_equal_images_get_one_split_even_if_the_file_names_differ(drop_box: Inbox) -> None:
    for number in range(2):
        folder = drop("folder_jsonl")
        for side in ("before", "after"):
            (folder / f"1_{side}.png").rename(folder / f"{number}{side}.png")
        row = {"before": f"{number}before.png", "after": f"{number}after.png", "references": ["a"]}
        (folder / "pairs.jsonl").write_text(json.dumps(row))
        assert import_batches(drop_box).problems == []
    pairs = list(inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch"))))
    assert len(pairs) == 2 and len({(pair.group, pair.split) for pair in pairs}) == 1


def test_a_batch_that_has_changed_recently_is_not_imported_yet(drop_box: Inbox) -> None:
    drop("folder")
    report = import_batches(replace(drop_box, settle_s=60))
    assert (report.batches, report.problems, report.waiting) == ([], [], ["mine"])
    assert Path("inbox/mine/pairs.csv").exists() and not Path("data/raw").exists()


def break_image(folder: Path) -> None:
    path = folder / "images/2_after.png"
    path.write_bytes(path.read_bytes()[:50])


def delete_image(folder: Path) -> None:
    (folder / "images/2_after.png").unlink()


def write_path_outside_the_folder(folder: Path) -> None:
    rows = list(csv.reader((folder / "pairs.csv").open()))
    rows[2][0] = "../../etc/passwd"
    with (folder / "pairs.csv").open("w") as file:
        csv.writer(file).writerows(rows)


def replace_image_by_link(folder: Path) -> None:
    delete_image(folder)
    (folder / "images/2_after.png").symlink_to("/etc/passwd")


def delete_table(folder: Path) -> None:
    (folder / "pairs.csv").unlink()


@pytest.mark.parametrize(("damage", "message"), [
    (break_image, r"pair 2: .*2_after\.png: corrupt or truncated"),
    (delete_image, r"pair 2: the image images/2_after\.png is not in the folder of the batch; add the image"),
    (write_path_outside_the_folder, r"pairs\.csv line 3: before must be a path below the folder"),
    (replace_image_by_link, r"images/2_after\.png is a symbolic link; replace the link by the file itself"),
    (delete_table, r"must contain pairs\.csv or pairs\.jsonl"),
])
def test_a_bad_batch_is_reported_and_stays_in_the_inbox_while_other_batches_are_imported(
        drop_box: Inbox, damage: Callable[[Path], Any], message: str) -> None:
    damage(drop("folder"))
    drop("folder_jsonl", "other")
    files = sorted(Path("inbox/mine").rglob("*"))
    report = import_batches(drop_box)
    assert report.batches == [("other", 2)] and len(report.problems) == 1
    assert re.search(message, report.problems[0])
    assert report.problems[0].startswith("inbox/mine")
    assert sorted(Path("inbox/mine").rglob("*")) == files and not Path("data/raw/mine").exists()


@pytest.mark.parametrize(("name", "message"), [
    ("mnie", "a source in params.yaml: data.raw, which lists mine, other; did you mean 'mine'?"),
    ("spot_the_diff", "a published data set has this name"),
    ("My pairs", "rename the folder, or add the source to data.raw"),
])
def test_a_batch_whose_folder_name_is_not_a_source_is_reported(drop_box: Inbox, name: str, message: str) -> None:
    drop("folder", name)
    assert message in import_batches(drop_box).problems[0] and Path("inbox", name, "pairs.csv").exists()


def test_a_file_directly_in_the_inbox_is_reported(drop_box: Inbox) -> None:
    Path("inbox/pairs.csv").write_text("before,after")
    [problem] = import_batches(drop_box).problems
    assert problem == ("inbox/pairs.csv: not a folder: put each batch into a sub-folder of the inbox that has the name "
                       "of its source")


def test_a_pair_id_that_already_exists_in_the_source_is_refused(drop_box: Inbox) -> None:
    for reference in ("a", "b"):
        folder = drop("folder_jsonl")
        row = {"before": "1_before.png", "after": "1_after.png", "references": [reference], "pair_id": "x7"}
        (folder / "pairs.jsonl").write_text(json.dumps(row))
        report = import_batches(drop_box)
    assert "pair 1: pair_id 'x7' already exists in the source" in report.problems[0]
    assert len(pairs_in(Path("data/raw/mine"))) == 1


def test_two_pairs_of_a_batch_with_equal_images_are_refused(drop_box: Inbox) -> None:
    folder = drop("folder_jsonl")
    for side in ("before", "after"):
        shutil.copy(folder / f"1_{side}.png", folder / f"copy_{side}.png")
    rows = [{"before": f"{name}_before.png", "after": f"{name}_after.png", "references": ["a"]}
            for name in ("1", "copy")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "pair 2: the images have the content of those of pair 1; write" in import_batches(drop_box).problems[0]


def test_rows_of_one_pair_are_imported_as_one_pair(drop_box: Inbox) -> None:
    folder = drop("folder_jsonl")
    rows = [{"before": "1_before.png", "after": "1_after.png", "references": [text], "pair_id": 0} for text in "ab"]
    (folder / "pairs.jsonl").write_text("\r\n".join(map(json.dumps, rows)), encoding="utf-16")
    assert import_batches(drop_box).batches == [("mine", 1)]
    [pair] = inbox.own.read(open_files(Path("data/raw/mine"), Path("scratch")))
    assert (pair.official_id, pair.references) == ("0", ["a", "b"])


def test_a_copy_of_an_imported_batch_is_reported_and_stays_in_the_inbox(drop_box: Inbox) -> None:
    drop("folder")
    import_batches(drop_box)
    drop("folder")
    assert "exactly these files were imported before, as data/raw/mine/" in import_batches(drop_box).problems[0]
    assert Path("inbox/mine/pairs.csv").exists() and len(pairs_in(Path("data/raw/mine"))) == 5


def test_a_batch_for_a_source_whose_dvc_files_were_not_pulled_is_refused(drop_box: Inbox) -> None:
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/mine.dvc").write_text("outs: []\n")
    drop("folder")
    assert "'dvc pull data/raw/mine.dvc' first" in import_batches(drop_box).problems[0]
    assert not Path("data/raw/mine").exists()


def test_a_missing_inbox_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"create this folder, or set inbox in runtime\.yaml"):
        import_batches(Inbox(tmp_path / "none", tmp_path, SOURCES, settle_s=0, max_megapixels=64))


CHANGES = ("rename", "replace", "mkdir", "unlink", "rmdir")  # functions of `os` that change the file system


def _import_and_die(num_calls: int, drop_box: Inbox) -> None:
    """Import the batches, but kill this process with SIGKILL after `num_calls` changes of the file system."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done > num_calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    shutil.copyfile = counted(shutil.copyfile)
    tracked.add = counted(tracked.add)
    import_batches(drop_box)


@pytest.mark.parametrize("existing", [None, "folder"])
def test_an_import_that_was_killed_at_any_step_loses_and_duplicates_no_pair(drop_box: Inbox,
                                                                            existing: str | None) -> None:
    context = multiprocessing.get_context("fork")
    num_calls = 0
    while True:
        for folder in ("inbox/mine", "data"):
            shutil.rmtree(folder, ignore_errors=True)
        if existing:
            shutil.copytree(EXAMPLES / existing, "data/raw/mine")
        drop("folder_jsonl")
        expected = sorted([*(pairs_in(Path("data/raw/mine")) if existing else []), *pairs_in(Path("inbox/mine"))])
        Path("added").unlink(missing_ok=True)
        process = context.Process(target=_import_and_die, args=(num_calls, drop_box))
        process.start()
        process.join()
        report = import_batches(drop_box)
        assert report.problems == [] and pairs_in(Path("data/raw/mine")) == expected, num_calls
        assert list(Path("inbox").iterdir()) == [] and Path("added").exists(), num_calls
        assert not list(Path("data/raw/mine").glob(".*")), num_calls
        if process.exitcode == 0:
            break
        num_calls += 1
    assert num_calls > 8


def test_a_batch_with_an_image_above_max_megapixels_is_refused(drop_box: Inbox) -> None:
    folder = drop("folder")
    Image.new("RGB", (1100, 1000)).save(folder / "images/1_before.png")
    report = import_batches(replace(drop_box, max_megapixels=1))
    assert "pair 1: inbox/mine/images/1_before.png: 1.1 megapixels, at most 1 allowed" in report.problems[0]
