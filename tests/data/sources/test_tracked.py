from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from published_sets import put

from onediff.data.sources.catalog import CATALOG
from onediff.data.sources.tracked import fetch


class QuietHandler(SimpleHTTPRequestHandler):
    """An HTTP handler that serves the files of a folder and writes no log."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    put(tmp_path / "web/a.json", [1])
    put(tmp_path / "web/b.zip", "packed")
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    return folder


def test_files_are_downloaded_by_dvc_and_existing_files_are_kept(
        project: Path, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    addresses = {"a.json": f"{address}/a.json", "deep/b.zip": f"{address}/b.zip"}
    monkeypatch.setitem(CATALOG, "llava_665k", replace(CATALOG["llava_665k"], addresses=addresses))
    put(project / "data/raw/llava_665k/a.json", "my own")
    fetch("llava_665k")
    assert (project / "data/raw/llava_665k/a.json").read_text() == "my own"
    assert (project / "data/raw/llava_665k/deep/b.zip").read_text() == "packed"
    assert address in (project / "data/raw/llava_665k/deep/b.zip.dvc").read_text()
    stdout = capfd.readouterr().out
    assert "data/raw/llava_665k/a.json already exists" in stdout
    assert "now put by hand into data/raw/llava_665k: OCR-VQA's images" in stdout


def test_the_error_for_a_dataset_that_cannot_be_downloaded_contains_the_next_step(
        project: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"clevr_change cannot be downloaded automatically: put into data/raw"):
        fetch("clevr_change")
    with pytest.raises(ValueError, match="source 'mine' is not a published set; the published sets are spot_the_diff"):
        fetch("mine")
    monkeypatch.setitem(CATALOG, "llava_558k", replace(CATALOG["llava_558k"], addresses={"x": f"{address}/x.json"}))
    with pytest.raises(ValueError, match=r"data/raw/llava_558k/x: dvc could not download http://127.*/x\.json"):
        fetch("llava_558k")
    assert not (project / "data/raw/llava_558k/x").exists()
