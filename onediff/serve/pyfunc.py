"""The MLflow model flavour: a registered OneDiff captions rows with the columns `before`, `after` and `instruction`.

A registered version contains the name of this module, and MLflow calls `_load_pyfunc` in it. The limits are those of
`onediff serve`, from the section `serve` of runtime.yaml. An image is base64 text or a data URI. A path is opened only
below the folder that the environment variable ONEDIFF_IMAGE_ROOT names; without the variable, no path is opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from onediff.config import Serve, load_runtime
from onediff.files import find_file
from onediff.inputs.prompt import DEFAULT_INSTRUCTION
from onediff.model.digest import checked_digests
from onediff.serve.http.captioning import wrong_instruction
from onediff.serve.http.errors import ApiError
from onediff.serve.http.pictures import image_bytes, open_picture
from onediff.serve.usage_log import CaptionFiles, Files, UsageLog, caption_and_log, usage_log

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException

    from onediff.model.captioner import Captioner, Pair

COLUMNS = ("before", "after", "instruction")
IMAGE_ROOT = "ONEDIFF_IMAGE_ROOT"
_SHORTEST_BASE64 = 64  # smallest number of characters of a base64 image; a shorter text is treated as a path
_MLFLOW_CODES = {429: "RESOURCE_EXHAUSTED", 500: "INTERNAL_ERROR", 504: "DEADLINE_EXCEEDED"}
_log = logging.getLogger("onediff.serve")


class PairCaptioner:
    """The object that MLflow calls: a trained model that captions the pairs of a table.

    MLflow's server calls `predict` in several threads. One request is captioned at a time, so that the memory is
    limited, and the others wait.
    """

    def __init__(self, caption: CaptionFiles, limits: Serve, image_root: Path | None = None) -> None:
        self._caption, self._limits = caption, limits
        self._image_root = image_root.resolve() if image_root else None
        self._turn, self._counting, self._num_pairs = Lock(), Lock(), 0

    def predict(self, rows: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return one caption for each row of a DataFrame or list of dicts, in the same order.

        Raises MlflowException, which MLflow's server answers without a stack trace, with the number of an invalid row.
        """
        items = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
        with _AnsweredByMLflow():
            self._check_size(items)
            files = [self._files(number, item) for number, item in enumerate(items)]
            instructions = [_instruction(number, item) for number, item in enumerate(items)]
            with self._one_at_a_time(len(items)):
                pairs = [(open_picture(before, self._limits, f"row {number}: before"),
                          open_picture(after, self._limits, f"row {number}: after"))
                         for number, (before, after) in enumerate(files)]
                return self._caption(list(files), pairs, instructions) if items else []

    def _check_size(self, items: list[Any]) -> None:
        """Raise ApiError if there are too many rows, or if their texts are too long."""
        if len(items) > self._limits.pairs:
            raise ApiError(413, f"a request may have at most {self._limits.pairs} rows, got {len(items)}; send several "
                                "requests", code="too_many_pairs")
        texts = [value for item in items if isinstance(item, dict) for value in item.values() if isinstance(value, str)]
        if sum(map(len, texts)) > self._limits.body_mb * 1e6:
            raise ApiError(413, f"the rows may have at most {self._limits.body_mb:g} MB; send smaller images or fewer "
                                "rows", code="body_too_large")

    @contextmanager
    def _one_at_a_time(self, num_pairs: int) -> Iterator[None]:
        """Wait until no other request is captioned. Raises ApiError if too many pairs wait, or after the time limit."""
        with self._counting:
            if self._num_pairs + num_pairs > self._limits.waiting_pairs:
                raise ApiError(429, "too many pairs are waiting; try again later", code="queue_full")
            self._num_pairs += num_pairs
        try:
            if not self._turn.acquire(timeout=self._limits.timeout_s):
                raise ApiError(504, f"the captions were not ready within {self._limits.timeout_s:g} s; try again later",
                               code="timeout")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            with self._counting:
                self._num_pairs -= num_pairs

    def _files(self, number: int, item: Any) -> tuple[bytes, bytes]:
        """Return the image files of a row. Raises ApiError with the number of the row."""
        if not isinstance(item, dict):
            raise _invalid(f"row {number}: must be a mapping with before and after, got {type(item).__name__}")
        unknown = sorted(str(key) for key in item if key not in COLUMNS)
        if unknown:
            raise _invalid(f"row {number}: unknown column '{unknown[0]}'; allowed are before, after, instruction")
        return self._file(item.get("before"), f"row {number}: before"), self._file(item.get("after"),
                                                                                  f"row {number}: after")

    def _file(self, text: Any, place: str) -> bytes:
        if not isinstance(text, str) or not text:
            raise _invalid(f"{place}: must be an image as base64 text or as a data URI, got {text!r}")
        if len(text) < _SHORTEST_BASE64 and not text.startswith("data:"):
            return self._read(text, place)
        try:
            return image_bytes(text, place)
        except ApiError:
            if self._image_root is None or text.startswith("data:"):
                raise
            return self._read(text, place)

    def _read(self, text: str, place: str) -> bytes:
        """Return the content of an image file below the image folder. The error names only what the client sent."""
        if self._image_root is None:
            raise _invalid(f"{place}: must be an image as base64 text or as a data URI: paths are refused, unless the "
                           f"variable {IMAGE_ROOT} of the server names the folder of the images")
        try:
            # `realpath` follows links, so a link that leaves the folder is refused, too.
            path = Path(os.path.realpath(self._image_root / text))
            if path.is_relative_to(self._image_root):  # Names are compared only in folders below this one.
                path = Path(os.path.realpath(find_file(path) or path))
            if path.is_relative_to(self._image_root) and path.is_file():
                if path.stat().st_size > self._limits.body_mb * 1e6:
                    raise ApiError(413, f"{place}: the file must have at most {self._limits.body_mb:g} MB",
                                   code="image_too_large")
                return path.read_bytes()
        except (OSError, ValueError):  # The text is too long for a path, or has a zero byte.
            pass
        raise _invalid(f"{place}: '{text[:80]}' is no readable file below the server's image folder")


def _load_pyfunc(data_path: str) -> PairCaptioner:
    """Load a registered model version from the folder `data_path`; MLflow calls this function.

    Captions are logged if `usage_log` is set in runtime.yaml or by ONEDIFF_USAGE_LOG. Raises ValueError if MLflow does
    not store the weights of the version, or if the files differ from the registered digest. Versions that early
    releases of OneDiff registered have no digest and are not checked.
    """
    folder = Path(data_path)
    if any((parent / "reference.json").exists() for parent in folder.parents[:2]):
        raise ValueError(f"{data_path}: this version is registered by reference, so MLflow does not store its weights: "
                         "'onediff export VERSION DIR' fetches them")
    checked_digests(folder)
    runtime = load_runtime()
    log = usage_log(runtime, data_path, folder)
    from onediff.model.captioner import Captioner

    return PairCaptioner(partial(_caption, Captioner.load(folder), log), runtime.serve, _image_root())


def _caption(captioner: Captioner, log: UsageLog | None, files: list[Files], pairs: list[Pair],
             instructions: list[str]) -> list[str]:
    """Caption pairs as `caption_and_log` does. Raises ApiError for an instruction that the model cannot take."""
    for number, instruction in enumerate(instructions):
        if problem := wrong_instruction(captioner, instruction, f"row {number}: instruction"):
            raise problem
    return caption_and_log(captioner, log, files, pairs, instructions)


def _image_root() -> Path | None:
    """Return the folder that ONEDIFF_IMAGE_ROOT names, or None. Raises ValueError if it is not a folder."""
    name = os.environ.get(IMAGE_ROOT)
    if name and not Path(name).is_dir():
        raise ValueError(f"{IMAGE_ROOT} must name a folder, got '{name}': create it, or unset the variable to refuse "
                         "all paths")
    return Path(name) if name else None


def _instruction(number: int, item: dict[str, Any]) -> str:
    text = item.get("instruction")
    if text is None or text != text or text == "":  # A DataFrame contains NaN for a missing cell.
        return DEFAULT_INSTRUCTION
    if not isinstance(text, str):
        raise _invalid(f"row {number}: instruction: must be text, got {text!r}")
    return text


def _invalid(message: str) -> ApiError:
    return ApiError(422, message, code="invalid_value")


class _AnsweredByMLflow:
    """Context manager that replaces any error by one that MLflow's server answers without stack trace and paths.

    MLflow answers an exception of any other class with the stack trace.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, ApiError):
            raise _mlflow_error(error.status, str(error)) from None
        if isinstance(error, Exception):
            _log.error("the captions of a request failed", exc_info=error)
            raise _mlflow_error(500, "the server has an internal error; its log explains it") from None


def _mlflow_error(status: int, message: str) -> MlflowException:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    return MlflowException(message, ErrorCode.Value(_MLFLOW_CODES.get(status, "INVALID_PARAMETER_VALUE")))
