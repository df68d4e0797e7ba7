"""Files that users reported, tried with the real commands: texts, tables, and files of captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import run_cli
from published_sets import picture, put

from onediff.config import Config
from onediff.data.batches.corpus import Corpus
from onediff.data.batches.loader import collate, decode
from onediff.data.batches.sampling import Sampling, tune_entries, tune_rows
from onediff.data.record import SPLITS, write_shards
from onediff.data.sources.published import open_files
from onediff.data.sources.read import records
from onediff.model.assemble import build

REFERENCES = [{"pair_id": "0", "references": ["the red cube has gone", "the cube vanished"]},
              {"pair_id": "1", "references": ["there is no change"]},
              {"pair_id": "2", "references": ["the man has moved to the left"]},
              {"pair_id": "3", "references": ["a car has left the lot"]}]
PREDICTIONS = ["the red cube is gone", "no difference", "the man moved", "a car left"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the commands run, with some images in mine/."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abcdef"):
        picture(tmp_path / f"mine/{name}.png", number)
    return tmp_path


def onediff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `onediff` with these arguments, and return what it prints, or the error message."""
    code = run_cli(monkeypatch, *arguments)
    return capsys.readouterr().out if code == 0 else str(code)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def annotations() -> dict[str, Any]:
    texts = [(int(row["pair_id"]), text) for row in REFERENCES for text in row["references"]]
    return {"images": [{"id": number} for number in range(4)], "type": "captions", "info": {}, "licenses": [],
            "annotations": [{"id": k, "image_id": number, "caption": text} for k, (number, text) in enumerate(texts)]}


@pytest.mark.parametrize(("predictions", "references", "encoding"), [
    (lines([{"pair_id": str(k), "prediction": text} for k, text in enumerate(PREDICTIONS)]), lines(REFERENCES),
     "utf-8-sig"),
    (json.dumps([{"image_id": k, "caption": text} for k, text in enumerate(PREDICTIONS)]), json.dumps(annotations()),
     "utf-8")], ids=["bom-jsonl", "coco-format"])
def test_captions_with_a_byte_order_mark_or_in_the_format_of_coco_are_scored(
        predictions: str, references: str, encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    Path("p").write_text(predictions, encoding=encoding)
    Path("r").write_text(references, encoding=encoding)
    printed = onediff(monkeypatch, capsys, "score", "-p", "p", "-r", "r", "--json")
    assert round(json.loads(printed)["METEOR"], 4) == 0.3173


def test_numbers_as_ids_and_groups_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Report jsonl-int."""
    put(folder / "mine/pairs.jsonl", '{"pair_id": 7, "group": 3, "before": "a.png", "after": "b.png", '
                                     '"references": ["the cup is gone"], "split": "train"}\n')
    printed = onediff(monkeypatch, capsys, "data", "read", "mine", "mine")
    assert "train        1      1           1" in printed
    assert "no pair is in split test, so this source gets no score" in printed


def test_rows_of_one_pair_become_one_pair_with_all_references(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Report longform."""
    put(folder / "mine/pairs.csv", "before,after,references,split\na.png,b.png,the red disc is green now,test\n"
        "a.png,b.png,the disc turned green,test\na.png,b.png,a green disc replaces the red one,test\n"
        "c.png,d.png,the yellow disc is gone,train\n")
    printed = onediff(monkeypatch, capsys, "data", "read", "mine", "mine")
    assert "test         3      1           3" in printed
    assert "test: 2 rows were merged into the pair with equal images and an equal instruction" in printed


def test_a_caption_with_control_tokens_trains_as_text(folder: Path, micro: Config) -> None:
    """Report placeholder-in-caption."""
    captions = ["the <image> icon in the corner is gone", "the tag </s> was added to the text",
                "the word <delta> appeared"]
    put(folder / "mine/pairs.csv", "before,after,references,split\n" + "".join(
        f"{before}.png,{after}.png,{text},train\n" for (before, after), text in zip(
            ("ab", "cd", "ef"), captions, strict=True)))
    files = open_files(folder / "mine", folder / "scratch")
    write_shards((record for split in SPLITS for record in records("mine", files, split)), folder / "diffcap", "train",
                 shard_pairs=9)
    corpus = Corpus.read(folder / "diffcap", "train", ["mine"], store=folder / "store")
    sampling = Sampling({"mine": 1.0}, "plain", seed=1, batch_size=3)
    model, processor = build(micro.model, seed=0)
    batch = collate(tune_rows(tune_entries(corpus, sampling), sampling)(0), processor, decode(corpus, processor))
    assert model(**batch).loss.item() > 0
    answers = {processor.tokenizer.decode(row[row >= 0][:-1]).strip() for row in batch["labels"]}
    assert answers == {*captions}


def test_an_instruction_with_a_placeholder_is_text(folder: Path, micro: Config, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Report placeholder-in-caption, second part."""
    for part in build(micro.model, seed=0):
        part.save_pretrained(folder / "model")
    printed = onediff(monkeypatch, capsys, "caption", "mine/a.png", "mine/b.png", "--model", "model", "--instruction",
                      "<image> What changed? </s>", "--json")
    assert json.loads(printed)["model"] == "model"


@pytest.mark.parametrize("address", ["https://example.org/a.png", "s3://bucket/a.png", "data:image/png;base64,AAAA"])
def test_an_address_in_the_table_is_refused_as_it_was_written(
        address: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder / "mine/pairs.csv", f"before;after;references\na.png;{address.replace(';', '%3B')};x\n")
    message = onediff(monkeypatch, capsys, "data", "read", "mine", "mine")
    assert f"line 2: after must be an image file below the folder, got the address '{address[:10]}" in message
    assert "download the image" in message and "\n" not in message
