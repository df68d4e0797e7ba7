"""Tables as people and programs write them: each is read rightly or refused with its line, and none is misread."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from onediff.data.sources.published import PublishedPair, open_files
from onediff.data.sources.readers.folder import read

LETTERS = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="|")
SENTENCES = st.one_of(
    st.text(LETTERS, min_size=1, max_size=12),
    st.sampled_from(['the "red" cup', "a, b; c\td", '"', "'", "café \N{EURO SIGN}5", "=1+1", "1.5", "<image>", "#x",
                     "null", "line\nbreak", "wide\r\nbreak", " a  b ", "ÿþ", "﻿x"])
).filter(lambda text: bool(text.strip()))
IDS = st.one_of(st.just(""), st.integers(0, 3), st.sampled_from(["x", "7", "a b", "é"]))
SPLITS = st.sampled_from(["", "train", "val", "gate", "test", "validation"])


@dataclass(frozen=True)
class Table:
    """A table as a program writes it: its rows, its bytes, and whether its encoding and its quotes are right."""

    rows: list[dict[str, Any]]
    name: str
    content: bytes
    is_right: bool


@st.composite
def tables(draw: st.DrawFn) -> Table:
    names = [f"{name}.png" for name in ("a", "b", "é", "c d")]
    columns = ["before", "after", "references"]
    columns += draw(st.lists(st.sampled_from(["split", "group", "pair_id", "change_type"]), unique=True, max_size=3))
    values = {"before": st.sampled_from(names), "after": st.sampled_from(names), "references": SENTENCES,
              "split": SPLITS, "group": IDS, "pair_id": IDS, "change_type": st.sampled_from(["", "none", "move"])}
    rows = draw(st.lists(st.fixed_dictionaries({name: values[name] for name in columns}), min_size=1, max_size=5))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    if draw(st.booleans()):
        name, text, has_right_quotes = "pairs.jsonl", _json_lines(draw, rows, end), True
    else:
        name, (text, has_right_quotes) = "pairs.csv", _csv(draw, rows, columns, end)
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32"]))
    if encoding == "latin-1" and not text.isascii():
        assume(max(text) < "\u0100")
        content = text.encode("latin-1")
        with contextlib.suppress(UnicodeDecodeError):
            assume(content.decode("utf-8") is None)  # Text in Latin-1 that is also valid UTF-8 cannot be told apart.
        return Table(rows, name, content, False)
    return Table(rows, name, text.encode(encoding),
                 has_right_quotes and encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"))


def _json_lines(draw: st.DrawFn, rows: list[dict[str, Any]], end: str) -> str:
    as_list, escaped = draw(st.booleans()), draw(st.booleans())
    lines = [json.dumps({key: [value] if key == "references" and as_list else value for key, value in row.items()},
                        ensure_ascii=escaped) for row in rows]
    return end.join([*lines, *draw(st.lists(st.just(""), max_size=2))])


def _csv(draw: st.DrawFn, rows: list[dict[str, Any]], columns: list[str], end: str) -> tuple[str, bool]:
    """Return the text of a table, and whether its quotes are right."""
    separator = draw(st.sampled_from([",", ";", "\t"]))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    style = draw(st.sampled_from([str, str.upper, str.title]))
    empty = draw(st.integers(0, 2))
    table = [[style(name) for name in columns] + [""] * empty]
    table += [[str(row[name]) for name in columns] + [""] * empty for row in rows]
    table += [[""] * len(table[0])] * draw(st.integers(0, 2))
    texts = [row["references"] for row in rows]
    if draw(st.integers(0, 4)) == 0 and not any(text.startswith('"') for text in texts):
        # A program that joins cells without quotes makes tables that must be refused if a text contains a separator.
        return end.join(separator.join(cells) for cells in table), not re.search(r"[\r\n,;\t]", "".join(texts))
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end).writerows(table)
    return file.getvalue(), quoting == csv.QUOTE_ALL or not re.search(r"[\r\n]", "".join(texts))


def expected(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Return the references of each pair of images, in order."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        pairs.setdefault((row["before"], row["after"]), []).append(" ".join(row["references"].split()))
    return pairs


def contradicts(rows: list[dict[str, Any]]) -> bool:
    """Return whether rows of one pair have different values, or two pairs have one pair_id."""
    values: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in rows:
        pair = values.setdefault((row["before"], row["after"]), {})
        for name in ("split", "group", "pair_id", "change_type"):
            value = str(row.get(name, "")).replace("validation", "val")
            pair.setdefault(name, set()).update([value] if value else [])
    ids = [next(iter(pair["pair_id"])) for pair in values.values() if pair["pair_id"]]
    return len(ids) > len(set(ids)) or any(len(found) > 1 for pair in values.values() for found in pair.values())


def check(table: Table) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine" / table.name
        path.parent.mkdir()
        path.write_bytes(table.content)
        try:
            pairs = list(read(open_files(path.parent, Path(folder) / "scratch")))
        except ValueError as error:
            message = str(error)
            assert f"{path} line " in message or f"{path}: " in message, message
            assert "\n" not in message and len(message) > len(str(path)) + 20
            if table.is_right and not contradicts(table.rows):
                raise  # Nothing is wrong with this table.
            return
    assert {pair.names: pair.references for pair in pairs} == expected(table.rows), "the table was misread"
    assert not contradicts(table.rows), "a contradiction must be refused"
    check_values(table.rows, pairs)


def check_values(rows: list[dict[str, Any]], pairs: list[PublishedPair]) -> None:
    by_images = {pair.names: pair for pair in pairs}
    for row in rows:
        pair = by_images[row["before"], row["after"]]
        for name, value in (("official_id", row.get("pair_id", "")), ("group", row.get("group", "")),
                            ("change_type", row.get("change_type", "")), ("split", row.get("split", ""))):
            if value != "":
                assert getattr(pair, name) == str(value).replace("validation", "val")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tables())
def test_a_table_is_read_rightly_or_refused_with_its_line(table: Table) -> None:
    check(table)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(tables())
def test_many_tables_are_read_rightly_or_refused_with_their_line(table: Table) -> None:
    check(table)
