"""Scores that others published, from published.yaml. Needs only the packages of the light install."""

from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff.eval.protocols import PROTOCOLS

PUBLISHED = Path(__file__).with_name("published.yaml")


def published(benchmark: str) -> list[dict[str, Any]]:
    """The rows of a benchmark, best CIDEr first: `system`, metrics times 100, `source`, and where they hold
    `unreproduced`, `saw_test_items` and `floor` (no system's). Empty where nobody publishes numbers of the protocol.
    """
    return sorted(_published_rows().get(benchmark, []), key=lambda row: -float(row["CIDEr"]))


def doubts(row: dict[str, Any]) -> str:
    """Why a number is no clean comparison, in words."""
    reasons = {"unreproduced": "unreproduced", "saw_test_items": "may have trained on test items"}
    return ", ".join(words for mark, words in reasons.items() if row.get(mark))


@cache
def _published_rows() -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = YAML(typ="safe").load(PUBLISHED.read_text(encoding="utf-8"))
    assert set(rows) <= set(PROTOCOLS), f"{PUBLISHED} names a benchmark without protocol"
    return rows
