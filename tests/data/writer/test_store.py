"""Answers on disk: what was appended is there, whatever happens in between."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from onediff.data.writer.answer import Answer
from onediff.data.writer.store import Store, read_answers, spent_usd

ANSWER = Answer("k0", "ok", "", '{"differences": ["é \u2028"]}', "m", 101, 11, counted=True)


def numbered(number: int) -> Answer:
    return replace(ANSWER, key=f"k{number}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers/mine/write.jsonl"


def test_answers_come_back_as_they_were(path: Path) -> None:
    kept = [ANSWER, replace(ANSWER, key="k1", status="refused", reason="no", counted=False, lost=2)]
    for answer in kept:
        with Store(path) as store:
            store.append(answer, usd=0.25)
    assert read_answers(path) == {answer.key: answer for answer in kept}
    assert len(path.read_bytes().splitlines()) == 2
    assert spent_usd(path.parents[1]) == 0.5


def test_no_file_is_no_answer(path: Path) -> None:
    assert read_answers(path) == {}
    assert spent_usd(path.parents[1]) == 0


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_a_torn_last_line_is_set_aside_and_asked_again(path: Path, cut: int) -> None:
    with Store(path) as store:
        store.append(numbered(1), usd=0.5)
        store.append(numbered(2), usd=0.5)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert set(read_answers(path)) == {"k1"}
    assert spent_usd(path.parents[1]) == 0.5
    with Store(path) as store:
        assert set(store.answers) == {"k1"}
        assert store.torn == whole.splitlines()[1].decode()[: len(store.torn)] != ""
        store.append(numbered(2), usd=0.5)
    assert set(read_answers(path)) == {"k1", "k2"}
    assert [list(json.loads(line)) for line in path.read_bytes().splitlines()][1] == ["torn"]


def test_a_broken_line_inside_is_an_error_with_its_number(path: Path) -> None:
    with Store(path) as store:
        store.append(numbered(1), usd=0.5)
    path.write_bytes(path.read_bytes() + b"{broken\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"write.jsonl line 2: not a JSON object; fetch the file again"):
        Store(path)
    path.write_bytes(b'{"key": "k"}\n')
    with pytest.raises(ValueError, match="line 1: lacks status, reason"):
        read_answers(path)


def test_only_one_run_asks_at_a_time(path: Path) -> None:
    with Store(path), pytest.raises(ValueError, match="another run is asking"):
        Store(path)
    with Store(path):
        pass


def test_a_full_disk_leaves_whole_lines(path: Path) -> None:
    with Store(path) as store:
        store.append(numbered(1), usd=0.5)
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            for number in (2, 3):
                with pytest.raises(OSError, match=r"an answer could not be kept .*; make room and run again"):
                    store.append(numbered(number), usd=0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        store.append(numbered(2), usd=0.5)
    assert set(read_answers(path)) == {"k1", "k2"}
