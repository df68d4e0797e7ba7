"""LLaVA-558K: single images with a caption, for the first training phase. Liu et al., CVPR 2024 (LLaVA-1.5).

blip_laion_cc_sbu_558k.json: [{"id", "image": "00453/004539375.jpg", "conversations": [human, gpt]}, ...].
"""

from __future__ import annotations

from collections.abc import Iterator

from onediff.data.sources.file_index import Files
from onediff.data.sources.published import GENERAL, PublishedPair
from onediff.data.sources.readers.conversations import read_rows

ANNOTATIONS = "blip_laion_cc_sbu_558k.json"


def read(files: Files) -> Iterator[PublishedPair]:
    """The caption is the only reference. Raises ValueError, FileNotFoundError."""
    for row in read_rows(files, ANNOTATIONS):
        caption = " ".join(row.turns[0][1].split()) if row.turns else ""
        yield PublishedPair(row.name, "train", row.images, [caption] if caption else [], row.name, GENERAL,
                            instruction=row.instruction, num_empty=int(not caption),
                            provenance={"captions": [caption]} if caption and row.images else {})
