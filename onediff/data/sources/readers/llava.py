"""Reads the training data of LLaVA-1.5: conversations about one image, or without image. Liu et al., CVPR 2024.

The files are blip_laion_cc_sbu_558k.json (single images with a caption, for training phase `align`) and
llava_v1_5_mix665k.json (conversations, for phase `tune`). Both have the form
[{"id", "image": "00453/004539375.jpg", "conversations": [human, gpt, ...]}, ...]; rows without "image" are text only.
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
    """Yield the single images of the 558k file; the caption is the only reference.

    Raises ValueError if the file is broken and FileNotFoundError if it does not exist.
    """
    for pair, _ in _read(files, CAPTIONS):
        yield replace(pair, provenance={"captions": pair.references} if pair.references and pair.names else {})


def read_665k(files: Files) -> Iterator[PublishedPair]:
    """Yield the conversations of the 665k file; the first answer is the reference, provenance holds all turns.

    Raises ValueError if the file is broken and FileNotFoundError if it does not exist.
    """
    for pair, turns in _read(files, CONVERSATIONS):
        yield replace(pair, group="-".join(pair.names) or pair.group,
                      provenance={"conversation": [list(turn) for turn in turns]})


def _read(files: Files, annotations: str) -> Iterator[tuple[PublishedPair, Turns]]:
    """Yield each row of the annotation file as a pair, together with all turns of the conversation.

    Raises ValueError if the file is broken or a row is not a conversation, and FileNotFoundError if no file exists.
    """
    others = [path for path in files.ending(".json") if not path.stem.endswith("_meta")]
    path = files.named(annotations) or (others[0] if len(others) == 1 else files.require(annotations))
    # Maps the hash of each id to the number of rows with this id, because ids repeat.
    seen: dict[int, int] = {}
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
    """Return the conversation as a list of (question, answer).

    Consecutive turns of one speaker are joined. An answer at the start, which has no question, is removed.
    """
    texts: list[tuple[int, str]] = []
    for turn in part(entry, "conversations", list, place):
        name = part(expect(turn, dict, place), "from", str, place)
        if name not in _SPEAKERS:
            raise ValueError(f"{place}: a turn must be from human or gpt, got '{name[:40]}'; "
                             "take the file as published")
        speaker, text = _SPEAKERS[name], part(turn, "value", str, place).replace(IMAGE, "").strip()
        if texts and texts[-1][0] == speaker:
            text = f"{texts.pop()[1]}\n{text}".strip()
        texts.append((speaker, text))
    texts = texts[1:] if texts and texts[0][0] == 1 else texts
    return [(question[1], answer[1]) for question, answer in zip(texts[::2], texts[1::2], strict=False)]
