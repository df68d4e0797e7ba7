"""Files and folders are either complete or absent, and a full disk is reported in one line."""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onediff.files import (
    NotWrittenError,
    check_new_file,
    disk_full_named,
    find_file,
    new_file,
    new_folder,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)

ROOT = Path(__file__).parents[1]
FULL = Path("/dev/full")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_only_if_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "diffcap"
    with new_folder(out) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ValueError, match="bad pair"), new_folder(out) as folder:
        (folder / "a").write_text("half")
        raise ValueError("bad pair")
    assert (out / "a").read_text() == "old" and names(tmp_path) == ["diffcap"]
    (tmp_path / "diffcap.part").mkdir()
    (tmp_path / "diffcap.part/of a killed process").touch()
    with new_folder(out) as folder:
        (folder / "b").write_text("new")
    assert names(tmp_path) == ["diffcap"] and names(out) == ["b"]


def test_the_old_folder_is_restored_after_a_process_was_killed_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / "diffcap.old.part").mkdir()
    (tmp_path / "diffcap.old.part/a").write_text("old")
    with pytest.raises(ValueError, match="bad pair"), new_folder(tmp_path / "diffcap"):
        raise ValueError("bad pair")
    assert names(tmp_path) == ["diffcap"] and (tmp_path / "diffcap/a").read_text() == "old"


def test_no_existing_file_is_opened_for_writing(tmp_path: Path) -> None:
    """An output, or the .part file of a killed process, may be a hard link to a file of DVC's cache."""
    for name in ("cached", "cached too"):
        (tmp_path / name).write_text("one")
    os.link(tmp_path / "cached", tmp_path / "out.json")
    os.link(tmp_path / "cached too", tmp_path / "out.json.part")
    write_json(tmp_path / "out.json", {"b": 1, "a": 2}, sort_keys=True)
    assert (tmp_path / "out.json").read_text() == '{"a": 2, "b": 1}\n'
    assert (tmp_path / "cached").read_text() == (tmp_path / "cached too").read_text() == "one"


def test_a_file_is_kept_if_writing_the_new_one_fails(tmp_path: Path) -> None:
    out = tmp_path / "inner/out.json"
    write_text(out, "old")
    with pytest.raises(TypeError):
        write_json(out, {1, 2})
    with pytest.raises(ValueError, match="bad pair"), new_file(out) as part:
        part.write_text("half")
        raise ValueError("bad pair")
    assert out.read_text() == "old" and names(out.parent) == ["out.json"]


def _text() -> None:
    FULL.write_text("x" * 10_000)


def _array() -> None:
    with FULL.open("wb") as file:
        np.save(file, np.zeros(10_000))


def _parquet() -> None:
    with FULL.open("wb") as file:
        pq.write_table(pa.table({"a": [1]}), file)


def _database() -> None:
    with sqlite3.connect(":memory:") as store:
        store.execute("pragma max_page_count = 2")
        store.execute("create table a (b)")
        store.execute("insert into a values (zeroblob(100000))")


def _wrapped() -> None:
    try:
        _text()
    except OSError as error:
        raise RuntimeError("the library failed") from error


@pytest.mark.parametrize("write", [_text, _array, _parquet, _database, _wrapped])
def test_every_way_to_report_a_full_disk_becomes_one_line(write: Callable[[], None], tmp_path: Path) -> None:
    with pytest.raises(NotWrittenError) as caught, disk_full_named(tmp_path / "out"):
        write()
    message = str(caught.value)
    assert " could not be written: the disk is full (" in message and "run the same command again" in message
    assert "MB are free" in message and "\n" not in message


def test_json_files_are_read_back_and_errors_name_the_file_and_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for read in (read_json, read_jsonl):
        with pytest.raises(FileNotFoundError, match=r"a\.json does not exist: run 'dvc repro' to create it$"):
            read(path)
    write_json(path, {"a": "\u2028\u00e9"})
    assert read_json(path) == {"a": "\u2028\u00e9"}
    write_jsonl(path, [{"a": "\u2028\u00e9"}, 3])
    assert read_jsonl(path) == [{"a": "\u2028\u00e9"}, 3]
    path.write_bytes(b"3\n{")
    with pytest.raises(ValueError, match=r"a\.json line 2: not valid JSON \(.*\): restore it$"):
        read_json(path, "restore it")
    with pytest.raises(ValueError, match=r"a\.json line 2: not valid JSON \(.*\): restore it$"):
        read_jsonl(path, "restore it")
    path.write_bytes(b"3\n\xff")
    for read in (read_json, read_jsonl):
        with pytest.raises(ValueError, match=r"a\.json line 2: must be UTF-8"):
            read(path)


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), disk_full_named(tmp_path):
        tmp_path.write_text("x")
    with pytest.raises(ValueError, match=r"^explained already: No space left on device$"), disk_full_named(tmp_path):
        raise ValueError("explained already: No space left on device")


def test_a_folder_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "out").symlink_to("/dev/null")
    for path, kind in ((tmp_path / "t", "a folder"), (tmp_path / "out", "a device"), (Path(), "a folder")):
        with pytest.raises(IsADirectoryError, match=f"{path} is {kind}.*, but must be a file: give the path of a file"):
            write_text(path, "x")
    assert names(tmp_path) == ["out", "t"]


def test_a_path_that_cannot_be_written_is_refused_and_the_check_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file/x", tmp_path / ("x" * 300)):
        with pytest.raises(NotWrittenError, match=r"x cannot be written \(.*\): give a path in a folder"):
            check_new_file(path)
    check_new_file(tmp_path / "new/x")
    assert names(tmp_path) == ["file", "new"] and names(tmp_path / "new") == []


STAGE = """
import numpy as np
from pathlib import Path
from safetensors.numpy import save_file
from onediff.files import new_folder
from onediff.stages.command import run

def train() -> None:
    with new_folder(Path("data/models/tune")) as folder:
        save_file({"a": np.zeros(100_000)}, folder / "model.safetensors")

run(train)
"""


def test_a_stage_on_a_full_disk_prints_one_line_keeps_the_old_output_and_works_later(tmp_path: Path) -> None:
    model = tmp_path / "data/models/tune/model.safetensors"
    write_text(model, "old")
    command = [sys.executable, "-c", STAGE]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 1
    assert done.stderr.startswith("train: data/models/tune could not be written: the file is larger than the limit")
    assert done.stderr.count("\n") == 1 and model.read_text() == "old" and names(model.parent) == [model.name]
    assert names(tmp_path / "data/models") == ["tune"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert model.stat().st_size > 800_000
    assert json.loads(model.read_bytes()[8:].split(b"}}")[0] + b"}}")["a"]["shape"] == [100_000]


def test_a_file_is_found_although_its_accents_are_encoded_in_another_way(tmp_path: Path) -> None:
    folder = tmp_path / "fu\u0308r"
    folder.mkdir()
    (folder / "cafe\u0301.png").write_text("content")
    for name in ("f\xfcr/caf\xe9.png", "fu\u0308r/caf\xe9.png", "f\xfcr/cafe\u0301.png", "fu\u0308r/cafe\u0301.png"):
        assert find_file(tmp_path / name) == folder / "cafe\u0301.png"
    assert find_file(tmp_path / "f\xfcr") is None, "a folder is no file"
    assert find_file(tmp_path / "f\xfcr/cafe.png") is None
    assert find_file(tmp_path / "nothing/caf\xe9.png") is None


def test_a_file_is_not_chosen_at_random_from_two_whose_names_look_alike(tmp_path: Path) -> None:
    one, other = tmp_path / "\u1ea9.png", tmp_path / "\xe2\u0309.png"
    one.touch()
    other.touch()
    assert find_file(one) == one and find_file(other) == other
    with pytest.raises(ValueError, match=r"two names differ only .*\\xe2\\u0309\.png.* and .*\\u1ea9\.png.*; rename"):
        find_file(tmp_path / "a\u0302\u0309.png")
