"""With a real DVC; the inbox by itself is tests/data/sources/test_inbox.py."""

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
    """A clone with one own source, an inbox, and no imports yet."""
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
    """A folder and the address at which it is served."""
    folder = tmp_path / "origin"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def bring(address: str, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*DVC, "import-url", "-q", address, path], check=True)


def test_what_changed_at_its_origin_is_brought_and_what_cannot_be_had_stops_nothing(
        project: Path, origin: tuple[Path, str], tmp_path: Path) -> None:
    from flows.refresh_data import update_sources

    folder, address = origin
    (folder / "train.json").write_text("one")
    (tmp_path / "gone.json").write_text("here once")
    bring(f"{address}/train.json", "data/raw/spot_the_diff/train.json")
    bring(str(tmp_path / "gone.json"), "data/raw/birds/gone.json")
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


def test_only_what_was_imported_is_asked_for(project: Path) -> None:
    for name, text in {"own": "outs:\n- md5: a\n  path: own\n",
                       "theirs": "deps:\n- path: http://x/y\nouts:\n- md5: b\n  path: theirs\n"}.items():
        Path(f"data/raw/{name}.dvc").write_text(text)
    assert tracked.imported() == [Path("data/raw/theirs.dvc")]
    Path("data/raw/bad.dvc").write_text("outs: [")
    with pytest.raises(ValueError, match=r"data/raw/bad\.dvc: must be a \.dvc file written by DVC"):
        tracked.imported()


def test_the_state_of_raw_data_is_that_of_its_dvc_files(project: Path) -> None:
    Path("data/raw/a.dvc").write_text("outs: []")
    first = tracked.state()
    Path("data/raw/a").write_text("not asked")
    assert tracked.state() == first
    Path("data/raw/a.dvc").write_text("outs: [b]")
    assert tracked.state() != first


def test_a_dropped_folder_is_raw_data_that_dvc_keeps_and_onediff_reads(project: Path) -> None:
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


def test_without_an_inbox_nothing_is_taken(project: Path) -> None:
    from flows.refresh_data import take_batches

    Path("runtime.yaml").write_text("inbox: null\n")
    assert take_batches.fn(settle_s=0).batches == []


@pytest.mark.slow
def test_the_flow_says_whether_anything_changed_and_why_no_retraining_starts(project: Path) -> None:
    def run(*settings: str) -> str:
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
