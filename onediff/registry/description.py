"""The description of a registered version, which MLflow's page shows as Markdown: the model card, shortened."""

import json
from datetime import UTC, datetime
from pathlib import Path

LIMIT = 5000  # largest number of characters that MLflow stores for a description
FIRST = ("Scores", "Limits")  # sections of the model card that a shortened description must contain
_SHORTENED = "\n\nThe complete model card is the file README.md of this version's model."
_NOTE = "> **Scored again**"


def describe(carried: Path) -> str:
    """Return the description of a registered version: the text of the model card README.md in `carried`, shortened.

    The YAML header of the card is left out. If the text is longer than MLflow allows, it keeps the introduction, the
    sections in FIRST and each other section that fits, in the order of the card. Returns "" without a model card.
    """
    card = carried / "README.md"
    if not card.exists():
        return ""
    text = card.read_text(encoding="utf-8")
    body = text.partition("\n---\n")[2] if text.startswith("---\n") else text
    introduction, *sections = body.strip().split("\n## ")
    room = LIMIT - len(_SHORTENED) - len(introduction)
    kept: set[int] = set()
    for number in sorted(range(len(sections)), key=lambda number: not sections[number].startswith(FIRST)):
        if (length := len(sections[number]) + len("\n## ")) <= room:
            kept.add(number)
            room -= length
    text = "\n## ".join([introduction, *(section for number, section in enumerate(sections) if number in kept)])
    return (text if len(kept) == len(sections) else text.rstrip() + _SHORTENED)[:LIMIT]


def scored_again(description: str, gate_scores: str) -> str:
    """Return the new description of a registered version whose scores were replaced: its old one below a note.

    The note has the date and the new scores. `gate_scores` is a JSON text with the main scores of the `gate` split,
    such as {"scenes.CIDEr": 3.1}.
    """
    if description.startswith(_NOTE):
        description = description.partition("\n\n")[2]
    scores = ", ".join(f"{path} {value:g}" for path, value in json.loads(gate_scores).items())
    note = (f"{_NOTE} on {datetime.now(UTC):%Y-%m-%d}; the model card below has the earlier scores. Split gate now: "
            f"{scores}.")
    return f"{note}\n\n{description}"[:LIMIT]
