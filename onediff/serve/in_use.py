"""What a caption made in use goes through: plainly, or noted in the usage log together with its confidence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onediff.serve.usage_log import UsageLog, Use

if TYPE_CHECKING:
    from PIL.Image import Image

    from onediff.model.captioner import Captioner

Files = tuple[bytes | Path, bytes | Path]  # of a pair, as given
Say = Callable[[list[Files], list[tuple["Image", "Image"]], list[str]], list[str]]  # files, the same opened, questions


def speaker(captioner: Captioner, log: UsageLog | None) -> Say:
    """Captions pairs, one instruction each, in order; with a log each is noted there. The captions are the same."""
    if log is None:
        return lambda files, pairs, instructions: captioner.caption(pairs, instructions=instructions)

    def say(files: list[Files], pairs: list[tuple[Image, Image]], instructions: list[str]) -> list[str]:
        from onediff.serve.confidence import caption_with_confidence

        said = caption_with_confidence(captioner, pairs, instructions=instructions)
        log.add([Use(given, pair, asked, text, confidence) for given, pair, asked, (text, confidence)
                 in zip(files, pairs, instructions, said, strict=True)])
        return [text for text, _ in said]

    return say
