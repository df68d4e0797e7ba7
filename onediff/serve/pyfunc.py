"""The MLflow model flavour: a registered OneDiff captions rows with the columns `before`, `after` and `instruction`.

A registered version contains the name of this module, and MLflow calls `_load_pyfunc` in it. The module itself does not
import MLflow.
"""

from __future__ import annotations

import base64
import binascii
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff.config import load_runtime
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.model.digest import DIGEST_FILE, model_digests
from onediff.serve.usage_log import CaptionFiles, caption_and_log, usage_log

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("before", "after", "instruction")
_SHORTEST_BASE64 = 64  # smallest number of characters of a base64 image; a shorter text is treated as a path


class PairCaptioner:
    """The object that MLflow calls: a trained model that captions the pairs of a table."""

    def __init__(self, caption: CaptionFiles) -> None:
        self._caption = caption

    def predict(self, rows: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return one caption for each row of a DataFrame or list of dicts, in the same order.

        `before` and `after` are paths, base64 text or data URIs. Raises ValueError with the number of an invalid row.
        """
        items = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
        sides = [_pair(number, item) for number, item in enumerate(items)]
        instructions = [_instruction(number, item) for number, item in enumerate(items)]
        files = [(before, after) for (before, _), (after, _) in sides]
        pairs = [(before, after) for (_, before), (_, after) in sides]
        return self._caption(files, pairs, instructions) if items else []


def _load_pyfunc(data_path: str) -> PairCaptioner:
    """Load a registered model version from the folder `data_path`; MLflow calls this function.

    Captions are logged if `usage_log` is set in runtime.yaml or by ONEDIFF_USAGE_LOG. Raises ValueError if MLflow does
    not store the weights of the version, or if the files differ from the registered digest. Versions that early
    releases of OneDiff registered have no digest and are not checked.
    """
    folder = Path(data_path)
    for parent in folder.parents[:2]:
        if (parent / "reference.json").exists():
            raise ValueError(f"{data_path}: this version is registered by reference, so MLflow does not store its "
                             "weights: 'onediff export VERSION DIR' fetches them")
        if (parent / DIGEST_FILE).exists():
            registered, got = (parent / DIGEST_FILE).read_text(encoding="utf-8").strip(), model_digests(folder).folder
            if got != registered:
                raise ValueError(f"{folder}: the files must have the registered digest {registered[:12]}, got "
                                 f"{got[:12]}; they were changed after registration: register the model again")
    log = usage_log(load_runtime(), data_path, folder)
    from onediff.model.captioner import Captioner

    return PairCaptioner(partial(caption_and_log, Captioner.load(folder), log))


def _pair(number: int, item: Any) -> tuple[tuple[bytes | Path, Image], ...]:
    """Return the file and the opened image of `before` and of `after`. Raises ValueError with the number of the row."""
    if not isinstance(item, dict):
        raise ValueError(f"row {number}: must be a mapping with before and after, got {type(item).__name__}")
    unknown = sorted(str(key) for key in item if key not in COLUMNS)
    if unknown:
        raise ValueError(f"row {number}: unknown column '{unknown[0]}'; allowed are before, after, instruction")
    sides = []
    for side in ("before", "after"):
        text = item.get(side)
        if not isinstance(text, str) or not text:
            raise ValueError(f"row {number}: {side}: must be a path or a base64 image, got {text!r}")
        try:
            file = _decoded(text)
            sides.append((file, open_image(file)))
        except (OSError, ValueError) as error:
            raise ValueError(f"row {number}: {side}: {error}") from None
    return tuple(sides)


def _decoded(text: str) -> bytes | Path:
    """Return the bytes of base64 text or of a data URI, or the path if the text is neither."""
    if text.startswith("data:"):
        header, _, text = text.partition(",")
        if not header.endswith(";base64"):
            raise ValueError(f"a data URI must contain base64 text, got '{header[:40]}'")
        return _bytes(text)
    try:
        if len(text) < _SHORTEST_BASE64 or Path(text).exists():
            return Path(text)
    except OSError:  # Python raises OSError for a text that is too long to be a path.
        return _bytes(text)
    try:
        return _bytes(text)
    except ValueError:
        return Path(text)


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"neither a file nor base64 ({error})") from None


def _instruction(number: int, item: dict[str, Any]) -> str:
    text = item.get("instruction")
    if text is None or text != text or text == "":  # A DataFrame contains NaN for a missing cell.
        return DEFAULT_INSTRUCTION
    if not isinstance(text, str):
        raise ValueError(f"row {number}: instruction: must be text, got {text!r}")
    return text
