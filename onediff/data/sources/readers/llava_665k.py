"""LLaVA-665K: conversations about one image or none, for the second phase. Liu et al., CVPR 2024 (LLaVA-1.5).

llava_v1_5_mix665k.json: [{"id", "image": "coco/train2017/000000033471.jpg", "conversations": [human, gpt, ...]}, ...];
rows without "image" are text only.
"""

from __future__ import annotations

from collections.abc import Iterator

from onediff.data.sources.file_index import Files
from onediff.data.sources.published import GENERAL, PublishedPair
from onediff.data.sources.readers.conversations import read_rows

ANNOTATIONS = "llava_v1_5_mix665k.json"


def read(files: Files) -> Iterator[PublishedPair]:
    """The first answer is the reference; provenance has all turns. Raises ValueError, FileNotFoundError."""
    for row in read_rows(files, ANNOTATIONS):
        answer = " ".join(row.turns[0][1].split()) if row.turns else ""
        group = "-".join(row.images) or row.name
        yield PublishedPair(row.name, "train", row.images, [answer] if answer else [], group, GENERAL,
                            instruction=row.instruction, num_empty=int(not answer),
                            provenance={"conversation": [list(turn) for turn in row.turns]})
