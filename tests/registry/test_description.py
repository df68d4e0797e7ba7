"""Tests of the description of a version in MLflow, which is made from the model card."""

from __future__ import annotations

from pathlib import Path

from registered import REPO

from onediff.registry.description import FIRST, LIMIT, describe

CARD = "---\nlanguage: en\n---\n\n# OneDiff\n\nTwo images.\n\n## Data\n\n{data}\n\n## Scores\n\n1\n\n## Limits\n\n2\n"


def test_the_description_is_the_model_card_without_its_front_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.format(data="many"))
    assert describe(tmp_path) == CARD.format(data="many").split("---\n")[2].strip()


def test_a_long_card_keeps_scores_and_limits_and_refers_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.format(data="x" * LIMIT))
    text = describe(tmp_path)
    assert text.startswith("# OneDiff\n\nTwo images.\n\n## Scores\n\n1\n\n## Limits\n\n2\n\nThe complete model card is")
    assert len(text) <= LIMIT and "## Data" not in text


def test_a_very_long_introduction_is_cut_at_the_limit_of_mlflow(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x" * 2 * LIMIT)
    assert len(describe(tmp_path)) == LIMIT


def test_without_a_model_card_there_is_no_description(tmp_path: Path) -> None:
    assert describe(tmp_path) == ""


def test_the_template_of_the_model_card_has_the_sections_that_come_first() -> None:
    template = (REPO / "onediff/serve/card.md.j2").read_text()
    assert all(f"\n## {heading}\n" in template for heading in FIRST)
