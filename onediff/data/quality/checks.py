"""Decide which pairs are bad and whether the data may be used at all.

Each suite is one list of rules. Great Expectations shortens its lists of failing values, so this module applies the
rules itself to find every bad pair for the quarantine list. Great Expectations then checks equal rules and writes a
part of the validation page.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from onediff.config import Data
from onediff.data.quality.checks_page import offline, page, read_bad_pairs
from onediff.data.record import SPLITS
from onediff.files import write_text

MIN_PX = 32
MAX_WORDS = {"generated": 100, "raw": 500}  # Captions of the published source Birds-to-Words are paragraphs.
# The aspect ratios of the two images of a pair may differ by 2 %, because resizing rounds sizes to whole pixels. Width
# and height may be exchanged, because a picture may be rotated by a quarter turn.
ASPECT = 1.02
NUM_NAMED = 20  # number of pairs with control words that the validation page names
NUM_SHOWN = 4  # number of bad pairs per rule whose images the validation page shows


@dataclass(frozen=True)
class Rule:
    """A rule for one column of the probe table: values must be between `low` and `high`, or one of `allowed`.

    Missing values (NaN) satisfy a rule with bounds. `reason` describes the problem of a pair that breaks the rule. If
    the rule is fatal, one pair that breaks it stops the run. Pairs that break other rules are bad pairs, and the run
    stops only if the share of bad pairs exceeds the tolerance.
    """

    column: str
    reason: str
    low: float | None = None
    high: float | None = None
    allowed: tuple[Any, ...] | None = None
    fatal: bool = False


_MISSING = Rule("num_missing_images", "an image is missing", high=0)
_COMMON = (
    Rule("readable", "an image cannot be read", allowed=(True,)),
    _MISSING,
    Rule("num_images", "the number of images is not 0, 1 or 2", low=0, high=2),
    Rule("num_same_id", "pair_id occurs more than once", high=1),
    Rule("num_missing", "pair_id, source, group_id or change_type is empty", high=0),
    Rule("split", f"the split is not one of {', '.join(SPLITS)}", allowed=SPLITS),
    Rule("smallest_px", f"an image is less than {MIN_PX} px wide or high", low=MIN_PX),
    Rule("num_references", "no caption", low=1),
    Rule("num_empty_references", "an empty caption", high=0),
    Rule("has_bad_text", "text that is not UTF-8 or contains control characters or line separators", allowed=(False,)),
)
_WORDS = {suite: Rule("num_words", f"a caption of more than {most} words", high=most)
          for suite, most in MAX_WORDS.items()}
_SHAPES = Rule("aspect_ratio", "the two images differ in aspect ratio", low=1 / ASPECT, high=ASPECT)
_APART = (
    Rule("num_image_splits", "an image occurs in two splits", high=1, fatal=True),
    Rule("num_group_splits", "the group_id occurs in two splits", high=1, fatal=True),
)
# The suite "raw" has no rule for shapes, because the two photographs of a published pair may differ in aspect ratio.
# The suite "raw" accepts an image in two splits, because data.leaks decides what happens to such published pairs.
SUITES = {
    "generated": (*_COMMON, _WORDS["generated"], _SHAPES, *_APART),
    "raw": (*_COMMON, _WORDS["raw"]),
    "diffcap": (*_COMMON, _WORDS["raw"], *_APART),
}


@dataclass(frozen=True)
class SuiteResult:
    """The result of one suite of rules: all rows of the probe table that were checked, and the bad ones.

    The index of `rows`, `bad` and `excused` is the position of the pair in all shards. `bad` has the columns pair_id,
    source, split, suite, reasons (one text) and error (the error that reading the images raised). `excused` is True
    for bad pairs that do not count against the tolerance: pairs of sources in data.partial that only lack an image.
    """

    suite: str
    rows: pd.DataFrame
    bad: pd.DataFrame
    excused: pd.Series
    tolerance: float

    @property
    def share(self) -> float:
        """The share of bad pairs that count against the tolerance, 0 to 1."""
        return (len(self.bad) - int(self.excused.sum())) / max(len(self.rows), 1)


def suites_of(table: pd.DataFrame, data: Data) -> pd.Series:
    """Return the suite of each row: "generated" for the sources in data.generated and data.diffused, otherwise "raw".

    `table` is the probe table.
    """
    generated = table["listed_as"].isin([*data.generated, *data.diffused])
    return pd.Series(np.where(generated, "generated", "raw"), index=table.index, dtype=object)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of measurements of all pairs, with the additional columns that the validation rules need.

    The additional columns, such as num_same_id, need all pairs: they count repeated pair_ids and the splits in which
    an image occurs. `table` must have the column `suite`.
    """
    images = table["decodes"] & (table["num_images"] > 0)
    sizes = table[["width_before", "height_before", "width_after", "height_after"]].astype("float64")
    sizes = sizes.where(images).replace(0, np.nan)
    before, after = (sizes[f"width_{side}"] / sizes[f"height_{side}"] for side in ("before", "after"))
    straight, turned = before / after, before * after
    texts = table[["pair_id", "source", "group_id", "change_type"]]
    return table.assign(
        readable=table["decodes"] | (table["num_missing_images"] > 0),
        smallest_px=sizes.min(axis=1),
        aspect_ratio=straight.where(np.log(straight).abs() <= np.log(turned).abs(), turned),
        num_words=table["max_words"].where(table["num_images"] > 1),
        num_missing=(texts == "").sum(axis=1),
        num_same_id=table["pair_id"].map(table["pair_id"].value_counts()).astype("int64"),
        num_image_splits=_num_splits(table, "hash_before", "hash_after").max(axis=1),
        num_group_splits=_num_splits(table, "group_id")["group_id"],
    )


def _num_splits(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return for each value of the given columns the number of splits that contain this value in any of the columns.

    Only splits of the row's own suite count. Empty values get 0.
    """
    values = pd.concat([table["suite"] + "\0" + table[name] for name in columns], ignore_index=True)
    present = np.concatenate([(table[name] != "").to_numpy() for name in columns])
    codes, kinds = pd.factorize(values)
    splits, names = pd.factorize(table["split"])
    seen = np.zeros((len(kinds), len(names)), dtype=bool)
    seen[codes[present], np.tile(splits, len(columns))[present]] = True
    counts = seen.sum(axis=1)[codes].reshape(len(columns), len(table)).T
    return pd.DataFrame(counts, columns=list(columns), index=table.index)


def broken(rule: Rule, table: pd.DataFrame) -> pd.Series:
    """Return a Boolean for each row of `table`, True if the row breaks the rule. `table` is the result of judged()."""
    values = table[rule.column]
    if rule.allowed is not None:
        return ~values.isin(rule.allowed)
    low, high = (-np.inf if rule.low is None else rule.low), (np.inf if rule.high is None else rule.high)
    return (values < low) | (values > high)


def check_suite(suite: str, table: pd.DataFrame, *, tolerance: float, partial: tuple[str, ...] = ()) -> SuiteResult:
    """Apply all rules of one suite to the rows of this suite, and return the rows and the bad pairs.

    `table` is the result of judged(). `partial` lists the sources whose pairs may lack an image.
    """
    rows = table[table["suite"] == suite]
    reasons = pd.Series([""] * len(rows), index=rows.index, dtype=object)
    for rule in SUITES[suite]:
        reasons += np.where(broken(rule, rows), f"; {rule.reason}", "")
    bad = rows.assign(reasons=reasons.str.removeprefix("; "))[reasons != ""]
    excused = (bad["reasons"] == _MISSING.reason) & bad["listed_as"].isin(list(partial))
    columns = ["pair_id", "source", "split", "suite", "reasons", "error"]
    return SuiteResult(suite, rows, bad[columns], excused, tolerance)


def complaints(all_checked: list[SuiteResult], *, whole: tuple[str, ...] = ()) -> list[str]:
    """Return the reasons why the data may not be used, one line each, or an empty list if the data may be used.

    `whole` lists the sources whose test split must be complete, so that scores are comparable with published scores.
    """
    splits = {split for checked in all_checked for split in checked.rows["split"].unique()}
    lines = [f"no pair in split {split}; each of {', '.join(SPLITS)} needs at least one"
             for split in SPLITS if split not in splits]
    for checked in all_checked:
        for rule in SUITES[checked.suite]:
            rows = checked.rows[broken(rule, checked.rows)]
            if rule.fatal and len(rows):
                lines.append(f"{len(rows)} pairs: {rule.reason} (first: {rows['pair_id'].iloc[0]})")
        tests = checked.bad[checked.bad["split"] == "test"]
        for source, bad in tests.groupby(checked.rows.loc[tests.index, "listed_as"]):
            if source in whole:
                count = "1 test pair is" if len(bad) == 1 else f"{len(bad)} test pairs are"
                lines.append(f"{source}: {count} bad (first: {_first(bad)}), but the test split of a published "
                             f"source must be complete: fix data/raw/{source}, or add {source} to data.partial")
        counted = checked.bad[~checked.excused]
        if checked.share > checked.tolerance:
            lines.append(f"{len(counted)} of {len(checked.rows)} {checked.suite} pairs are bad ({checked.share:.2%}, "
                         f"tolerance {checked.tolerance:.2%}; first: {_first(counted)})")
    return lines


def _first(bad: pd.DataFrame) -> str:
    """Return a text about the first bad pair: pair_id, reasons, and the error if its images could not be read."""
    pair_id, reasons, error = bad[["pair_id", "reasons", "error"]].iloc[0]
    return f"{pair_id}: {reasons}" + (f" ({error})" if error else "")


def write_report(all_checked: list[SuiteResult], folder: Path, *, shard_folders: list[Path],
                 whole: tuple[str, ...] = ()) -> None:
    """Write folder/index.html, the validation page: the results of all suites, with images of bad pairs.

    `shard_folders` lists the folders of the shards, in the order in which the probe read them. `whole` lists the
    sources whose test split must be complete.

    Raises ValueError if the shards changed after the probe. If the data may not be used, raises ValueError with all
    reasons after the page is written.
    """
    lines = complaints(all_checked, whole=whole)
    parts = [_part(checked) for checked in all_checked if len(checked.rows)]
    pair_ids = {position: row["pair_id"]
                for part in parts for rule in part["rules"] for position, row in rule["shown"]}
    path = folder / "index.html"
    write_text(path, page(parts, lines, read_bad_pairs(shard_folders, pair_ids)))
    if lines:
        raise ValueError("\n".join(f"{line}; see {path}" for line in lines))


def _part(checked: SuiteResult) -> dict[str, Any]:
    """Return the values that the template of the validation page needs for one suite of rules."""
    result = validate(checked)
    from great_expectations.render import renderer, view

    document = renderer.ValidationResultsPageRenderer().render(result)
    rules = []
    for rule in SUITES[checked.suite]:
        positions = checked.rows.index[broken(rule, checked.rows)]
        shown = checked.bad.loc[positions[:NUM_SHOWN]].to_dict("index")
        rules.append({"reason": rule.reason, "fatal": rule.fatal, "count": len(positions),
                      "shown": list(shown.items())})
    languages = checked.rows.loc[checked.rows["language"] != "", ["listed_as", "language"]].value_counts().sort_index()
    named = checked.rows.loc[checked.rows["control_words"] != "", ["pair_id", "control_words"]]
    control_words = named.to_numpy().tolist()
    is_bad = checked.rows.index.isin(checked.bad.index)
    counts = checked.rows.assign(bad=is_bad).groupby(["listed_as", "split"])["bad"].agg(["size", "sum"]).reset_index()
    order = {split: number for number, split in enumerate(SPLITS)}
    by_split = sorted(counts.to_numpy().tolist(), key=lambda row: (row[0], order.get(row[1], len(order)), row[1]))
    return {
        "suite": checked.suite, "tolerance": checked.tolerance, "share": checked.share, "num_pairs": len(checked.rows),
        "num_bad": len(checked.bad), "num_excused": int(checked.excused.sum()), "rules": rules,
        "counts": by_split, "num_control_words": len(control_words), "control_words": control_words[:NUM_NAMED],
        "languages": languages.reset_index().to_numpy().tolist(),
        "expectations": offline(view.DefaultJinjaPageView().render(document)),
    }


def validate(checked: SuiteResult) -> Any:
    """Check the rules of a suite with Great Expectations and return its ExpectationSuiteValidationResult."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # Great Expectations sends usage statistics unless this is set.
    import great_expectations as gx

    rules = SUITES[checked.suite]
    expectations = [
        gx.expectations.ExpectColumnValuesToBeBetween(column=rule.column, min_value=rule.low, max_value=rule.high)
        if rule.allowed is None
        else gx.expectations.ExpectColumnValuesToBeInSet(column=rule.column, value_set=list(rule.allowed))
        for rule in rules]
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("probe").add_dataframe_asset("pairs")
    batch = asset.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(gx.ExpectationSuite(checked.suite, expectations=expectations))
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=checked.suite, data=batch, suite=suite))
    columns = checked.rows[[rule.column for rule in rules]]
    return definition.run(batch_parameters={"dataframe": columns}, result_format="SUMMARY")


