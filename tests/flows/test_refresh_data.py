"""Tests of the flow `refresh_data` with a real DVC; tests/data/sources/test_inbox.py tests the inbox without DVC."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from onediff.data.sources import tracked

ROOT = Path(__file__).resolve().parents[2]
DVC = (sys.executable, "-m", "dvc")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one source of user data, an inbox, and no imported source."""
    folder = tmp_path / "project"
    (folder / "data/raw").mkdir(parents=True)
    (folder / "inbox").mkdir()
    monkeypatch.chdir(folder)
    shutil.copy(ROOT / "data/raw/.gitignore", "data/raw")
    Path("params.yaml").write_text((ROOT / "presets/micro.yaml").read_text().replace("raw: []", "raw: [mine]"))
    Path("runtime.yaml").write_text("inbox: inbox\n")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([*DVC, "init", "-q"], check=True)
    return folder


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which an HTTP server offers the files of this folder."""
    folder = tmp_path / "origin"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def import_file(address: str, path: str) -> None:
    """Import a file with `dvc import-url`, so that DVC records its origin."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*DVC, "import-url", "-q", address, path], check=True)


def test_a_file_that_changed_at_its_origin_is_updated_and_a_missing_origin_stops_nothing(
        project: Path, origin: tuple[Path, str], tmp_path: Path) -> None:
    from flows.refresh_data import update_sources

    folder, address = origin
    (folder / "train.json").write_text("one")
    (tmp_path / "gone.json").write_text("here once")
    import_file(f"{address}/train.json", "data/raw/spot_the_diff/train.json")
    import_file(str(tmp_path / "gone.json"), "data/raw/birds/gone.json")
    (folder / "train.json").write_text("one and two")
    (tmp_path / "gone.json").unlink()
    before = Path("data/raw/spot_the_diff/train.json.dvc").read_text()
    changed, [problem] = update_sources.fn()
    assert changed == ["data/raw/spot_the_diff/train.json: updated from its origin"]
    assert Path("data/raw/spot_the_diff/train.json").read_text() == "one and two"
    assert Path("data/raw/spot_the_diff/train.json.dvc").read_text() != before
    assert problem.startswith("dvc update data/raw/birds/gone.json.dvc: ")
    assert "gone.json' does not exist; the local data are unchanged" in problem
    assert "\n" not in problem and Path("data/raw/birds/gone.json").read_text() == "here once"


def test_only_dvc_files_with_an_origin_are_listed_as_imported(project: Path) -> None:
    for name, text in {"own": "outs:\n- md5: a\n  path: own\n",
                       "theirs": "deps:\n- path: http://x/y\nouts:\n- md5: b\n  path: theirs\n"}.items():
        Path(f"data/raw/{name}.dvc").write_text(text)
    assert tracked.imported() == [Path("data/raw/theirs.dvc")]
    Path("data/raw/bad.dvc").write_text("outs: [")
    with pytest.raises(ValueError, match=r"data/raw/bad\.dvc: must be a \.dvc file written by DVC"):
        tracked.imported()


def test_the_state_of_raw_data_depends_only_on_its_dvc_files(project: Path) -> None:
    Path("data/raw/a.dvc").write_text("outs: []")
    first = tracked.state()
    Path("data/raw/a").write_text("not read")
    assert tracked.state() == first
    Path("data/raw/a.dvc").write_text("outs: [b]")
    assert tracked.state() != first


def test_folders_from_the_inbox_are_added_to_raw_data_stored_by_dvc_and_readable(project: Path) -> None:
    from flows.refresh_data import take_batches

    shutil.copytree(ROOT / "examples/folder", "inbox/mine")
    taken = take_batches.fn(settle_s=0)
    assert (taken.batches, taken.problems) == ([("mine", 5)], [])
    shutil.copytree(ROOT / "examples/folder_jsonl", "inbox/mine")
    assert take_batches.fn(settle_s=0).batches == [("mine", 2)]
    read = subprocess.run([sys.executable, "-m", "onediff", "data", "read", "mine", "data/raw/mine"], text=True,
                          capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "no image missing" in read.stdout and "images missing" not in read.stdout
    shutil.rmtree("data/raw/mine")
    subprocess.run([*DVC, "checkout", "-q", "data/raw/mine.dvc"], check=True)
    assert Path("data/raw/mine/pairs.jsonl").read_text().count("\n") == 7


def test_without_an_inbox_no_pairs_are_imported(project: Path) -> None:
    from flows.refresh_data import take_batches

    Path("runtime.yaml").write_text("inbox: null\n")
    assert take_batches.fn(settle_s=0).batches == []


@pytest.mark.slow
def test_the_flow_reports_whether_data_changed_and_why_no_retraining_started(project: Path) -> None:
    def run(*settings: str) -> str:
        """Run the flow with these arguments, and return the name and the message of its last state."""
        code = "from flows.refresh_data import refresh_data; from flows.server import temporary_server\n" \
               f"with temporary_server(): state = refresh_data({', '.join(settings)}, return_state=True)\n" \
               "print('END', state.name, state.message)"
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        return next(line for line in done.stdout.splitlines() if line.startswith("END"))

    assert run("settle_s=0") == "END Unchanged nothing is new"
    shutil.copytree(ROOT / "examples/folder", "inbox/mine")
    end = run("settle_s=0", "then_retrain=True")
    assert end.startswith("END Changed mine: 5 pairs imported; no retraining was started: retrain/retrain")
    shutil.copytree(ROOT / "examples/folder", "inbox/mnie")
    assert run("settle_s=0").startswith("END Failed inbox/mnie: the folder must have the name of a source")
