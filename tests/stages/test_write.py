"""Tests of the stage `write`, in which a caption writer, here a local test server, writes captions for pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, ChatServer, serving
from ruamel.yaml import YAML

from onediff.config import Config
from onediff.data.record import Record, digest, read_records, write_shards
from onediff.data.synthesis.edits.records import edit_record
from onediff.stages.write import write

ROOT = Path(__file__).parents[2]
WRITER = {"model": "tiny-writer", "mode": "text", "prompts": "v1", "temperature": 0.7, "max_tokens": 61}


def write_params(folder: Path, **data: object) -> Config:
    values = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    values["data"] |= {"raw": ["mine"], "written": ["mine"], "writer": WRITER} | data
    YAML().dump(values, folder / "params.yaml")
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def pairs() -> list[Record]:
    """Return edited pairs of two splits that have no references, but a caption of each image."""
    values = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    config = Config.model_validate(values)
    records = [edit_record(config, split, index) for split in ("train", "val") for index in range(4)]
    return [replace(record, pair_id=f"mine-{record.split}-{number}", source="mine", references=[],
                    provenance={"captions": [f"room {number}", "a garden"], "edit": "make it a garden"})
            for number, record in enumerate(records)]


@pytest.fixture
def folder(tmp_path: Path, pairs: list[Record], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    for split in ("train", "val"):
        write_shards([record for record in pairs if record.split == split], tmp_path / "data/pairs/mine", split,
                     shard_pairs=3)
    return tmp_path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    with serving() as started:
        for name, value in {"URL": started.url, "USD_PER_MILLION_INPUT": "0", "USD_PER_MILLION_OUTPUT": "0",
                            "KEY": KEY}.items():
            monkeypatch.setenv(f"ONEDIFF_WRITER_{name}", value)
        yield started


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in sorted(folder.rglob("*.*"))}


def test_only_the_references_and_the_provenance_of_a_pair_change(folder: Path, server: ChatServer,
                                                                 pairs: list[Record]) -> None:
    write("mine")
    written = {record.pair_id: record for record in read_records(folder / "data/written/mine")}
    assert sorted(written) == [record.pair_id for record in pairs]
    answers = {row["key"]: row for row in lines("data/answers/mine/write.jsonl")}
    for record in pairs:
        writer = written[record.pair_id].provenance["writer"]
        sentences = json.loads(answers[writer["key"]]["text"])["differences"]
        assert writer == {"model": "tiny-writer", "mode": "text", "prompts": "v1", "key": writer["key"]}
        assert written[record.pair_id] == replace(record, references=sentences,
                                                  provenance=record.provenance | {"writer": writer})


@pytest.mark.parametrize("mode", ["text", "vision"])
def test_a_second_run_uses_the_stored_answers_and_gives_equal_bytes_without_the_server(
        folder: Path, server: ChatServer, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(folder, writer=WRITER | {"mode": mode})
    write("mine")
    first = digests(folder / "data")
    assert len(server.seen) == 8
    monkeypatch.setenv("ONEDIFF_WRITER_URL", "http://127.0.0.1:9/v1")
    write("mine")
    assert digests(folder / "data") == first and len(server.seen) == 8


def test_pairs_without_a_usable_answer_are_listed_with_the_reason(folder: Path, server: ChatServer,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    server.contents = {"room 1": "refuse", "room 6": "no json"}
    write("mine")
    assert lines("data/written/mine/set_aside.jsonl") == [
        {"pair_id": "mine-train-1", "reason": "refused: the writer refused: 'I cannot help'"},
        {"pair_id": "mine-val-6", "reason": "malformed: not JSON: 'no json'"}]
    assert len(list(read_records(folder / "data/written/mine"))) == 6
    assert "6 pairs with captions; 2 without" in capsys.readouterr().out


def test_pairs_with_a_broken_or_a_missing_image_are_listed_with_the_reason(folder: Path, server: ChatServer,
                                                                           pairs: list[Record]) -> None:
    write_params(folder, writer=WRITER | {"mode": "vision"})
    broken = [replace(pairs[0], after=b"GIF8"), replace(pairs[1], before=b"", provenance={"missing": ["1.png"]})]
    write_shards([*broken, *pairs[2:4]], folder / "data/pairs/mine", "train", shard_pairs=3)
    write("mine")
    set_aside = lines("data/written/mine/set_aside.jsonl")
    assert [row["reason"].split(",")[0] for row in set_aside] == ["unreadable: second image: not an image",
                                                                  "missing: 1.png"]


def test_a_run_without_any_usable_caption_is_refused(folder: Path, server: ChatServer) -> None:
    server.contents = {"room": "refuse"}
    with pytest.raises(ValueError, match="no usable caption for any of 8 pairs; the first pair is mine-train-0, and "):
        write("mine")


def test_the_command_prints_a_one_line_error_that_does_not_contain_the_secret_key(folder: Path,
                                                                                  server: ChatServer) -> None:
    server.faults = ["401 " + KEY] * 8
    done = subprocess.run([sys.executable, "-m", "onediff.stages.write", "mine"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"write: {server.url}: HTTP 401: the endpoint rejects the")
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr + done.stdout
