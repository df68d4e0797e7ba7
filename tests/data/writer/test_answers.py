"""Answers: what can be used is used, the rest has a reason, and what was appended stays in the file."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onediff.data.writer.answers import Answer, append, open_answers, parse, read_answers, read_completion, spent_usd
from onediff.data.writer.request import Request, max_tokens

GOOD = '{"differences": ["a dog\\n came", "the sky is grey"]}'


def completion(content: str | None, **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": changes.pop("refusal", None)}
    return {"model": "dated", "choices": [{"message": message, "finish_reason": changes.pop("finish", "stop")}],
            "usage": {"prompt_tokens": 101, "completion_tokens": 11}} | changes


@pytest.mark.parametrize("text", [GOOD, f"```json\n{GOOD}\n```", f" ```\n{GOOD}```\n"])
def test_an_answer_is_parsed_with_and_without_a_markdown_code_block(ask_about: Callable[[int], Request],
                                                                    text: str) -> None:
    answer = read_completion(ask_about(1), completion(text))
    assert answer is not None
    assert (answer.status, answer.reason, answer.text, answer.model) == ("ok", "", text, "dated")
    assert (answer.input_tokens, answer.output_tokens, answer.counted) == (101, 11, True)
    assert parse(answer.text, "differences") == {"differences": ["a dog came", "the sky is grey"]}


@pytest.mark.parametrize(("content", "changes", "status", "reason"), [
    ("I am sorry, I cannot", {}, "malformed", "not JSON: 'I am sorry"),
    ("[" * 100_000, {}, "malformed", "not JSON"),
    ('{"differences": "a"}', {}, "malformed", "differences: Input should be a valid list"),
    ('{"differences": []}', {}, "malformed", "must contain 1 to 5 sentences, got 0"),
    ('{"differences": ["a", "b", "c", "d", "e", "f"]}', {}, "malformed", "got 6"),
    ('{"differences": [" "]}', {}, "malformed", "must have 1 to 100 words, got 0"),
    (json.dumps({"differences": ["word " * 10_000]}), {}, "malformed", "must have 1 to 100 words, got 10000"),
    ('{"differences": ["a\\u0007b"]}', {}, "malformed", "control characters"),
    ('{"differences": ["a"], "note": "b"}', {}, "malformed", "note: Extra inputs"),
    ("[1]", {}, "malformed", "the answer: Input should be"),
    ("", {}, "malformed", "not JSON: ''"),
    (GOOD, {"finish": "length"}, "malformed", "cut off at data.writer.max_tokens 61"),
    (GOOD, {"finish": "content_filter"}, "refused", "content filter"),
    (None, {"refusal": "I will not"}, "refused", "the writer refused: 'I will not'"),
])
def test_an_unusable_answer_is_stored_with_the_reason(ask_about: Callable[[int], Request], content: str,
                                                      changes: dict[str, Any], status: str, reason: str) -> None:
    answer = read_completion(ask_about(1), completion(content, **changes))
    assert answer is not None
    assert answer.status == status
    assert reason in answer.reason
    assert answer.output_tokens == 11


@pytest.mark.parametrize("value", [{}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": 3},
                                   {"choices": [{"message": {"content": 3}}]}, {"error": {"message": "busy"}}])
def test_json_that_is_not_a_chat_completion_gives_no_answer(ask_about: Callable[[int], Request],
                                                            value: dict[str, Any]) -> None:
    assert read_completion(ask_about(1), value) is None


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "7", "completion_tokens": 1}, 3])
def test_missing_token_counts_are_replaced_by_the_upper_bound(ask_about: Callable[[int], Request], usage: Any) -> None:
    answer, bound = read_completion(ask_about(1), completion(GOOD, usage=usage)), max_tokens(ask_about(1))
    assert answer is not None
    assert (answer.counted, answer.input_tokens, answer.output_tokens) == (False, bound.input, bound.output)


def test_an_edit_needs_an_instruction_and_a_caption() -> None:
    assert parse('{"edit": "make it snow", "output": "snow"}', "edit") == {"edit": "make it snow", "output": "snow"}
    with pytest.raises(ValueError, match="output: Field required"):
        parse('{"edit": "make it snow"}', "edit")


ANSWER = Answer("k0", "ok", "", '{"differences": ["é \u2028"]}', "m", 101, 11, counted=True)


def numbered(number: int) -> Answer:
    return replace(ANSWER, key=f"k{number}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers/mine/write.jsonl"


def test_stored_answers_are_read_back_unchanged(path: Path) -> None:
    kept = [ANSWER, replace(ANSWER, key="k1", status="refused", reason="no", counted=False, lost=2)]
    for answer in kept:
        with open_answers(path) as file:
            append(answer, file, usd=0.25)
    assert read_answers(path) == {answer.key: answer for answer in kept}
    assert len(path.read_bytes().splitlines()) == 2
    assert spent_usd(path.parents[1]) == 0.5


def test_a_file_that_does_not_exist_has_no_answers(path: Path) -> None:
    assert read_answers(path) == {}
    assert spent_usd(path.parents[1]) == 0


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_an_incomplete_last_line_does_not_count_as_an_answer(path: Path, cut: int) -> None:
    with open_answers(path) as file:
        append(numbered(1), file, usd=0.5)
        append(numbered(2), file, usd=0.5)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert set(read_answers(path)) == {"k1"}
    assert spent_usd(path.parents[1]) == 0.5
    with open_answers(path) as file:
        assert set(read_answers(path)) == {"k1"}
        append(numbered(2), file, usd=0.5)
    assert set(read_answers(path)) == {"k1", "k2"}
    torn = json.loads(path.read_bytes().splitlines()[1])
    assert torn.keys() == {"torn"} and torn["torn"] and whole.splitlines()[1].decode().startswith(torn["torn"])


def test_a_broken_line_is_an_error_with_the_line_number(path: Path) -> None:
    with open_answers(path) as file:
        append(numbered(1), file, usd=0.5)
    path.write_bytes(path.read_bytes() + b"{broken\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"write.jsonl line 2: not a JSON object; restore the file with 'dvc checkout"):
        read_answers(path)
    path.write_bytes(b'{"key": "k"}\n')
    with pytest.raises(ValueError, match="line 1: missing keys: status, reason"):
        read_answers(path)


def test_only_one_run_can_open_an_answer_file(path: Path) -> None:
    with open_answers(path), pytest.raises(ValueError, match="another run is writing answers"), open_answers(path):
        pass
    with open_answers(path):
        pass


def test_a_full_disk_leaves_only_complete_lines(path: Path) -> None:
    with open_answers(path) as file:
        append(numbered(1), file, usd=0.5)
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            for number in (2, 3):
                with pytest.raises(OSError, match=r"an answer could not be stored .*; free disk space and run"):
                    append(numbered(number), file, usd=0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        append(numbered(2), file, usd=0.5)
    assert set(read_answers(path)) == {"k1", "k2"}
