from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from tiny_diffusion import save_clip, save_pipeline

from onediff.data.record import read_records
from onediff.stages.diffuse import diffuse

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a project with three images, an edit instruction for each image, and tiny CLIP and diffusion models."""
    values = YAML(typ="safe").load((ROOT / "presets/tiny.yaml").read_text())
    low = {f"min_{name}_similarity": -1.0 for name in ("image", "caption", "direction")}
    values["data"] |= {
        "diffused": ["drawn"], "written": ["drawn"], "clip": save_clip(tmp_path / "clip"),
        "diffusion": {"pipeline": save_pipeline(tmp_path / "pipeline"), "image_px": 64, "steps": 2, "guidance": 7.5,
                      "image_guidance": 1.5, "num_samples": 2, **low},
        "writer": {"model": "m", "mode": "text", "prompts": "v1", "temperature": 0.5, "max_tokens": 9}}
    YAML().dump(values, tmp_path / "params.yaml")
    folder, instructions = tmp_path / "data/raw/drawn", tmp_path / "data/instructed/drawn.jsonl"
    for new_folder in (folder, instructions.parent):
        new_folder.mkdir(parents=True)
    rows = []
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        rows.append({"name": f"{k}.png", "caption": f"dog {k}", "edit": "make it a cat", "output": f"cat {k}"})
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{k}.png,dog {k}\n" for k in range(3)))
    instructions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WORKERS", "1")
    monkeypatch.setenv("ONEDIFF_DEVICE", "cpu")
    return tmp_path


def test_every_image_with_an_instruction_is_edited_and_a_restart_gives_equal_bytes(project: Path) -> None:
    diffuse("drawn")
    shard = project / "data/pairs/drawn/train-00000.parquet"
    records, first = list(read_records(shard.parent)), shard.read_bytes()
    names = [record.provenance["names"][0] for record in records]
    assert names == ["0.png", "0.png", "1.png", "1.png", "2.png", "2.png"]
    assert json.loads((shard.parent / "filters.json").read_text())["kept"] == 6
    [finished, unfinished, *_] = sorted((project / ".onediff/scratch/diffuse").iterdir())
    (unfinished / "fates.json").unlink()  # A stage that was stopped leaves such a folder without fates.json.
    written_at = (finished / "fates.json").stat().st_mtime_ns
    diffuse("drawn")
    assert shard.read_bytes() == first
    assert (finished / "fates.json").stat().st_mtime_ns == written_at


def test_filters_that_remove_all_edits_are_refused_with_the_count_of_each_filter(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("min_direction_similarity: -1.0", "min_direction_similarity: 1.0"))
    with pytest.raises(ValueError, match=r"'drawn': no edited image passed .* \(kept 0, .*direction .* 6, flagged 0"):
        diffuse("drawn")


def test_missing_instructions_and_instructions_for_an_unknown_image_are_refused(project: Path) -> None:
    instructions = project / "data/instructed/drawn.jsonl"
    instructions.write_text('{"name": "9.png", "edit": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match=r"drawn\.jsonl line 1: image '9\.png' is not in data/raw/drawn"):
        diffuse("drawn")
    instructions.unlink()
    with pytest.raises(FileNotFoundError, match=r"'dvc repro instruct@drawn' writes it"):
        diffuse("drawn")
