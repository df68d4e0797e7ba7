"""Tests of `dvc repro` from raw files to a scored model, on small sources in all formats that DiffCap can contain."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from chat_server import KEY, ChatServer, serving
from published_sets import captioned_rows, conversation_rows, edit_folder, picture, put, put_list
from ruamel.yaml import YAML

from onediff.data.record import read_records, read_table

ROOT = Path(__file__).resolve().parents[3]
CODE = ("onediff", "presets", "dvc.yaml", ".dvcignore", "pyproject.toml", "requirements.lock",
        "packages.yaml", "data/own", "data/pretrained")
RAW = ["mine", "spot_the_diff", "instruct_pix2pix", "llava_558k", "llava_665k"]
SOURCES = [*RAW, "street", "drawn"]
LOW = {f"min_{name}_similarity": -1.0 for name in ("image", "caption", "direction")}
pytestmark = pytest.mark.slow


def write_raw(raw: Path) -> None:
    """Write own pairs, four published datasets and two collections of captioned images to the folder `raw`.

    One image of the test split of Spot-the-Diff is missing.
    """
    shutil.copytree(ROOT / "examples/folder", raw / "mine")
    for split, names in {"train": range(12), "val": range(20, 36), "test": range(40, 45)}.items():
        put(raw / f"spot_the_diff/{split}.json",
            [{"img_id": str(name), "sentences": ["" if name == 44 else f"car {name} left"]} for name in names])
        for name in names:
            for ending in ("", "_2"):
                picture(raw / f"spot_the_diff/images/{name}{ending}.png", name * 2 + len(ending), side=64)
    (raw / "spot_the_diff/images/41_2.png").unlink()
    edit_folder(raw / "instruct_pix2pix", 3, samples=2)
    for index, folder in enumerate(sorted((raw / "instruct_pix2pix").glob("*/*/"))):
        for sample in range(2):
            for side in range(2):
                picture(folder / f"{sample}_{side}.jpg", 1000 + 4 * index + 2 * sample + side, side=64)
    (raw / "llava_558k").mkdir()
    put_list(raw / "llava_558k/blip_laion_cc_sbu_558k.json", captioned_rows(8))
    for row in captioned_rows(8):
        picture(raw / "llava_558k" / row["image"], int(row["id"]) + 2000, side=48)
    (raw / "llava_665k").mkdir()
    put_list(raw / "llava_665k/llava_v1_5_mix665k.json", conversation_rows(16))
    for row in conversation_rows(16):
        if "image" in row:
            picture(raw / "llava_665k" / row["image"], int(row["id"]) + 3000, side=48)
    for number, name in enumerate(("street", "drawn")):
        for k in range(4):
            picture(raw / name / f"{k}.png", 4000 + 10 * number + k, side=64)
        put(raw / name / "captions.csv", "image,caption\n" + "".join(f"{k}.png,picture {k}\n" for k in range(4)))


def write_params(folder: Path) -> None:
    from tiny_diffusion import save_clip, save_pipeline

    values = YAML(typ="safe").load((ROOT / "presets/micro.yaml").read_text())
    values["data"] |= {
        "raw": RAW, "retrieved": ["street"], "diffused": ["drawn"],
        "written": ["instruct_pix2pix", "street", "drawn"], "partial": RAW[1:], "clip": save_clip(folder / "clip"),
        "retrieval": {"min_similarity": -0.5, "max_similarity": 0.99999, "max_uses": 2, "num_neighbors": 3},
        "diffusion": {"pipeline": save_pipeline(folder / "pipeline"), "image_px": 64, "steps": 2, "guidance": 7.5,
                      "image_guidance": 1.5, "num_samples": 2, **LOW},
        "writer": {"model": "tiny-writer", "mode": "vision", "prompts": "v1", "temperature": 0.7, "max_tokens": 61},
        "tolerance": {"generated": 0.01, "raw": 0.1},
        "leaks": {"action": "drop", "near_bits": 3, "max_distance": {"spot_the_diff": None}}}
    values["align"]["mixture"] = {"scenes": 1, "llava_558k": 1}
    values["tune"]["mixture"] = {name: 1 for name in ("scenes", "edits", *SOURCES) if name != "llava_558k"}
    YAML().dump(values, folder / "params.yaml")


@pytest.fixture(scope="module")
def writer() -> Iterator[ChatServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, writer: ChatServer) -> Path:
    """Return a copy of this project in which `dvc repro` has run on the raw files."""
    folder = tmp_path_factory.mktemp("onediff")
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name in ("pairs", "written", "synthetic", "raw"):
        (folder / "data" / name).mkdir(parents=True)
    write_raw(folder / "data/raw")
    write_params(folder)
    run(folder, writer, "git", "init", "-q")
    run(folder, writer, sys.executable, "-m", "dvc", "init", "-q")
    run(folder, writer, sys.executable, "-m", "dvc", "repro")
    return folder


def run(folder: Path, writer: ChatServer, *command: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "ONEDIFF_"))}
    env |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(folder),
            "ONEDIFF_WRITER_URL": writer.url, "ONEDIFF_WRITER_KEY": KEY, "ONEDIFF_WRITER_MAX_USD": "1",
            "ONEDIFF_WRITER_USD_PER_MILLION_INPUT": "0", "ONEDIFF_WRITER_USD_PER_MILLION_OUTPUT": "0",
            "DVC_NO_ANALYTICS": "1", "ONEDIFF_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.timeout(1200)
def test_diffcap_contains_pairs_of_every_source_and_every_pair_has_captions(built: Path) -> None:
    card = json.loads((built / "data/diffcap/card.json").read_text())
    assert {"scenes", "edits", *SOURCES} <= card["num_pairs"]["train"].keys()
    rows = [row for row in read_table(built / "data/diffcap") if row["num_images"] == 2]
    assert all(row["references"] for row in rows)
    written = [row for row in rows if row["source"] in ("instruct_pix2pix", "street", "drawn")]
    assert written and all(row["provenance"]["writer"]["model"] == "tiny-writer" for row in written)


@pytest.mark.timeout(1200)
def test_a_missing_test_image_is_listed_and_the_scores_are_marked_as_incomplete(built: Path) -> None:
    bad = pd.read_parquet(built / "data/quarantine.parquet").set_index("pair_id")
    assert "41_2.png" in bad.loc["spot_the_diff-test-41", "error"]
    scores = json.loads((built / "data/metrics.json").read_text())
    assert scores["spot_the_diff"]["num_pairs"] == 4  # This includes the pair whose only reference is empty.
    assert scores["spot_the_diff"]["incomplete"]
    assert "incomplete" not in scores["scenes"]
    assert "Incomplete" in (built / "data/report.html").read_text()


@pytest.mark.timeout(1200)
def test_the_library_datasets_reads_records_with_two_images_one_image_and_none(built: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    loaded = load_dataset("parquet", data_files=str(built / "data/diffcap/train-*.parquet"), split="train",
                          cache_dir=str(tmp_path))
    counts = {(row["before"] is not None) + (row["after"] is not None) for row in loaded}
    assert counts == {0, 1, 2}


@pytest.mark.timeout(1200)
def test_the_caption_writer_gets_no_question_twice(built: Path, writer: ChatServer) -> None:
    num_questions = sum(writer.paid.values())
    assert num_questions == len(writer.paid) > 0
    answers = [line for path in (built / "data/answers").glob("*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(answers) == num_questions
    assert KEY not in "".join(answers)
    output = run(built, writer, sys.executable, "-m", "dvc", "repro")
    assert "Running stage" not in output
    run(built, writer, sys.executable, "-m", "dvc", "repro", "-f", "--single-item", "write@street")
    assert sum(writer.paid.values()) == num_questions


@pytest.mark.timeout(1200)
def test_diffcap_contains_the_bytes_of_the_published_image_files(built: Path) -> None:
    by_id = {record.pair_id: record for record in read_records(built / "data/diffcap")}
    path = built / "data/raw/spot_the_diff/images/3_2.png"
    assert by_id["spot_the_diff-train-3"].after == path.read_bytes()
