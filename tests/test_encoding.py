from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from onediff.encoding import read_text
from onediff.text_files import json_lines, read_lines, read_list, read_table

CONTENT = '{"a": "caf\u00e9"}\n{"a": "\u20ac"}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_utf8_and_utf16_with_a_byte_order_mark_are_read(encoding: str, tmp_path: Path) -> None:
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    for end in ("\n", "\r\n", "\r"):
        text = CONTENT.replace("\n", end)
        (tmp_path / "a").write_bytes(mark + text.encode(encoding))
        assert [value for _, value in json_lines(tmp_path / "a")] == [{"a": "caf\u00e9"}, {"a": "\u20ac"}]
        assert read_text(tmp_path / "a") == CONTENT
    table = "before;after\r\n\u00e9.png;\u20ac.png\r\n"
    (tmp_path / "t.csv").write_bytes(mark + table.encode(encoding))
    assert list(read_table(tmp_path / "t.csv")) == [
        (f"{tmp_path / 't.csv'} line 2", {"before": "\u00e9.png", "after": "\u20ac.png"})]


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        pool.submit((tmp_path / "pipe").write_text, CONTENT, encoding="utf-8")
        assert [value["a"] for _, value in read_lines(tmp_path / "pipe")] == ["caf\u00e9", "\u20ac"]


@pytest.mark.parametrize(("encoding", "message"), [
    ("windows-1252", r"line 3: must be UTF-8, got byte 0xe9 .* convert it with: iconv -f WINDOWS-1252 -t UTF-8 "),
    ("utf-16-le", r"line 1: must be UTF-8, got a zero byte; if the file is UTF-16LE, .*: iconv -f UTF-16LE -t UTF-8 "),
    ("utf-16-be", r"line 1: must be UTF-8, got a zero byte; if the file is UTF-16BE, .*: iconv -f UTF-16BE -t UTF-8 "),
    ("utf-32", r"line 1: must be UTF-8, got UTF-32; convert it with: iconv -f UTF-32 -t UTF-8 "),
])
def test_another_encoding_is_refused_and_the_command_in_the_message_converts_the_file(
        encoding: str, message: str, tmp_path: Path) -> None:
    text = 'before,after\na.png,b.png\n"caf\u00e9 \u201cx\u201d",c.png\n'
    path = tmp_path / "my pairs.csv"
    path.write_bytes(text.encode(encoding))
    readers: tuple[Callable[[Path], Iterable[Any]], ...] = (read_table, read_lines, read_list)
    for read in readers:
        with pytest.raises(ValueError, match=message) as raised:
            list(read(path))
    command = str(raised.value).partition("convert it with: ")[2].partition("; otherwise")[0]
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    assert read_text(path) == text


def test_a_wrong_byte_far_behind_the_start_is_found_in_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\r\n" + 20_000 * b"one,two\r\n" + b"caf\xe9,x\r\n")
    with pytest.raises(ValueError, match="line 20002: must be UTF-8, got byte 0xe9"):
        list(read_table(path))
    path.write_bytes("a,b\nx,y\n".encode("utf-16") + b"\x00\xd8\x0a\x00")
    with pytest.raises(ValueError, match="line 3: must be UTF-16, as the start of the file says"):
        list(read_table(path))


def test_a_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    for read in (read_list, read_lines, read_table):
        with pytest.raises(IsADirectoryError, match="is a folder, but must be a file"):
            list(read(tmp_path))
