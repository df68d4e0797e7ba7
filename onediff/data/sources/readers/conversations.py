"""LLaVA's rows: an image or none, and questions with answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onediff.data.sources.entries import expect, identity, part, read_list
from onediff.data.sources.file_index import Files
from onediff.inputs.prompt import IMAGE

_SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


@dataclass(frozen=True)
class Row:
    name: str  # its id, with a number where others have the same
    images: tuple[str, ...]
    turns: list[tuple[str, str]]

    @property
    def instruction(self) -> str:
        return " ".join(self.turns[0][0].split()) if self.turns else ""


def read_rows(files: Files, annotations: str) -> Iterator[Row]:
    """Raises ValueError for a broken file or a row that is no conversation, FileNotFoundError if there is no file."""
    seen: dict[int, int] = {}  # by hash: ids repeat, and there are many
    for place, entry in read_list(_annotations(files, annotations)):
        name = identity(entry, "id", place)
        times = seen[hash(name)] = seen.get(hash(name), 0) + 1
        images = (part(entry, "image", str, place),) if entry.get("image") else ()
        yield Row(name if times == 1 else f"{name}-{times}", images, _turns(entry, place))


def _annotations(files: Files, name: str) -> Path:
    found = files.named(name)
    others = [path for path in files.ending(".json") if not path.stem.endswith("_meta")]
    return found if found else others[0] if len(others) == 1 else files.require(name)


def _turns(entry: dict[str, Any], place: str) -> list[tuple[str, str]]:
    """Question and answer in turn; what one speaker says twice is joined, an answer to nothing is left out."""
    said: list[tuple[int, str]] = []
    for turn in part(entry, "conversations", list, place):
        speaker = part(expect(turn, dict, place), "from", str, place)
        if speaker not in _SPEAKERS:
            raise ValueError(f"{place}: a turn is from human or gpt, got '{speaker[:40]}'; take the file as published")
        text = part(turn, "value", str, place).replace(IMAGE, "").strip()
        if said and said[-1][0] == _SPEAKERS[speaker]:
            said[-1] = (said[-1][0], f"{said[-1][1]}\n{text}".strip())
        else:
            said.append((_SPEAKERS[speaker], text))
    said = said[1:] if said and said[0][0] == 1 else said
    return [(asked[1], answered[1]) for asked, answered in zip(said[::2], said[1::2], strict=False)]
