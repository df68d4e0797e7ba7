"""May this data be used? One list of rules gives both the Great Expectations suite and the quarantine list.

GX caps its lists of failing values, so every bad pair is found here, and GX writes the report that people read.
"""

from __future__ import annotations

import html
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from onediff.config import SPLITS

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation

MIN_PX = 32
MAX_WORDS = 100
ASPECT = 1.02  # before and after may differ in size, not in shape; rounding is forgiven


@dataclass(frozen=True)
class Rule:
    """A column's values lie in `low` to `high`, are one of `allowed`, or occur once; missing values are passed over.

    A fatal rule stops the run at the first bad pair, the others when the share of bad pairs exceeds the tolerance.
    """

    column: str
    reason: str
    low: float | None = None
    high: float | None = None
    allowed: tuple[Any, ...] | None = None
    unique: bool = False
    fatal: bool = False


RULES = (
    Rule("decodes", "an image cannot be read", allowed=(True,)),
    Rule("pair_id", "pair_id occurs more than once", unique=True),
    Rule("num_missing", "pair_id, source, group_id or change_type is empty", high=0),
    Rule("split", f"split is none of {', '.join(SPLITS)}", allowed=SPLITS),
    Rule("smallest_px", f"an image is less than {MIN_PX} px wide or high", low=MIN_PX),
    Rule("aspect_ratio", "before and after differ in shape", low=1 / ASPECT, high=ASPECT),
    Rule("num_references", "no caption", low=1),
    Rule("num_empty_references", "an empty caption", high=0),
    Rule("max_words", f"a caption of more than {MAX_WORDS} words", high=MAX_WORDS),
    Rule("has_bad_text", "text that is not UTF-8 or holds control characters or line separators", allowed=(False,)),
    Rule("num_image_splits", "an image occurs in two splits", high=1, fatal=True),
    Rule("num_group_splits", "its group_id occurs in two splits", high=1, fatal=True),
)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The probe table with the columns that rules need and a probe of one pair cannot know."""
    table = table.copy()
    sizes = table[["width_before", "height_before", "width_after", "height_after"]].where(table["decodes"])
    table["smallest_px"] = sizes.min(axis=1)
    table["aspect_ratio"] = (
        sizes["width_before"] * sizes["height_after"] / (sizes["height_before"] * sizes["width_after"])
    )
    table["num_missing"] = (table[["pair_id", "source", "group_id", "change_type"]] == "").sum(axis=1)
    images = [_splits_of(table, ("hash_before", "hash_after"), column) for column in ("hash_before", "hash_after")]
    table["num_image_splits"] = pd.concat(images, axis=1).max(axis=1)
    table["num_group_splits"] = _splits_of(table, ("group_id",), "group_id")
    return table


def _splits_of(table: pd.DataFrame, columns: tuple[str, ...], column: str) -> pd.Series:
    """In how many splits each row's `column` occurs, looking for it in all `columns`; 0 where it is empty."""
    seen = pd.concat([pd.DataFrame({"value": table[name], "split": table["split"]}) for name in columns])
    counts = seen[seen["value"] != ""].groupby("value")["split"].nunique()
    return table[column].map(counts).fillna(0).astype(int)


def broken(rule: Rule, table: pd.DataFrame) -> pd.Series:
    """Which rows of a judged table break the rule."""
    values = table[rule.column]
    if rule.unique:
        return values.duplicated(keep=False)
    if rule.allowed is not None:
        return ~values.isin(rule.allowed)
    low, high = (-float("inf") if rule.low is None else rule.low), (float("inf") if rule.high is None else rule.high)
    return values.notna() & ~values.between(low, high)


def find_bad(table: pd.DataFrame) -> pd.DataFrame:
    """Every bad pair of a judged table: pair_id, source, split, reasons (one text), error (from reading its images)."""
    reasons = pd.Series([""] * len(table), index=table.index, dtype=object)
    for rule in RULES:
        bad = broken(rule, table)
        reasons[bad] = reasons[bad].map(lambda said, reason=rule.reason: f"{said}; {reason}" if said else reason)
    found = table.assign(reasons=reasons)
    return found.loc[reasons != "", ["pair_id", "source", "split", "reasons", "error"]].reset_index(drop=True)


def require(table: pd.DataFrame, bad: pd.DataFrame, *, tolerance: float, report: Path) -> None:
    """Raises ValueError if the judged table breaks a fatal rule, lacks a split or has too many bad pairs."""
    for rule in RULES:
        rows = table[broken(rule, table)]
        if rule.fatal and len(rows):
            raise ValueError(f"{len(rows)} pairs: {rule.reason} (first: {rows['pair_id'].iloc[0]}); see {report}")
    for split in SPLITS:
        if not (table["split"] == split).any():
            raise ValueError(f"no pair in split {split}; each of {', '.join(SPLITS)} needs some; see {report}")
    share = len(bad) / len(table)
    if share > tolerance:
        first = bad.iloc[0]
        raise ValueError(f"{len(bad)} of {len(table)} pairs are bad ({share:.2%}, tolerance {tolerance:.2%}; "
                         f"first: {first['pair_id']}: {first['reasons']}); see {report}")


# --- the report ---


def write_report(table: pd.DataFrame, bad: pd.DataFrame, folder: Path, *, tolerance: float) -> Path:
    """Great Expectations' page on a judged table as one file that needs no network; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = _offline(_data_docs(table), _summary(table, bad, tolerance=tolerance))
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def validate(table: pd.DataFrame) -> Any:
    """Great Expectations' own result for a judged table (an ExpectationSuiteValidationResult)."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("probe").add_dataframe_asset("pairs")
    batch = asset.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(gx.ExpectationSuite("pairs", expectations=[_expectation(rule) for rule in RULES]))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="pairs", data=batch, suite=suite))
    return definition.run(batch_parameters={"dataframe": table}, result_format="SUMMARY")


def _expectation(rule: Rule) -> Expectation:
    from great_expectations import expectations as gxe

    if rule.unique:
        return gxe.ExpectColumnValuesToBeUnique(column=rule.column)
    if rule.allowed is not None:
        return gxe.ExpectColumnValuesToBeInSet(column=rule.column, value_set=list(rule.allowed))
    return gxe.ExpectColumnValuesToBeBetween(column=rule.column, min_value=rule.low, max_value=rule.high)


def _data_docs(table: pd.DataFrame) -> str:
    result = validate(table)
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    return str(DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result)))


def _summary(table: pd.DataFrame, bad: pd.DataFrame, *, tolerance: float) -> str:
    rows = []
    for rule in RULES:
        found = table[broken(rule, table)]
        first = html.escape(str(found["pair_id"].iloc[0])) if len(found) else ""
        rows.append(f"<tr><td>{html.escape(rule.reason)}</td><td>{len(found)}</td><td>{first}</td></tr>")
    share = len(bad) / max(len(table), 1)
    return (f"<h1>Data validation</h1><p>{len(table)} pairs, {len(bad)} bad ({share:.2%}; tolerance {tolerance:.2%}). "
            "Each bad pair and why: data/quarantine.parquet.</p>"
            f"<table class='table'><tr><th>rule broken</th><th>pairs</th><th>first</th></tr>{''.join(rows)}</table>")


def _offline(page: str, summary: str) -> str:
    """The page without scripts and remote styles, which it loads from six hosts, and with a small style of its own."""
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.S)
    page = re.sub(r"<link\b[^>]*>", "", page)
    page = re.sub(r"<nav class=\"navbar navbar-expand.*?</nav>\s*</div>\s*</nav>", "", page, flags=re.S)
    page = re.sub(r"<footer\b.*?</footer>", "", page, flags=re.S)
    page = re.sub(r"<img\b[^>]*>", "", page)
    page = re.sub(r"url\((['\"]?)https?:[^)]*\)", "none", page)
    page = page.replace("</head>", f"<style>{_STYLE}</style></head>", 1)
    return re.sub(r"(<body\b[^>]*>)", lambda body: body.group(1) + summary, page, count=1)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1em }
th, td { border-bottom: 1px solid #ddd; padding: 4px 12px; text-align: left }
.badge { background: #eee; border-radius: 4px; padding: 0 6px } .text-danger, .fa-times { color: #b00020 }
.fa-check-circle, .text-success { color: #1a7f37 }
.fa-times::before { content: "\\2717" } .fa-check-circle::before { content: "\\2713" }
.alert { border-left: 4px solid #888; padding: 2px 12px; background: #f6f6f6 }
.sticky, .ge-breadcrumbs { display: none }
"""
