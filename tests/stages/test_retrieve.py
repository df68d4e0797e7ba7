from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from tiny_diffusion import save_clip

from onediff.data.record import read_records
from onediff.stages.retrieve import retrieve

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a project with three scenes, two images of each scene with different light, and one broken image."""
    values = YAML(typ="safe").load((ROOT / "presets/tiny.yaml").read_text())
    values["data"] |= {"retrieved": ["street"], "written": ["street"], "clip": save_clip(tmp_path / "clip"),
                       "retrieval": {"min_similarity": 0.0, "max_similarity": 0.99999, "max_uses": 1,
                                     "num_neighbors": 4},
                       "writer": {"model": "m", "mode": "text", "prompts": "v1", "temperature": 0.5, "max_tokens": 9}}
    YAML().dump(values, tmp_path / "params.yaml")
    folder = tmp_path / "data/raw/street"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for scene in range(3):
        base = rng.integers(0, 200, (4, 4, 3)).repeat(12, axis=0).repeat(12, axis=1)
        for light in range(2):
            Image.fromarray((base + 40 * light).astype(np.uint8)).save(folder / f"{scene}{light}.png")
    (folder / "bad.png").write_bytes(b"no image")
    names = [path.name for path in sorted(folder.glob("*.png"))]
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{name},scene {name[0]}\n" for name in names))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEDIFF_WORKERS", "1")
    monkeypatch.setenv("ONEDIFF_DEVICE", "cpu")
    return tmp_path


def test_similar_images_become_pairs_with_both_captions_and_a_second_run_gives_equal_bytes(project: Path) -> None:
    retrieve("street")
    records = list(read_records(project / "data/pairs/street"))
    assert len(records) >= 2
    names = [name for record in records for name in record.provenance["names"]]
    assert len(set(names)) == len(names)
    for record in records:
        assert record.provenance["captions"] == [f"scene {name[0]}" for name in record.provenance["names"]]
        assert 0 <= record.provenance["similarity"] < 1
        content = [(project / "data/raw/street" / name).read_bytes() for name in record.provenance["names"]]
        assert list(record.images) == content
        assert record.references == [] and record.split == "train"
    report = json.loads((project / "data/pairs/street/report.json").read_text())
    assert (report["images"], report["pairs"], list(report["unreadable"])) == (7, len(records), ["bad.png"])
    first = (project / "data/pairs/street/train-00000.parquet").read_bytes()
    retrieve("street")
    assert (project / "data/pairs/street/train-00000.parquet").read_bytes() == first


def test_a_range_of_similarities_without_any_pair_is_refused(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("min_similarity: 0.0", "min_similarity: 0.99998"))
    with pytest.raises(ValueError, match=r"no two of 6 images have a similarity from 0\.99998 to 0\.99999; widen"):
        retrieve("street")


def test_a_missing_folder_of_images_is_refused(project: Path) -> None:
    (project / "data/raw/street").rename(project / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"data/raw/street does not exist: put images"):
        retrieve("street")
