from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from onediff.data.sources.archives import unpack, unpack_once

LIMITS = {"max_bytes": 10_000, "max_files": 20}
CONTENT = {"a/1.txt": b"one", "a/b/2.txt": b"", "3.txt": b"three" * 99}


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def tarred(path: Path, members: dict[str, bytes], **attributes: object) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "X.ZIP"])
def test_unpacked_files_equal_the_packed_files(name: str, tmp_path: Path) -> None:
    archive = (zipped if name.lower().endswith("zip") else tarred)(tmp_path / name, CONTENT)
    paths = unpack(archive, tmp_path / "out", **LIMITS)
    assert {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in paths} == CONTENT


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
@pytest.mark.parametrize("kind", ["x.zip", "x.tar.gz"])
def test_an_archive_with_a_member_outside_the_target_folder_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    archive = (zipped if kind == "x.zip" else tarred)(tmp_path / kind, {"fine.txt": b"1", name: b"2"})
    with pytest.raises(ValueError, match="would be written outside the target folder; do not"):
        unpack(archive, tmp_path / "deep/er/out", **LIMITS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    archive = tarred(tmp_path / "x.tar", {"passwd": b""}, type=kind, linkname="/etc/passwd")
    with pytest.raises(ValueError, match="'passwd' is a link or a device"):
        unpack(archive, tmp_path / "out", **LIMITS)


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        info = zipfile.ZipInfo("passwd")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="'passwd' is a link or a device"):
        unpack(tmp_path / "x.zip", tmp_path / "out", **LIMITS)


def test_an_archive_that_unpacks_to_too_many_bytes_or_files_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", {"bomb": bytes(10_001)})
    with pytest.raises(ValueError, match="larger than 10000 bytes: free some disk space"):
        unpack(archive, tmp_path / "out", **LIMITS)
    with pytest.raises(ValueError, match="contains more than 20 files"):
        unpack(tarred(tmp_path / "x.tar", {str(k): b"" for k in range(21)}), tmp_path / "out", **LIMITS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_a_broken_archive_is_refused_and_no_file_is_unpacked(name: str, tmp_path: Path) -> None:
    archive = (zipped if name == "x.zip" else tarred)(tmp_path / name, {"a": b"1", "b": bytes(range(256)) * 30})
    complete = archive.read_bytes()
    for content in (b"", b"<html>not found</html>", complete[: len(complete) // 2]):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: broken or incomplete archive"):
            unpack(archive, tmp_path / "out", **LIMITS)
    assert list(tmp_path.iterdir()) == [archive]


def test_an_archive_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", b"content that is stored without compression")
    archive.write_bytes(archive.read_bytes().replace(b"stored", b"STORED"))
    with pytest.raises(ValueError, match=r"broken or incomplete archive .Bad CRC-32"):
        unpack(archive, tmp_path / "out", **LIMITS)


def test_unknown_formats_duplicate_names_and_an_existing_target_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.zip, \.tar, .* can be unpacked; unpack this archive by hand"):
        unpack(tmp_path / "x.rar", tmp_path / "out", **LIMITS)
    with pytest.raises(ValueError, match="contains the file name 'a' twice"):
        unpack(tarred(tmp_path / "y.tar", {"a": b"1", "./a": b"2"}), tmp_path / "out", **LIMITS)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="already exists: remove it"):
        unpack(zipped(tmp_path / "z.zip", CONTENT), tmp_path / "out", **LIMITS)


def test_two_archives_with_equal_names_sizes_and_times_are_unpacked_to_two_folders(tmp_path: Path) -> None:
    folders = []
    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).mkdir()
        archive = zipped(tmp_path / name / "images.zip", {"1.jpg": content})
        os.utime(archive, ns=(5, 5))
        folders.append(unpack_once(archive, tmp_path / "scratch"))
    assert [(folder / "1.jpg").read_bytes() for folder in folders] == [b"one", b"two"]


def test_an_archive_is_unpacked_again_only_after_it_has_changed(tmp_path: Path) -> None:
    first = unpack_once(zipped(tmp_path / "x.zip", CONTENT), tmp_path / "out")
    assert unpack_once(tmp_path / "x.zip", tmp_path / "out") == first
    (tmp_path / "x.zip").unlink()
    assert unpack_once(zipped(tmp_path / "x.zip", {"a": b"other"}), tmp_path / "out") != first


@pytest.mark.parametrize(("name", "encoding"), [("fu\u0308r/1.txt", "utf-8"), ("f\xfcr/1.txt", "cp437")])
def test_names_in_a_zip_without_the_mark_for_utf_8_may_be_utf_8_as_macos_writes_them(name: str, encoding: str,
                                                                                    tmp_path: Path) -> None:
    raw = name.encode(encoding)
    archive = zipped(tmp_path / "x.zip", {"x" * len(raw): b"one"})
    archive.write_bytes(archive.read_bytes().replace(b"x" * len(raw), raw))
    assert unpack(archive, tmp_path / "out", **LIMITS) == [tmp_path / "out" / name]
