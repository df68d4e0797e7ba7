"""Tests of reading dvc.lock, and of fetching and restoring files that DVC stores."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onediff.repro.lock import (
    cache_of,
    fetch,
    files_of,
    md5_of,
    md5_of_files,
    outs_of,
    preserved_dvc_lock,
    read_dvc_lock,
    restore_outs,
    uncached_outs,
)

FILES = {"a.parquet": "alpha", "b.parquet": "beta", "inner/c.json": "{}"}


def dvc(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project with a tracked folder and a stage output, both pushed to a remote with a relative path."""
    folder = tmp_path_factory.mktemp("versioned") / "project"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / "data/shards" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data/shards" / name).write_text(text)
    (folder / "one.txt").write_text("one")
    (folder / "dvc.yaml").write_text("stages:\n  copy:\n    cmd: cp one.txt data/two.txt\n    deps: [one.txt]\n"
                                     "    params: [p.a]\n    outs: [data/two.txt]\n")
    (folder / "params.yaml").write_text("p: {a: 1e-3}\n")
    dvc(folder, "init", "--no-scm")
    dvc(folder, "remote", "add", "-d", "store", "../store")
    dvc(folder, "add", "data/shards")
    dvc(folder, "repro")
    dvc(folder, "push")
    return folder


@pytest.fixture
def project(original: Path, tmp_path: Path) -> Path:
    """A copy of the project `original` and of the remote beside it, which the test may change."""
    shutil.copytree(original.parent, tmp_path / "all")
    return tmp_path / "all/project"


def cached(project: Path, name: str) -> Path:
    """Return the path in DVC's cache of a file or folder of the project."""
    md5 = md5_of(project / name)
    return project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def test_digests_equal_those_that_dvc_computes(project: Path) -> None:
    assert f"md5: {md5_of(project / 'data/shards')}" in (project / "data/shards.dvc").read_text()
    assert files_of(md5_of(project / "data/shards"), cache_of(project)) == md5_of_files(project / "data/shards")


@pytest.mark.parametrize("before", ["stages: {}", None])
def test_a_dvc_lock_that_a_full_disk_emptied_is_restored(before: str | None, tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    if before:
        lock.write_text(before)
    with preserved_dvc_lock(lock):
        lock.write_text("")
    assert (lock.read_text() if lock.exists() else None) == before and not list(tmp_path.glob("*.part"))
    with preserved_dvc_lock(lock):
        lock.write_text("stages: {a: {}}")
    assert lock.read_text() == "stages: {a: {}}" and not list(tmp_path.glob("*.part"))


def test_incomplete_files_of_a_killed_stage_do_not_count(tmp_path: Path) -> None:
    for name in ("card.json", "index.html.part"):
        (tmp_path / name).touch()
    assert list(md5_of_files(tmp_path)) == ["card.json"]


def test_parameters_in_a_dvc_lock_have_their_full_names(project: Path) -> None:
    stage = read_dvc_lock(project / "dvc.lock")["copy"]
    assert stage.deps == stage.deps | {"one.txt": md5_of(project / "one.txt")} and stage.params == {"p.a": 1e-3}
    assert outs_of(read_dvc_lock(project / "dvc.lock")) == {"data/two.txt": md5_of(project / "one.txt")}


@pytest.mark.parametrize("name", ["data/shards", "one.txt"])
def test_fetched_files_have_the_requested_digest_and_the_workspace_does_not_change(project: Path, tmp_path: Path,
                                                                                   name: str) -> None:
    before = sorted(path for path in project.rglob("*") if ".dvc" not in path.parts)
    got = fetch(md5_of(project / name), tmp_path / "deep/got", project=project)
    assert md5_of(got) == md5_of(project / name)
    assert sorted(path for path in project.rglob("*") if ".dvc" not in path.parts) == before
    assert [path.name for path in got.parent.iterdir()] == ["got"]


def test_a_file_that_the_cache_lost_comes_from_the_remote(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / ".dvc/cache")
    got = fetch(md5_of(project / "data/shards"), tmp_path / "got", project=project)
    assert md5_of_files(got) == md5_of_files(project / "data/shards")


def test_a_damaged_cache_file_is_reported_and_nothing_is_written(project: Path, tmp_path: Path) -> None:
    file, md5 = cached(project, "data/shards/b.parquet"), md5_of(project / "data/shards/b.parquet")
    file.chmod(0o644)
    file.write_text("bets")
    file.chmod(0o444)  # DVC does not check the digests of read-only files in its cache.
    with pytest.raises(ValueError, match=rf"b.parquet is damaged: its md5 must be {md5}, got \w+; delete {file}, then"):
        fetch(md5_of(project / "data/shards"), tmp_path / "got", project=project)
    assert not (tmp_path / "got").exists()


def test_a_file_that_neither_the_cache_nor_the_remote_contains_is_reported(project: Path, tmp_path: Path) -> None:
    for store in (project / ".dvc/cache", project.parent / "store"):
        (store / cached(project, "data/shards/a.parquet").relative_to(project / ".dvc/cache")).unlink()
    with pytest.raises(ValueError, match=r"a.parquet is missing: neither the cache nor a remote .* 'dvc push' on the"):
        fetch(md5_of(project / "data/shards"), tmp_path / "got", project=project)


def test_a_damaged_listing_of_a_folder_is_refused(project: Path) -> None:
    listing = cached(project, "data/shards")
    listing.chmod(0o644)
    listing.write_text(listing.read_text().replace("a.parquet", "z.parquet"))
    with pytest.raises(ValueError, match="its md5 must equal its name"):
        files_of(md5_of(project / "data/shards"), cache_of(project))


@pytest.mark.parametrize("md5", ["../../../etc/passwd", "ABC", "0" * 31])
def test_a_malformed_md5_is_refused(project: Path, tmp_path: Path, md5: str) -> None:
    with pytest.raises(ValueError, match="an md5 of DVC must be 32"):
        fetch(md5, tmp_path / "got", project=project)


def test_an_existing_target_and_a_folder_without_dvc_are_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one\.txt must not exist yet"):
        fetch("0" * 32, project / "one.txt", project=project)
    with pytest.raises(FileNotFoundError, match="this folder is no DVC project"):
        fetch("0" * 32, tmp_path / "got", project=tmp_path)


def test_errors_contain_no_secrets_of_a_remote(project: Path, tmp_path: Path) -> None:
    (project / ".dvc/config.local").write_text(
        "['remote \"store\"']\n    url = http://user:secret1@127.0.0.1:9/x\n    password = \"secret2\"\n")
    with pytest.raises(ValueError, match="is missing") as error:
        fetch("0" * 32, tmp_path / "got", project=project)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_dvc_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text("a: [1\n" + os.linesep)
    with pytest.raises(ValueError, match=r"dvc.lock: must be a dvc.lock"):
        read_dvc_lock(tmp_path / "dvc.lock")
    with pytest.raises(FileNotFoundError, match="'dvc repro' writes it"):
        read_dvc_lock(tmp_path / "none.lock")


def lock_shards(project: Path) -> None:
    """Add an entry to dvc.lock as if a stage `shards` had written the folder data/shards."""
    with (project / "dvc.lock").open("a") as file:
        file.write("  shards:\n    cmd: make\n    outs:\n    - path: data/shards\n      hash: md5\n"
                   f"      md5: {md5_of(project / 'data/shards')}\n")


def test_missing_outputs_of_a_stage_are_restored_as_links_to_the_cache(project: Path) -> None:
    lock_shards(project)
    before = {name: md5_of_files(project / "data/shards") for name in ("shards", "copy")}
    shutil.rmtree(project / "data/shards")
    (project / "data/two.txt").unlink()
    assert restore_outs("shards", project=project) == [Path("data/shards")]
    assert md5_of_files(project / "data/shards") == before["shards"] and not (project / "data/two.txt").exists()
    assert (project / "data/shards/a.parquet").samefile(cached(project, "data/shards/a.parquet"))
    assert restore_outs("copy", project=project) == [Path("data/two.txt")]
    assert (project / "data/two.txt").read_text() == "one"


def test_an_output_that_exists_is_not_overwritten(project: Path) -> None:
    (project / "data/two.txt").write_text("newer")
    assert restore_outs("copy", project=project) == []
    assert (project / "data/two.txt").read_text() == "newer"


def test_an_output_is_not_restored_in_part_if_the_cache_lacks_a_file(project: Path) -> None:
    lock_shards(project)
    lost = cached(project, "data/shards/b.parquet")
    shutil.rmtree(project / "data/shards")
    assert uncached_outs("shards", project=project) == []
    lost.unlink()
    assert uncached_outs("shards", project=project) == [Path("data/shards")]
    assert restore_outs("shards", project=project) == [] and not (project / "data/shards").exists()
    assert not list(project.rglob("*.part"))


def test_without_a_dvc_lock_and_for_a_new_stage_nothing_is_restored(project: Path) -> None:
    assert restore_outs("new", project=project) == []
    (project / "dvc.lock").unlink()
    assert restore_outs("copy", project=project) == []
