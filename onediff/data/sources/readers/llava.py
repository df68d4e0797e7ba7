"""Reads the training data of LLaVA-1.5, and conversations about two images in this format. Liu et al., CVPR 2024.

The files are blip_laion_cc_sbu_558k.json (single images with a caption, for training phase `align`) and
llava_v1_5_mix665k.json (conversations, for phase `tune`). Both have the form
[{"id", "image": "00453/004539375.jpg", "conversations": [human, gpt, ...]}, ...]; rows without "image" are text only.
Rows about two images have a list, "image": ["before.png", "after.png"], and two `<image>` in the texts of the human.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from onediff.data.record import GENERAL
from onediff.data.sources.entries import identity, one_line, part
from onediff.data.sources.published import NO_TYPE, Files, PublishedPair
from onediff.inputs.prompt import IMAGE
from onediff.text_files import expect, read_list

CAPTIONS, CONVERSATIONS = "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"
_SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
Turns = list[tuple[str, str]]


def read_558k(files: Files) -> Iterator[PublishedPair]:
    """Yield each single image of blip_laion_cc_sbu_558k.json, with its caption as the only reference.

    Raises ValueError if this file is broken, and FileNotFoundError if it does not exist.
    """
    for pair, _ in _read(files, CAPTIONS):
        yield replace(pair, provenance={"captions": pair.references} if pair.references and pair.names else {})


def read_665k(files: Files) -> Iterator[PublishedPair]:
    """Yield each conversation of llava_v1_5_mix665k.json, or of the only JSON file; the first answer is the reference.

    The key "conversation" of provenance holds all turns. Raises ValueError if this file is broken, and
    FileNotFoundError if it does not exist.
    """
    for pair, turns in _read(files, CONVERSATIONS):
        yield replace(pair, group="-".join(pair.names) or pair.group,
                      provenance={"conversation": [list(turn) for turn in turns]})


def _read(files: Files, annotations: str) -> Iterator[tuple[PublishedPair, Turns]]:
    """Yield (pair, all turns of the conversation) for each row of the annotation file.

    Raises ValueError if the file is broken or a row is not a conversation, and FileNotFoundError if the file does not
    exist.
    """
    path = files.named(annotations) or only_json(files.ending(".json")) or files.require(annotations)
    # Count how often each id has occurred, because ids repeat. The keys are hashes of the ids, to save memory.
    seen: dict[int, int] = {}
    for place, entry in read_list(path):
        name = identity(entry, "id", place)
        times = seen[hash(name)] = seen.get(hash(name), 0) + 1
        name = name if times == 1 else f"{name}-{times}"
        turns = _turns(entry, place)
        images = _images(entry, place)
        question, answer = map(one_line, turns[0]) if turns else ("", "")
        # What changed between two images is unknown, because the conversation may be about anything.
        yield PublishedPair(name, "train", images, [answer] if answer else [], name,
                            NO_TYPE if len(images) == 2 else GENERAL, question, num_empty=int(not answer)), turns


def only_json(paths: Iterable[Path]) -> Path | None:
    """Return the JSON file if there is exactly one, besides files with metadata of images, and otherwise None."""
    files = [path for path in paths if path.suffix.lower() == ".json" and not path.stem.endswith("_meta")]
    return files[0] if len(files) == 1 else None


def _images(entry: dict[str, Any], place: str) -> tuple[str, ...]:
    """Return the names of the images of an entry whose conversation is valid.

    Raises ValueError if there are more than two images, or two images without two placeholders in the questions.
    """
    value = entry.get("image") or []
    names = [value] if isinstance(value, str) else expect(value, list, f"{place}, image")
    if len(names) > 2:
        raise ValueError(f"{place}: a conversation must have at most two images, got {len(names)}; remove the row, or "
                         "split it into pairs of images")
    num_marks = sum(turn["value"].count(IMAGE) for turn in entry["conversations"] if not _SPEAKERS[turn["from"]])
    if len(names) == 2 and num_marks != 2:
        raise ValueError(f"{place}: a conversation about two images must have two {IMAGE}, got {num_marks}; write both "
                         "into the first question")
    return tuple(expect(name, str, f"{place}, image") for name in names)


def _turns(entry: dict[str, Any], place: str) -> Turns:
    """Return the conversation of an entry as a list of (question, answer).

    Consecutive texts of one speaker are joined. An answer before the first question is removed.
    """
    texts: list[tuple[int, str]] = []
    for turn in part(entry, "conversations", list, place):
        name = part(expect(turn, dict, place), "from", str, place)
        if name not in _SPEAKERS:
            raise ValueError(f"{place}: a turn must be from human or gpt, got '{name[:40]}'; "
                             "download the published file again")
        speaker, text = _SPEAKERS[name], part(turn, "value", str, place).replace(IMAGE, "").strip()
        if texts and texts[-1][0] == speaker:
            text = f"{texts.pop()[1]}\n{text}".strip()
        texts.append((speaker, text))
    texts = texts[1:] if texts and texts[0][0] == 1 else texts
    return [(question[1], answer[1]) for question, answer in zip(texts[::2], texts[1::2], strict=False)]
