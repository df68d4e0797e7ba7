from __future__ import annotations

from dataclasses import replace

import pytest

from onediff.data.batches.corpus import Corpus
from onediff.data.record import Record, write_shards


@pytest.fixture(scope="module")
def corpus(scene_pairs: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of the sources `scenes` and `edits`, where only `scenes` has captions of single images."""
    folder = tmp_path_factory.mktemp("diffcap")
    others = [replace(record, pair_id="e" + record.pair_id, source="edits", provenance={})
              for record in scene_pairs[:4]]
    write_shards(scene_pairs + others, folder, "train", shard_pairs=100)
    return Corpus.read(folder, "train", ["scenes", "edits"], store=folder / "corpus")


@pytest.fixture(scope="module")
def general(scene_pairs: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of pairs, captioned single images, and conversations with one image or without images."""
    folder = tmp_path_factory.mktemp("general")
    image = [replace(pair, pair_id=f"i{k}", source="llava_558k", after=b"", num_images=1, references=[f"scene {k}"],
                     provenance={"captions": [f"scene {k}"]}) for k, pair in enumerate(scene_pairs[:5])]
    turns = [["What is it?", "a table"], ["Sure?", "yes\nquite"]]
    chat = [replace(image[k], pair_id=f"c{k}", source="llava_665k", provenance={"conversation": turns}) for k in (0, 1)]
    text = [replace(chat[0], pair_id=f"t{k}", before=b"", num_images=0) for k in range(3)]
    write_shards([*scene_pairs, *image, *chat, *text], folder, "train", shard_pairs=7)
    return Corpus.read(folder, "train", ["scenes", "llava_558k", "llava_665k"], store=folder / "corpus")
