"""How a registered OneDiff captions pairs as an MLflow model: rows of `before`, `after`, and if wanted `instruction`.

MLflow finds `_load_pyfunc` by this module's name, which the version carries; this file does not import MLflow.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff.config import load_runtime
from onediff.inputs.images import open_image
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.model.digest import DIGEST_FILE, model_digests
from onediff.serve.in_use import Say, speaker
from onediff.serve.usage_log import usage_log

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("before", "after", "instruction")
_SHORTEST_BASE64 = 64  # no image is smaller; shorter text is a path


class PairCaptioner:
    def __init__(self, say: Say) -> None:
        self._say = say

    def predict(self, rows: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One caption per row of a DataFrame or list of dicts, in order.

        `before` and `after` are paths, base64 or data URIs. Raises ValueError naming the row that is wrong.
        """
        items = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
        read = [_pair(number, item) for number, item in enumerate(items)]
        asked = [_instruction(number, item) for number, item in enumerate(items)]
        files = [(before, after) for (before, _), (after, _) in read]
        return self._say(files, [(before, after) for (_, before), (_, after) in read], asked) if items else []


def _load_pyfunc(data_path: str) -> PairCaptioner:
    """Captions are noted if runtime.yaml in the server's folder, or ONEDIFF_USAGE_LOG, says where."""
    if any((folder / "reference.json").exists() for folder in Path(data_path).parents[:2]):
        raise ValueError(f"{data_path}: this version is registered by reference, MLflow has no weights of it: "
                         "'onediff export VERSION DIR' fetches them, and onediff.registry.model_folder")
    _check_digest(Path(data_path))
    log = usage_log(load_runtime(), data_path, Path(data_path))
    from onediff.model.captioner import Captioner

    return PairCaptioner(speaker(Captioner.load(Path(data_path)), log))


def _check_digest(folder: Path) -> None:
    """Raises ValueError if the version's folder names another digest of the model; early versions name none."""
    for parent in folder.parents[:2]:
        if (parent / DIGEST_FILE).exists():
            wanted, got = (parent / DIGEST_FILE).read_text(encoding="utf-8").strip(), model_digests(folder).folder
            if got != wanted:
                raise ValueError(f"{folder}: its files must have the registered digest {wanted[:12]}, got {got[:12]}: "
                                 "they were changed; register the model again")


def _pair(number: int, item: Any) -> tuple[tuple[bytes | Path, Image], tuple[bytes | Path, Image]]:
    """Of each side the file as given and the same opened."""
    if not isinstance(item, dict):
        raise ValueError(f"row {number}: must be a mapping with before and after, got {type(item).__name__}")
    unknown = sorted(str(key) for key in item if key not in COLUMNS)
    if unknown:
        raise ValueError(f"row {number}: unknown column '{unknown[0]}'; it has before, after, instruction")
    return _image(number, "before", item), _image(number, "after", item)


def _image(number: int, side: str, item: dict[str, Any]) -> tuple[bytes | Path, Image]:
    text = item.get(side)
    if not isinstance(text, str) or not text:
        raise ValueError(f"row {number}: {side}: must be a path or a base64 image, got {text!r}")
    try:
        file = _decoded(text)
        return file, open_image(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"row {number}: {side}: {error}") from None


def _decoded(text: str) -> bytes | Path:
    if text.startswith("data:"):
        header, _, text = text.partition(",")
        if not header.endswith(";base64"):
            raise ValueError(f"a data URI must hold base64, got '{header[:40]}'")
        return _bytes(text)
    if len(text) < _SHORTEST_BASE64:
        return Path(text)
    try:
        if Path(text).exists():
            return Path(text)
    except OSError:  # too long for a file name
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
    if text is None or text != text or text == "":  # a DataFrame writes a missing cell as NaN
        return DEFAULT_INSTRUCTION
    if not isinstance(text, str):
        raise ValueError(f"row {number}: instruction: must be text, got {text!r}")
    return text
