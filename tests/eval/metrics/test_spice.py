from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onediff.eval.metrics import spice
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.spice import DOWNLOADS, Download, fetch, folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onediff" / "spice"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server with three files: a zip of two jars, a truncated copy of this zip, and a jar."""
    complete = io.BytesIO()
    with zipfile.ZipFile(complete, "w") as archive:
        for name in ("one.jar", "two.jar"):
            archive.writestr(f"corenlp/{name}", name)
    (tmp_path / "served").mkdir()
    for name, content in (("whole.zip", complete.getvalue()), ("cut.zip", complete.getvalue()[:-40]),
                          ("three.jar", b"3")):
        (tmp_path / "served" / name).write_bytes(content)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_missing_jars_are_downloaded_once_after_a_message(
        server: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloads = [Download(f"{server}/whole.zip", 384, ("one.jar", "two.jar")),
                 Download(f"{server}/three.jar", 2, ("three.jar",))]
    fetch(downloads=downloads)
    assert f"SPICE: downloading 386 MB to {cache}: {server}/whole.zip, {server}/three.jar\n" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in cache.iterdir()} == {"one.jar": "one.jar", "two.jar": "two.jar",
                                                                         "three.jar": "3"}
    fetch(downloads=downloads)
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "jar", "why"), [("cut.zip", "one.jar", "zip file"), ("none.zip", "a.jar", "404"),
                                                  ("whole.zip", "other.jar", "other.jar")])
def test_a_failed_download_is_an_error_with_address_file_and_cure_and_leaves_no_file(
        server: str, cache: Path, name: str, jar: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"SPICE needs {jar}, and {server}/{name} could not be downloaded "
                                                   f"to {cache}") + f".*{why}.*score without SPICE"):
        fetch(downloads=[Download(f"{server}/{name}", 1, (jar,))])
    assert list(cache.iterdir()) == []


def test_without_network_spice_is_refused_before_scoring_starts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # No program answers at this address.
    with pytest.raises(ValueError, match=r"SPICE needs stanford-corenlp.*nlp\.stanford\.edu.*score without SPICE"):
        score({"a": "x"}, {"a": ["x"]}, metrics=["SPICE"])


def test_the_error_for_incomplete_spice_jars_contains_the_missing_class(cache: Path) -> None:
    cache.mkdir(parents=True)
    for jar in (jar for download in DOWNLOADS for jar in download.jars):
        with zipfile.ZipFile(cache / jar, "w"):
            pass
    with pytest.raises(ValueError, match=rf"SPICE: Java ended with code 1.*edu/stanford/nlp.*delete {cache}"):
        score({"a": "x"}, {"a": ["x"]}, metrics=["SPICE"])


def test_spice_results_are_read_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    rows = [{"image_id": place, "scores": {"All": {"pr": 1.0, "re": 1.0, "f": place / 4}}} for place in (2, 0, 1)]
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    assert spice._read(tmp_path / "scores.json", 3).tolist() == [0, 0.25, 0.5]
    with pytest.raises(ValueError, match="must score 4 pairs, got scores of 3"):
        spice._read(tmp_path / "scores.json", 4)


def test_the_spice_folder_is_in_the_cache_of_the_user(cache: Path) -> None:
    assert folder() == cache
