"""The usage log records every caption that users request, for the drift check. runtime.yaml sets its folder.

The folder has one file per day (UTC) with one line per caption. A line contains the measurements of the pair that the
stage `probe` makes for training pairs, under the same names.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff.config import Runtime
from onediff.model.digest import weights_digest

if TYPE_CHECKING:
    from onediff.model.captioner import Captioner, Pair

Files = tuple[bytes | Path, bytes | Path]  # the two image files of a pair: paths, or the bytes of the files
CaptionFiles = Callable[[list[Files], "list[Pair]", list[str]], list[str]]  # files, opened images, instructions

PRIVATE = 0o700  # the mode of a folder that only this user can read
SIDES = ("before", "after")
PROBED = ("width_before", "height_before", "width_after", "height_after", "mode", "hash_before", "hash_after",
          "distance")  # columns that the usage log has in common with the table of the stage `probe`


@dataclass(frozen=True)
class Use:
    """One captioned pair: image files, opened images, instruction, caption, and confidence from 0 to 1."""

    files: Files
    images: Pair
    instruction: str
    caption: str
    confidence: float


@dataclass
class UsageLog:
    """A log of captions in the files FOLDER/DAY.jsonl. If `keep_images` is true, FOLDER/images stores the images too.

    The name of a stored image is the SHA-256 of the file.
    """

    folder: Path
    model: str
    weights: str
    keep_images: bool
    _num_lost: int = field(default=0, init=False)  # captions that were not logged since the last message

    def add(self, uses: Sequence[Use]) -> None:
        """Write one line for each use.

        If the disk is full or the folder cannot be written, print one message on stderr and continue, because a caption
        must not fail when it cannot be logged. Print another message when captions are logged again.
        """
        now = datetime.now(UTC)
        try:
            self.folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            append(self.folder / f"{now:%Y-%m-%d}.jsonl", [self._row(use, now) for use in uses])
        except OSError as error:
            if not self._num_lost:
                print(f"onediff: usage_log {self.folder}: captions are not logged ({error.strerror or error}); "
                      "free some disk space, or set another folder in runtime.yaml", file=sys.stderr)
            self._num_lost += len(uses)
        else:
            if self._num_lost:
                print(f"onediff: usage_log {self.folder}: captions are logged again; {self._num_lost} are missing",
                      file=sys.stderr)
            self._num_lost = 0

    def _row(self, use: Use, now: datetime) -> dict[str, Any]:
        before, after = (file if isinstance(file, bytes) else file.read_bytes() for file in use.files)
        row = {"time": now.isoformat(timespec="milliseconds"), "model": self.model, "weights": self.weights,
               "caption": use.caption, "confidence": round(use.confidence, 5), "instruction": use.instruction}
        row |= pair_facts((before, after), use.images)
        if self.keep_images:
            row |= {f"file_{side}": self._store(content) for side, content in zip(SIDES, (before, after), strict=True)}
        return row

    def _store(self, content: bytes) -> str:
        """Store an image file, and return its path relative to the log's folder.

        The temporary file has the process id in its name, because several servers may write to the folder.
        """
        path = self.folder / "images" / sha256(content).hexdigest()
        if not path.exists():
            path.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                part.write_bytes(content)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)  # A full disk leaves a part of the file.
        return f"images/{path.name}"


def usage_log(runtime: Runtime, model: str, folder: Path) -> UsageLog | None:
    """Return the usage log of a model, or None if runtime.yaml sets no usage_log.

    `model` is the path or MLflow address that each line records; `folder` contains the weights of the model.
    """
    return None if runtime.usage_log is None else UsageLog(
        Path(runtime.usage_log), model, weights_digest(folder), runtime.usage_images)


def caption_and_log(captioner: Captioner, log: UsageLog | None, files: list[Files], pairs: list[Pair],
                    instructions: list[str]) -> list[str]:
    """Return the captions of the pairs, in order, and write them to the usage log if there is one.

    `pairs` are the opened images of `files`, with one instruction for each pair. Logging does not change the captions.
    """
    if log is None:
        return captioner.caption(pairs, instructions=instructions)
    captions = captioner.caption_with_confidence(pairs, instructions=instructions)
    log.add([Use(file, pair, instruction, *caption) for file, pair, instruction, caption
             in zip(files, pairs, instructions, captions, strict=True)])
    return [text for text, _ in captions]


def pair_facts(files: tuple[bytes, bytes], images: Pair) -> dict[str, Any]:
    """Return what the stage `probe` measures for a pair, and the mean and standard deviation of its grey levels."""
    from PIL import ImageStat

    from onediff.data.quality.probe import probe_record
    from onediff.data.record import Record

    pair = Record("", "", "", "", *files, references=[], instruction="", change_type="", provenance={})
    # There is no limit for the size of the images, because they have been opened already.
    row = probe_record(pair, max_megapixels=math.inf)
    grey = [ImageStat.Stat(image.convert("L")) for image in images]
    return {name: row[name] for name in PROBED} | {
        "phash_bits": (row["phash_before"] ^ row["phash_after"]).bit_count(),
        "brightness": round(sum(stat.mean[0] for stat in grey) / 2, 3),
        "contrast": round(sum(stat.stddev[0] for stat in grey) / 2, 3)}


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines to the file in one write, so that two writers never mix their lines.

    If a full disk has cut off the last line of the file, a line end is written first, so that only that line is lost.
    Raises OSError if the lines cannot be written completely.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with path.open("ab+", buffering=0) as file:  # An unbuffered file writes everything in one system call.
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            text = b"\n" + text
        if file.write(text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_usage(folder: Path, since: datetime) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of the log written after the time `since`, oldest first, and the number of unreadable lines.

    A full disk or a killed process can leave an unreadable line. Raises FileNotFoundError if there is no log.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; set usage_log in runtime.yaml to log captions there")
    lines = [line for path in sorted(folder.glob("????-??-??.jsonl")) if path.stem >= f"{since:%Y-%m-%d}"
             for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    rows = [row for row in map(_parsed, lines) if row]
    first = since.astimezone(UTC).isoformat(timespec="milliseconds")
    return [row for row in rows if row["time"] >= first], len(lines) - len(rows)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and {"time", "caption", "confidence", *PROBED} <= set(row) else None
