"""LLaVA's conversations about one image or none. Liu et al., CVPR 2024 (LLaVA-1.5).

blip_laion_cc_sbu_558k.json (single images with a caption, for the first training phase) and llava_v1_5_mix665k.json
(for the second): [{"id", "image": "00453/004539375.jpg", "conversations": [human, gpt, ...]}, ...]. Rows without
"image" are text only.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from onediff.data.sources.entries import expect, identity, one_line, part, read_list
from onediff.data.sources.published import GENERAL, Files, PublishedPair
from onediff.inputs.prompt import IMAGE

CAPTIONS, CONVERSATIONS = "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"
_SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
Turns = list[tuple[str, str]]


def read_558k(files: Files) -> Iterator[PublishedPair]:
    """The caption is the only reference. Raises ValueError, FileNotFoundError."""
    for pair, _ in _read(files, CAPTIONS):
        yield replace(pair, provenance={"captions": pair.references} if pair.references and pair.names else {})


def read_665k(files: Files) -> Iterator[PublishedPair]:
    """The first answer is the reference; provenance has all turns. Raises ValueError, FileNotFoundError."""
    for pair, turns in _read(files, CONVERSATIONS):
        yield replace(pair, group="-".join(pair.names) or pair.group,
                      provenance={"conversation": [list(turn) for turn in turns]})


def _read(files: Files, annotations: str) -> Iterator[tuple[PublishedPair, Turns]]:
    """Raises ValueError for a broken file or a row that is no conversation, FileNotFoundError if there is no file."""
    others = [path for path in files.ending(".json") if not path.stem.endswith("_meta")]
    path = files.named(annotations) or (others[0] if len(others) == 1 else files.require(annotations))
    seen: dict[int, int] = {}  # by hash: ids repeat, and there are many
    for place, entry in read_list(path):
        name = identity(entry, "id", place)
        times = seen[hash(name)] = seen.get(hash(name), 0) + 1
        name = name if times == 1 else f"{name}-{times}"
        images = (part(entry, "image", str, place),) if entry.get("image") else ()
        turns = _turns(entry, place)
        question, answer = map(one_line, turns[0]) if turns else ("", "")
        yield PublishedPair(name, "train", images, [answer] if answer else [], name, GENERAL, question,
                            num_empty=int(not answer)), turns


def _turns(entry: dict[str, Any], place: str) -> Turns:
    """Question and answer in turn; consecutive turns of one speaker are joined, an answer to nothing is left out."""
    texts: list[tuple[int, str]] = []
    for turn in part(entry, "conversations", list, place):
        name = part(expect(turn, dict, place), "from", str, place)
        if name not in _SPEAKERS:
            raise ValueError(f"{place}: a turn is from human or gpt, got '{name[:40]}'; take the file as published")
        speaker, text = _SPEAKERS[name], part(turn, "value", str, place).replace(IMAGE, "").strip()
        if texts and texts[-1][0] == speaker:
            text = f"{texts.pop()[1]}\n{text}".strip()
        texts.append((speaker, text))
    texts = texts[1:] if texts and texts[0][0] == 1 else texts
    return [(question[1], answer[1]) for question, answer in zip(texts[::2], texts[1::2], strict=False)]
