from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from onediff.config import Runtime, load_runtime
from onediff.data.quality.probe import probe_folders
from onediff.data.record import read_records
from onediff.stages.synthesize import synthesize

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: the extra 'ray'")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the micro preset, fewer scenes and edits, in which the test stands."""
    monkeypatch.chdir(tmp_path)
    params("scenes", num_scenes={"train": 4, "val": 1, "gate": 1, "test": 2}, num_far=1)
    return tmp_path


def params(section: str | None = None, **values: Any) -> None:
    yaml = YAML(typ="safe")
    path = Path("params.yaml")
    tree = yaml.load(path if path.exists() else ROOT / "presets/micro.yaml")
    tree["data"]["edits"]["num_pairs"] = {"train": 4, "val": 1, "gate": 1, "test": 2}
    (tree["data"][section] if section else tree["data"]).update(values)
    with path.open("w") as file:
        yaml.dump(tree, file)


def digests(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).glob("*.parquet"))}


@pytest.mark.parametrize("source", ["scenes", "edits"])
def test_the_number_of_processes_changes_no_byte(source: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for workers in ("1", "3"):
        monkeypatch.setenv("ONEDIFF_WORKERS", workers)
        synthesize(source)
        made.append(digests(f"data/synthetic/{source}"))
    assert made[0] == made[1]
    assert len(made[0]) == (5 if source == "scenes" else 4)


def test_every_split_has_its_pairs_in_its_own_shards(project: Path) -> None:
    synthesize("scenes")
    folder = Path("data/synthetic/scenes")
    counts = {"train": 12, "val": 4, "gate": 4, "test": 8, "far": 4}
    for prefix, count in counts.items():
        records = list(read_records(folder, f"{prefix}-*.parquet"))
        assert len(records) == count
        assert {record.split for record in records} == {"test" if prefix == "far" else prefix}
        assert {record.source for record in records} == {"scenes_far" if prefix == "far" else "scenes"}


def test_shards_of_an_earlier_run_do_not_stay(project: Path) -> None:
    old = Path("data/synthetic/edits/train-00007.parquet")
    old.parent.mkdir(parents=True)
    old.touch()
    synthesize("edits")
    assert not old.exists()


def test_an_unknown_source_is_named(project: Path) -> None:
    with pytest.raises(ValueError, match=r"the source to generate must be scenes or edits, got 'birds'"):
        synthesize("birds")


@pytest.mark.skipif(importlib.util.find_spec("bpy") is not None, reason="bpy is installed")
def test_missing_blender_is_said_before_any_scene(project: Path) -> None:
    params("scenes", renderer="blender")
    with pytest.raises(ValueError, match="renderer 'blender' needs the package bpy"):
        synthesize("scenes")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bpy") is None, reason="bpy is not installed: the extra 'blender'")
def test_blender_too_gives_the_same_bytes_with_more_processes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params("scenes", renderer="blender", num_scenes={"train": 3, "val": 1, "gate": 1, "test": 1})
    made = []
    for workers in ("1", "2"):
        monkeypatch.setenv("ONEDIFF_WORKERS", workers)
        synthesize("scenes")
        made.append(digests("data/synthetic/scenes"))
    assert made[0] == made[1]


def kill_at(first: Path, cluster: Any, node: Any) -> threading.Thread:
    """Kills the node as soon as the file is there."""

    def wait() -> None:
        while not first.exists():
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def probed(runtime: Runtime) -> Iterator[Any]:
    folder = Path("data/synthetic/scenes")
    return probe_folders({"scenes": folder}, max_megapixels=64, clip=None, runtime=runtime)


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_loses_a_node_midway_gives_the_same_bytes(project: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    params("scenes", num_scenes={"train": 160, "val": 10, "gate": 10, "test": 60}, num_far=20)
    params(shard_pairs=8)
    synthesize("scenes")
    expected, expected_rows = digests("data/synthetic/scenes"), list(probed(Runtime()))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    import ray

    try:
        monkeypatch.setenv("ONEDIFF_ENGINE", "ray")
        monkeypatch.setenv("ONEDIFF_RAY_ADDRESS", cluster.address)
        doomed = cluster.add_node(num_cpus=1)
        killer = kill_at(Path("data/synthetic/scenes/train-00005.parquet"), cluster, doomed)
        synthesize("scenes")
        killer.join(timeout=1)
        assert not killer.is_alive()
        assert digests("data/synthetic/scenes") == expected
        doomed, rows = cluster.add_node(num_cpus=1), []
        for table in probed(load_runtime()):
            rows.append(table)
            if len(rows) == 10:
                cluster.remove_node(doomed, allow_graceful=False)
        assert rows == expected_rows
    finally:
        ray.shutdown()
        cluster.shutdown()
