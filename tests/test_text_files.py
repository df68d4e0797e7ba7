from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from published_sets import BIRD_COLUMNS, bird_row, bird_table, put

from onediff import text_files
from onediff.data.sources.entries import part, sentences
from onediff.text_files import json_lines, read_json, read_lines, read_list, read_published_tsv, read_table


@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_json_list_read_in_chunks_equals_the_list_that_the_json_module_reads(
        indent: int | None, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    rng = random.Random(5)
    rows = [{"id": k, "text": 'a "b" \\ \u00e9\U0001f600\n,]}' * rng.randrange(3), "more": [k, {"x": [1.5e-3, None]}]}
            for k in range(23)]
    path = tmp_path / "rows.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
        assert [row for _, row in read_list(path)] == rows
    put(path, "\ufeff [ ]\n")
    assert list(read_list(path)) == []


@pytest.mark.parametrize(("text", "message"), [
    ("", r"line 1: not valid JSON \(a list \[...\] was expected, got ''\)"),
    ('{"a": 1}', "a list .* was expected"),
    ('[\n{"a": 1},\n{"a": }\n]', r"entry 2 \(line 3\): not valid JSON \(Expecting value\): .* download it again"),
    ('[{"a": 1},\n {"a": "cut', r"entry 2 \(line 2\): not valid JSON \(Unterminated string.*the file ends too early"),
    ('[{"a": 1},', r"entry 2 \(line 1\).*the file ends too early, so it is incomplete"),
    ('[{"a": 1}', r"',' or '\]' after entry 1 was expected, got ''"),
    ('[{"a": 1} {"a": 2}]', r"',' or '\]' after entry 1 was expected"),
    ("[\n\n3]", r"entry 1 \(line 3\): an object .* expected, got 3"),
])
def test_the_error_for_an_invalid_json_list_contains_file_entry_and_line(text: str, message: str,
                                                                         tmp_path: Path) -> None:
    path = put(tmp_path / "rows.json", text)
    with pytest.raises(ValueError, match=message) as raised:
        list(read_list(path))
    assert str(raised.value).startswith(str(path))


def test_the_error_for_invalid_json_contains_the_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        list(read_lines(put(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a"}\n')))
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_json(put(tmp_path / "a.json", "{\n3}"), dict)
    with pytest.raises(ValueError, match=r"an object \{...\} expected, got \[1\]; correct the file; download"):
        read_json(put(tmp_path / "b.json", "[1]"), dict)
    with pytest.raises(ValueError, match="there: 'b' is missing, got only a"):
        part({"a": 1}, "b", str, "there")
    with pytest.raises(ValueError, match="there, a: text expected, got 1"):
        part({"a": 1}, "a", str, "there")


def test_a_tsv_file_is_read_with_and_without_quotes(tmp_path: Path) -> None:
    texts = ['Animal 1 is brown. Animal 2 is "grey".', '"quoted", and so on', 'plain', '5" long', '"a" and "b"']
    path = tmp_path / "a.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([BIRD_COLUMNS, *([str(k)] * 10 + [text] for k, text in enumerate(texts))])
    assert [row["description"] for _, row in read_published_tsv(path, BIRD_COLUMNS)] == texts
    # Unlike the csv module, `bird_table` writes texts without quotes around them.
    put(path, bird_table([bird_row(k, "train", 1, text) for k, text in enumerate(texts)]))
    assert [row["description"] for _, row in read_published_tsv(path, BIRD_COLUMNS)] == texts


@pytest.mark.parametrize(("table", "message"), [
    (bird_table([bird_row(1, "train", 1, '"opened and never closed')]), "line 2, description: a quote is opened but"),
    (bird_table([bird_row(1, "train", 1, "fine"), "only\tthree\tcells"]),
     "line 3: 11 columns expected, got 3: a text contains a tab"),
    (bird_table([bird_row(1, "train", 1, "with a\ttab")]), "line 2: 11 columns expected, got 12"),
    ("a\tb\n1\t2\n", "line 1: the header must contain img1ObservationURL, .*, got only the columns a, b"),
])
def test_the_error_for_an_invalid_tsv_file_contains_the_line(table: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_published_tsv(put(tmp_path / "a.tsv", table), BIRD_COLUMNS))


@pytest.mark.parametrize(("table", "message"), [
    ("before,after\na,b,c\n", 'line 2: 2 columns expected, got 3: put a text that contains a comma into "quotes"'),
    ("before;after\na;b;c\n", "line 2: 2 columns expected, got 3: put a text that contains a semicolon"),
    ('before,after\na,b\n"a,b\nc,d\n', "line 3: wrong quotes"),
    ("before;after,c\n", "line 1: the columns must be separated by commas, by semicolons or by tabs, got a comma and"),
    ("before,Reference,reference\na,b,c\n", "line 1: the header contains column 'reference' twice"),
    (",before,after\n,a,b\n1,a,b\n", r"line 3: column 1 contains '1', but has no name .* to_csv\(index=False\)"),
])
def test_the_error_for_an_invalid_table_contains_the_line(table: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_table(put(tmp_path / "a.csv", table)))


@pytest.mark.parametrize("table", [
    "before,after\na.png,b b.png\n", "before;after\na.png;b b.png\n", "before\tafter\na.png\tb b.png\n",
    "Before, AFTER \na.png,b b.png", '"before","after"\r\n"a.png","b b.png"\r\n',
    "\n\nbefore,after\n\na.png,b b.png\n",
    "before,after,,\na.png,b b.png,,\n,,,\n,,,\n", "before;after;\n;;\na.png;b b.png; \n",
    '"before",after\ra.png,b b.png\r'])
def test_tables_as_spreadsheets_write_them_are_read(table: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(table.encode())
    [(place, row)] = read_table(path)
    assert row == {"before": "a.png", "after": "b b.png"}
    number = next(number for number, line in enumerate(table.splitlines(), 1) if "a.png" in line)
    assert place == f"{path} line {number}"


def test_a_json_object_with_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n')
    with pytest.raises(ValueError, match=r"line 2: not valid JSON .the key 'a' occurs twice in one object"):
        list(read_lines(path))
    put(path, '[{"b": 1},\n{"a": 1, "a": 2}]')
    with pytest.raises(ValueError, match=r"entry 2 \(line 2\): not valid JSON .the key 'a' occurs twice"):
        list(read_list(path))


def test_deep_nesting_and_endless_numbers_are_refused(tmp_path: Path) -> None:
    for text in ("[" * 200_000, '{"a": ' + "9" * 5000 + "}"):
        with pytest.raises(ValueError, match="line 1: not valid JSON"):
            list(json_lines(put(tmp_path / "a.jsonl", text)))


def test_spaces_in_sentences_are_normalized_and_empty_sentences_are_counted() -> None:
    assert sentences([" a\t b\n", "", "  ", "c"], "there") == (["a b", "c"], 2)
    assert sentences(["word " * 10_000], "there")[0][0].count(" ") == 9_999
    # Parquet stores text as UTF-8, which cannot represent half of a surrogate pair.
    assert sentences(["half \ud83d of it"], "there")[0] == ["half \ufffd of it"]
    with pytest.raises(ValueError, match="there: text expected, got 3"):
        sentences([3], "there")
