"""From a collection of captioned images to edits, in an empty folder, with a real endpoint beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import serving
from ruamel.yaml import YAML

from onediff.config import Config
from onediff.data.synthesis.edits.records import edit_record
from onediff.stages.instruct import instruct

ROOT = Path(__file__).parents[2]
DATA = {"raw": [], "diffused": ["photos"], "written": ["photos"], "clip": "clip",
        "writer": {"model": "tiny-writer", "mode": "text", "prompts": "v1", "temperature": 0.7, "max_tokens": 61},
        "diffusion": {"pipeline": "p", "image_px": 64, "steps": 2, "guidance": 7.5, "image_guidance": 1.5,
                      "num_samples": 1, "min_image_similarity": 0.7, "min_caption_similarity": 0.2,
                      "min_direction_similarity": 0.2}}


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three photographs, one with an empty caption beside them."""
    monkeypatch.chdir(tmp_path)
    values = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    values["data"] |= DATA
    YAML().dump(values, tmp_path / "params.yaml")
    raw = tmp_path / "data/raw/photos"
    raw.mkdir(parents=True)
    config = Config.model_validate(values)
    for number in range(3):
        (raw / f"{number}.png").write_bytes(edit_record(config, "train", number).before)
    (raw / "captions.csv").write_text("image,caption\n0.png,a room\n1.png,a dog\n2.png,a cat\n")
    return tmp_path


def test_every_caption_gets_its_edit_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        for name, value in {"URL": server.url, "USD_PER_MILLION_INPUT": "0", "USD_PER_MILLION_OUTPUT": "0"}.items():
            monkeypatch.setenv(f"ONEDIFF_WRITER_{name}", value)
        server.contents = {"a dog": "refuse"}
        made = []
        for _ in range(2):
            instruct("photos")
            made.append(Path("data/instructed/photos.jsonl").read_bytes())
        assert len(server.seen) == 3
    assert made[0] == made[1]
    assert lines("data/instructed/photos.jsonl") == [
        {"name": name, "caption": caption, "edit": "make it snow", "output": "the same in snow"}
        for name, caption in (("0.png", "a room"), ("2.png", "a cat"))]
    assert lines("data/instructed/photos.set_aside.jsonl") == [
        {"name": "1.png", "reason": "refused: the writer refused: 'I cannot help'"}]


def test_a_source_that_is_not_diffused_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"params.yaml: data.diffused: does not list 'mine'; .* sources: photos"):
        instruct("mine")
