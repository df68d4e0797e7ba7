"""Tests of the writer's dry run: it shows exactly the requests that a real run sends, and sends nothing."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from chat_server import KEY, ChatServer
from PIL import Image
from ruamel.yaml import YAML

from onediff.config import Config, Runtime
from onediff.data.record import Record, write_shards
from onediff.data.writer.answers import answers_path
from onediff.data.writer.asking import ask
from onediff.data.writer.dry_run import as_text, plan
from onediff.data.writer.jobs import Unfit, jobs
from onediff.data.writer.request import Request

ROOT = Path(__file__).parents[3]


def config_of(mode: str) -> Config:
    values = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    values["data"] |= {"raw": ["mine"], "written": ["mine"], "writer": {
        "model": "tiny-writer", "mode": mode, "prompts": "v1", "temperature": 0.7, "max_tokens": 61}}
    return Config.model_validate(values)


def picture(grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((64, 96, 3), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def record(number: int, *, captions: list[str], split: str = "train", **changes: object) -> Record:
    values = {"before": picture(number), "after": picture(200), "references": []} | changes
    return Record(pair_id=f"mine-{number}", source="mine", split=split, group_id=f"mine-{number}",
                  instruction="What changed?", change_type="unlabelled", provenance={"captions": captions},
                  **values)  # type: ignore[arg-type]


def write(records: list[Record]) -> None:
    write_shards(records, Path("data/pairs/mine"), records[0].split, shard_pairs=3)


def test_the_plan_contains_exactly_the_requests_that_are_later_sent(server: ChatServer, runtime: Runtime) -> None:
    write([record(number, captions=[f"room {number}", "a garden"]) for number in range(5)])
    planned = plan("mine", config_of("text"), runtime)
    assert not server.seen
    assert (planned["jobs"], planned["answered"], planned["unfit"], planned["to_ask"]) == (5, 0, 0, 5)
    made = [job for job in jobs("mine", config_of("text"), "write") if isinstance(job, Request)]
    ask(made, answers_path("mine", "write"), runtime.model_copy(update={"writer_concurrency": 1}))
    for shown, sent in zip(planned["requests"], server.seen, strict=False):
        assert shown["body"] == sent["body"]
        assert shown["url"].endswith(sent["path"])
        assert shown["headers"]["Idempotency-Key"] == sent["headers"]["idempotency-key"]
    after = plan("mine", config_of("text"), runtime)
    assert (after["answered"], after["to_ask"], after["requests"]) == (5, 0, [])
    assert 0 < after["usd"]["spent"] <= planned["usd"]["at_most"]
    assert KEY not in json.dumps(planned) + as_text(planned)


def test_equal_requests_are_counted_once_and_pairs_without_captions_are_unfit(runtime: Runtime) -> None:
    write([record(1, captions=["a", "b"]), record(2, captions=["a", "b"]), record(3, captions=["a"])])
    planned = plan("mine", config_of("text"), runtime)
    assert (planned["jobs"], planned["to_ask"], planned["unfit"]) == (3, 1, 1)
    unfit = [job for job in jobs("mine", config_of("text"), "write") if isinstance(job, Unfit)]
    assert "data.writer.mode 'text' needs a caption of each image" in unfit[0].reason


def test_images_are_complete_in_the_plan_and_shortened_in_the_text(runtime: Runtime) -> None:
    write([record(1, captions=[])])
    planned = plan("mine", config_of("vision"), runtime)
    uri = planned["requests"][0]["body"]["messages"][1]["content"][1]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (96, 64)
    assert uri not in as_text(planned)
    assert uri[:40] in as_text(planned)


def test_without_a_price_the_cost_is_unknown(runtime: Runtime) -> None:
    write([record(1, captions=["a", "b"])])
    planned = plan("mine", config_of("text"), Runtime())
    assert planned["usd"]["expected"] is None
    assert "cost: unknown; set writer_usd_per_million_input" in as_text(planned)


def test_a_pair_with_a_missing_image_is_unfit(runtime: Runtime) -> None:
    incomplete = record(1, captions=[], after=b"")
    incomplete.provenance["missing"] = ["7_2.png"]
    write([record(2, captions=[]), incomplete])
    unfit = [job for job in jobs("mine", config_of("vision"), "write") if isinstance(job, Unfit)]
    assert unfit == [Unfit("mine-1", "missing: 7_2.png")]


def test_pairs_with_human_captions_are_skipped(runtime: Runtime) -> None:
    write([record(1, captions=["a", "b"], references=["a dog came"]), record(2, captions=["a", "b"])])
    assert [job.name for job in jobs("mine", config_of("text"), "write")] == ["mine-2"]


def test_a_source_without_any_possible_request_is_an_error(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"params.yaml: data.written: does not list 'yours'; .* sources: mine"):
        plan("yours", config_of("text"), runtime)
    with pytest.raises(ValueError, match=r"params.yaml: data.diffused: does not list 'mine'; the list is empty"):
        plan("mine", config_of("text"), runtime, stage="instruct")
    with pytest.raises(FileNotFoundError, match="data/pairs/mine"):
        plan("mine", config_of("text"), runtime)
    write([record(1, captions=[])])
    with pytest.raises(ValueError, match=r"mine: no pair can be sent to the writer; .* mine-1: .* needs"):
        plan("mine", config_of("text"), runtime)
