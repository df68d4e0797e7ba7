"""What was captioned in use, noted on this machine if runtime.yaml says where: the rows that the drift check reads.

A file for each day (UTC), a line for each caption, with what the probe measures of a pair under the probe's names.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff.config import Runtime
from onediff.model.digest import weights_digest

if TYPE_CHECKING:
    from PIL import Image

SIDES = ("before", "after")
PROBED = ("width_before", "height_before", "width_after", "height_after", "mode", "hash_before", "hash_after",
          "distance")  # of the probe's columns


@dataclass(frozen=True)
class Use:
    """One pair that was captioned: the image files as given (paths, or their bytes), the same opened, what was asked
    and said, and how sure the model was, 0 to 1.
    """

    files: tuple[bytes | Path, bytes | Path]
    images: tuple[Image.Image, Image.Image]
    instruction: str
    caption: str
    confidence: float


@dataclass
class UsageLog:
    """Appends to <folder>/<day>.jsonl; with `keep_images` the files go into <folder>/images under their SHA-256."""

    folder: Path
    model: str
    weights: str
    keep_images: bool
    _told: bool = field(default=False, init=False)

    def add(self, uses: Sequence[Use]) -> None:
        """Notes them in one write, or, where the disk is full or the folder cannot be written, says so once on stderr:
        a caption never fails because it could not be noted.
        """
        now = datetime.now(UTC)
        try:
            _make(self.folder)
            append(self.folder / f"{now:%Y-%m-%d}.jsonl", [self._row(use, now) for use in uses])
        except OSError as error:
            if not self._told:
                print(f"onediff: usage_log {self.folder}: captions are not noted ({error.strerror or error}); "
                      "make room or name another folder in runtime.yaml", file=sys.stderr)
            self._told = True

    def _row(self, use: Use, now: datetime) -> dict[str, Any]:
        before, after = (file if isinstance(file, bytes) else file.read_bytes() for file in use.files)
        row = {"time": now.isoformat(timespec="milliseconds"), "model": self.model, "weights": self.weights,
               "caption": use.caption, "confidence": round(use.confidence, 5), "instruction": use.instruction}
        row |= pair_facts((before, after), use.images)
        if self.keep_images:
            row |= {f"file_{side}": self._keep(content) for side, content in zip(SIDES, (before, after), strict=True)}
        return row

    def _keep(self, content: bytes) -> str:
        """The image's path below the folder; it takes its name when it is whole."""
        name = f"images/{sha256(content).hexdigest()}"
        path = self.folder / name
        if not path.exists():
            _make(path.parent)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_bytes(content)
            part.replace(path)
        return name


def usage_log(runtime: Runtime, model: str, folder: Path) -> UsageLog | None:
    """The log of a model (its address, and the folder of its weights); None unless runtime.yaml wants one."""
    if runtime.usage_log is None:
        return None
    return UsageLog(Path(runtime.usage_log), model, weights_digest(folder), runtime.usage_images)


def pair_facts(files: tuple[bytes, bytes], images: tuple[Image.Image, Image.Image]) -> dict[str, Any]:
    """What the probe measures of the pair, and `brightness` and `contrast` (mean and deviation, grey levels)."""
    from PIL import ImageStat

    from onediff.data.quality.probe import probe_record
    from onediff.data.record import Record

    pair = Record("", "", "", "", *files, references=[], instruction="", change_type="", provenance={})
    row = probe_record(pair, max_megapixels=math.inf)  # they were opened already
    grey = [ImageStat.Stat(image.convert("L")) for image in images]
    return {name: row[name] for name in PROBED} | {
        "phash_bits": (row["phash_before"] ^ row["phash_after"]).bit_count(),
        "brightness": round(sum(stat.mean[0] for stat in grey) / 2, 3),
        "contrast": round(sum(stat.stddev[0] for stat in grey) / 2, 3)}


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines in one write at the end of the file: two writers never mix their lines. Raises OSError.

    A line that a full disk once cut off is ended first, so that it spoils no other.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    place = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(place).st_size
        if size and os.pread(place, 1, size - 1) != b"\n":
            text = b"\n" + text
        if os.write(place, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(place)


def read_usage(folder: Path, since: datetime) -> tuple[list[dict[str, Any]], int]:
    """The rows noted since then, oldest first, and how many lines cannot be read (cut off by a full disk or a kill).

    Raises FileNotFoundError if there is no log.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found: set usage_log in runtime.yaml, and captions are noted there")
    rows, broken = [], 0
    for path in sorted(folder.glob("????-??-??.jsonl")):
        if path.stem < f"{since:%Y-%m-%d}":
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line.strip():
                continue
            row = _parsed(line)
            if row is None:
                broken += 1
            elif row["time"] >= since.astimezone(UTC).isoformat(timespec="milliseconds"):
                rows.append(row)
    return rows, broken


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and {"time", "caption", "confidence", *PROBED} <= set(row) else None


def _make(folder: Path) -> None:
    """For this user's eyes."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
