"""May this data be used? One list of rules per suite gives both Great Expectations' suite and the quarantine list.

GX caps its lists of failing values, so every bad pair is found here, and GX writes a part of the page for people.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from onediff.config import Data
from onediff.data.quality.checks_page import offline, page, read_offenders
from onediff.data.record import SPLITS
from onediff.files import write_text

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation

MIN_PX = 32
MAX_WORDS = {"generated": 100, "raw": 500}  # people write paragraphs about two birds
ASPECT = 1.02  # before and after may differ in size, not in shape; rounding is forgiven
NUM_SHOWN = 4  # offenders of a rule whose images the page shows


@dataclass(frozen=True)
class Rule:
    """A column's values lie in `low` to `high`, or are one of `allowed`; missing values are passed over.

    A fatal rule stops the run at the first bad pair, the others when the share of bad pairs exceeds the tolerance.
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
    Rule("num_images", "neither two images, nor one, nor none", low=0, high=2),
    Rule("num_same_id", "pair_id occurs more than once", high=1),
    Rule("num_missing", "pair_id, source, group_id or change_type is empty", high=0),
    Rule("split", f"split is none of {', '.join(SPLITS)}", allowed=SPLITS),
    Rule("smallest_px", f"an image is less than {MIN_PX} px wide or high", low=MIN_PX),
    Rule("num_references", "no caption", low=1),
    Rule("num_empty_references", "an empty caption", high=0),
    Rule("has_bad_text", "text that is not UTF-8 or holds control characters or line separators", allowed=(False,)),
)
_WORDS = {suite: Rule("num_words", f"a caption of more than {most} words", high=most)
          for suite, most in MAX_WORDS.items()}
_SHAPES = Rule("aspect_ratio", "before and after differ in shape", low=1 / ASPECT, high=ASPECT)
_APART = (
    Rule("num_image_splits", "an image occurs in two splits", high=1, fatal=True),
    Rule("num_group_splits", "its group_id occurs in two splits", high=1, fatal=True),
)
# Published photographs come in any shape, and published splits overlap: what becomes of those, data.leaks decides.
SUITES = {
    "generated": (*_COMMON, _WORDS["generated"], _SHAPES, *_APART),
    "raw": (*_COMMON, _WORDS["raw"]),
    "diffcap": (*_COMMON, _WORDS["raw"], *_APART),
}


@dataclass(frozen=True)
class Checked:
    """A suite's verdict: its judged rows, labelled by their place in the shards, and which of them are bad.

    `bad`: pair_id, source, split, suite, reasons (one text), error (from reading its images), labelled as the rows.
    `excused` are bad pairs that count against no tolerance: the missing images of a source in data.partial.
    """

    suite: str
    rows: pd.DataFrame
    bad: pd.DataFrame
    excused: pd.Series
    tolerance: float

    @property
    def share(self) -> float:
        return (len(self.bad) - int(self.excused.sum())) / max(len(self.rows), 1)


def suites_of(table: pd.DataFrame, data: Data) -> pd.Series:
    """Each row's suite: edited by a diffusion model is generated too; published, retrieved and own pairs are raw."""
    generated = table["listed_as"].isin([*data.generated, *data.diffused])
    return pd.Series(np.where(generated, "generated", "raw"), index=table.index, dtype=object)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The probe table, with its column `suite`, and the columns that rules need and a probe of one pair cannot know."""
    images = table["decodes"] & (table["num_images"] > 0)
    sides = {side: table[[f"width_{side}", f"height_{side}"]].where(images).replace(0, np.nan).astype("float64")
             for side in ("before", "after")}
    before, after = sides["before"], sides["after"]
    texts = table[["pair_id", "source", "group_id", "change_type"]]
    return table.assign(
        readable=table["decodes"] | (table["num_missing_images"] > 0),
        smallest_px=pd.concat([before, after], axis=1).min(axis=1),
        aspect_ratio=before["width_before"] * after["height_after"] / (before["height_before"] * after["width_after"]),
        num_words=table["max_words"].where(table["num_images"] > 1),
        num_missing=(texts == "").sum(axis=1),
        num_same_id=table["pair_id"].map(table["pair_id"].value_counts()).astype("int64"),
        num_image_splits=pd.concat([_num_splits(table, "hash_before", "hash_after")[name]
                                    for name in ("hash_before", "hash_after")], axis=1).max(axis=1),
        num_group_splits=_num_splits(table, "group_id")["group_id"],
    )


def _num_splits(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """In how many splits of its suite each value occurs, in whichever of the columns; 0 where it is empty."""
    values = pd.concat([table["suite"] + "\0" + table[name] for name in columns], ignore_index=True)
    given = np.concatenate([(table[name] != "").to_numpy() for name in columns])
    codes, kinds = pd.factorize(values)
    splits, names = pd.factorize(table["split"])
    seen = np.zeros((len(kinds), len(names)), dtype=bool)
    seen[codes[given], np.tile(splits, len(columns))[given]] = True
    counts = seen.sum(axis=1)[codes].reshape(len(columns), len(table)).T
    return pd.DataFrame(counts, columns=list(columns), index=table.index)


def broken(rule: Rule, table: pd.DataFrame) -> pd.Series:
    """Which rows of a judged table break the rule."""
    values = table[rule.column]
    if rule.allowed is not None:
        return ~values.isin(rule.allowed)
    low, high = (-float("inf") if rule.low is None else rule.low), (float("inf") if rule.high is None else rule.high)
    return values.notna() & ~values.between(low, high)


def check_suite(suite: str, table: pd.DataFrame, *, tolerance: float, partial: tuple[str, ...] = ()) -> Checked:
    """The verdict on a judged table's rows of the suite; `partial`: sources that may lack images."""
    rows = table[table["suite"] == suite]
    reasons = pd.Series([""] * len(rows), index=rows.index, dtype=object)
    for rule in SUITES[suite]:
        wrong = broken(rule, rows)
        reasons[wrong] = reasons[wrong].map(lambda said, reason=rule.reason: f"{said}; {reason}" if said else reason)
    bad = rows.assign(reasons=reasons).loc[reasons != "", ["pair_id", "source", "split", "suite", "reasons", "error"]]
    excused = (bad["reasons"] == _MISSING.reason) & rows.loc[bad.index, "listed_as"].isin(list(partial))
    return Checked(suite, rows, bad, excused, tolerance)


# --- going on or stopping ---------------------------------------------------------------------------------------------


def complaints(all_checked: list[Checked], *, whole: tuple[str, ...] = ()) -> list[str]:
    """Why the data may not be used, a line each; `whole`: sources whose test split must not lose a pair."""
    splits = {split for checked in all_checked for split in checked.rows["split"].unique()}
    found = [f"no pair in split {split}; each of {', '.join(SPLITS)} needs some"
             for split in SPLITS if split not in splits]
    for checked in all_checked:
        found += [*_fatal(checked), *_shrunk(checked, whole), *_too_many(checked)]
    return found


def refuse(found: list[str], *, report: Path) -> None:
    """Raises ValueError if there is any complaint."""
    if found:
        raise ValueError("\n".join(f"{complaint}; see {report}" for complaint in found))


def _fatal(checked: Checked) -> Iterator[str]:
    for rule in SUITES[checked.suite]:
        rows = checked.rows[broken(rule, checked.rows)] if rule.fatal else checked.rows.iloc[:0]
        if len(rows):
            yield f"{len(rows)} pairs: {rule.reason} (first: {rows['pair_id'].iloc[0]})"


def _shrunk(checked: Checked, whole: tuple[str, ...]) -> Iterator[str]:
    tests = checked.bad[checked.bad["split"] == "test"]
    for source, bad in tests.groupby(checked.rows.loc[tests.index, "listed_as"]):
        if source in whole:
            yield (f"{source}: {_count(len(bad), 'test pair')} bad (first: {_first(bad)}), and a test set must not "
                   f"shrink in silence: mend data/raw/{source}, or add {source} to data.partial")


def _too_many(checked: Checked) -> Iterator[str]:
    counted = checked.bad[~checked.excused]
    if checked.share > checked.tolerance:
        yield (f"{len(counted)} of {len(checked.rows)} {checked.suite} pairs are bad ({checked.share:.2%}, tolerance "
               f"{checked.tolerance:.2%}; first: {_first(counted)})")


def _first(bad: pd.DataFrame) -> str:
    pair_id, reasons, error = bad[["pair_id", "reasons", "error"]].iloc[0]
    return f"{pair_id}: {reasons}" + (f" ({error})" if error else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"


# --- the report -------------------------------------------------------------------------------------------------------


def write_report(all_checked: list[Checked], found: list[str], folder: Path, *, shard_folders: list[Path]) -> Path:
    """One page on all suites and complaints that needs no network, with images of offenders; returns its path.

    `shard_folders`: where the records are, in the order in which the rows were probed. Raises ValueError if the shards
    are not those that the table is of.
    """
    parts = [_part(checked) for checked in all_checked if len(checked.rows)]
    wanted = {place: row["pair_id"] for part in parts for rule in part["rules"] for place, row in rule["shown"]}
    path = folder / "index.html"
    write_text(path, page(parts, found, read_offenders(shard_folders, wanted)))
    return path


def _part(checked: Checked) -> dict[str, Any]:
    """What the page says about a suite."""
    rules = []
    for rule in SUITES[checked.suite]:
        found = checked.rows.index[broken(rule, checked.rows)]
        shown = checked.bad.loc[found[:NUM_SHOWN]].to_dict("index")
        rules.append({"reason": rule.reason, "fatal": rule.fatal, "count": len(found), "shown": list(shown.items())})
    languages = checked.rows.loc[checked.rows["language"] != "", ["listed_as", "language"]]
    sources = checked.rows.assign(bad=checked.rows.index.isin(checked.bad.index)).groupby(["listed_as", "split"])["bad"]
    counts = sources.agg(["size", "sum"]).reset_index()
    spoken = languages.value_counts().sort_index().reset_index()
    return {
        "suite": checked.suite, "tolerance": checked.tolerance, "share": checked.share, "num_pairs": len(checked.rows),
        "num_bad": len(checked.bad), "num_excused": int(checked.excused.sum()), "rules": rules,
        "counts": counts.to_numpy().tolist(), "languages": spoken.to_numpy().tolist(),
        "expectations": offline(_data_docs(checked)),
    }


def validate(checked: Checked) -> Any:
    """Great Expectations' own result for a suite (an ExpectationSuiteValidationResult)."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    import great_expectations as gx

    rules = SUITES[checked.suite]
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("probe").add_dataframe_asset("pairs")
    batch = asset.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(gx.ExpectationSuite(checked.suite, expectations=[_expectation(rule) for rule in rules]))
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=checked.suite, data=batch, suite=suite))
    columns = checked.rows[[rule.column for rule in rules]]
    return definition.run(batch_parameters={"dataframe": columns}, result_format="SUMMARY")


def _data_docs(checked: Checked) -> str:
    result = validate(checked)
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    return str(DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result)))


def _expectation(rule: Rule) -> Expectation:
    from great_expectations import expectations as gxe

    if rule.allowed is not None:
        return gxe.ExpectColumnValuesToBeInSet(column=rule.column, value_set=list(rule.allowed))
    return gxe.ExpectColumnValuesToBeBetween(column=rule.column, min_value=rule.low, max_value=rule.high)
