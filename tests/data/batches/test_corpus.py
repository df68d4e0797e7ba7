from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from onediff.data.batches.corpus import Corpus
from onediff.data.record import Record, digest, write_shards


@pytest.fixture
def diffcap(scene_pairs: list[Record], tmp_path: Path) -> Path:
    edits = [replace(record, pair_id="e" + record.pair_id, source="edits", provenance={}) for record in scene_pairs[:3]]
    text = replace(scene_pairs[0], pair_id="t", source="chat", before=b"", after=b"", num_images=0,
                   provenance={"conversation": [["What\nis it?", "a table"]]})
    write_shards([*scene_pairs, *edits, text], tmp_path / "diffcap", "train", shard_pairs=7)
    return tmp_path / "diffcap"


def read(folder: Path) -> Corpus:
    return Corpus.read(folder, "train", ["scenes", "edits", "chat"], store=folder.parent / "store")


def test_every_image_is_stored_once_and_read_back_unchanged(diffcap: Path, scene_pairs: list[Record]) -> None:
    corpus = read(diffcap)
    contents = {content for record in scene_pairs for content in record.images}
    assert {corpus.files[name] for name in corpus.files.positions} == contents
    assert len(corpus.samples) == len(scene_pairs) + 4
    assert (diffcap.parent / "store/images.bin").stat().st_size == sum(map(len, contents))


def test_a_second_start_reads_the_stored_corpus(diffcap: Path) -> None:
    first = read(diffcap)
    for shard in diffcap.iterdir():
        shard.unlink()
    second = read(diffcap)
    assert (first.samples, first.captions, first.source_of) == (second.samples, second.captions, second.source_of)


def test_an_incomplete_store_of_a_killed_start_is_replaced(diffcap: Path) -> None:
    part = diffcap.parent / "store.part"
    part.mkdir()
    (part / "images.bin").write_bytes(b"half")
    assert read(diffcap).files.positions
    assert not part.exists()


def test_a_conversation_without_images_is_kept_complete(diffcap: Path) -> None:
    [chat] = [sample for sample in read(diffcap).samples if sample.source == "chat"]
    assert (chat.images, chat.turns) == ((), (("What\nis it?", "a table"),))


def test_captions_belong_to_single_images(diffcap: Path, scene_pairs: list[Record]) -> None:
    corpus, pair = read(diffcap), scene_pairs[0]
    captions = [corpus.captions["scenes"][digest(content)] for content in pair.images]
    assert captions == pair.provenance["captions"]


def test_a_source_without_pairs_is_an_error(scene_pairs: list[Record], tmp_path: Path) -> None:
    write_shards(scene_pairs, tmp_path, "train", shard_pairs=100)
    with pytest.raises(ValueError, match="source 'edits' has no pair in split 'train'"):
        Corpus.read(tmp_path, "train", ["scenes", "edits"], store=tmp_path / "corpus")
