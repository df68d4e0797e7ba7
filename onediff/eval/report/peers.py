"""Read the scores that other papers published (published.yaml). Needs only the packages of `pip install .`."""

from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onediff.eval.protocols import PROTOCOLS

PUBLISHED = Path(__file__).with_name("published.yaml")


def published(benchmark: str) -> list[dict[str, Any]]:
    """Return the published scores of other systems on a benchmark, highest CIDEr first; an empty list if none exist.

    A row has `system`, `source` (of the score) and metrics times 100. It can have the marks `unreproduced`,
    `saw_test_items` and `floor`; `floor` means that the row is a trivial baseline or human captions, not a system.
    """
    return sorted(_published_rows().get(benchmark, []), key=lambda row: -float(row["CIDEr"]))


def doubts(row: dict[str, Any]) -> str:
    """Return the reasons why a published score may not be comparable with ours; an empty text if there are none."""
    reasons = {"unreproduced": "not reproduced by others", "saw_test_items": "may have trained on test items"}
    return ", ".join(words for mark, words in reasons.items() if row.get(mark))


@cache
def _published_rows() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of published.yaml as {benchmark: rows}."""
    rows: dict[str, list[dict[str, Any]]] = YAML(typ="safe").load(PUBLISHED.read_text(encoding="utf-8"))
    assert set(rows) <= set(PROTOCOLS), f"{PUBLISHED}: no protocol for {set(rows) - set(PROTOCOLS)}"
    return rows
