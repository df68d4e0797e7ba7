"""Detection of drift: whether recent captions in the usage log still resemble the captions of the `gate` split.

When a version is registered, a profile is measured on the `gate` split: image sizes, brightness, caption lengths,
confidence, and the share of unchanged pairs for which the model claims a change. The version carries the profile as
profile.json, and recent rows of the usage log are compared with that profile.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onediff import config
from onediff.data.record import Record, read_records, read_table
from onediff.eval.analysis.grammar import read_scene
from onediff.eval.analysis.stress import choose
from onediff.files import write_json
from onediff.inputs.images import jpeg, open_image
from onediff.library_logs import silence_libraries
from onediff.ops.predict import folder_of
from onediff.paths import CHAMPION, DIFFCAP
from onediff.registry import version_text
from onediff.serve.usage_log import pair_facts, read_usage

if TYPE_CHECKING:
    from onediff.model.captioner import Captioner

PROFILE = "profile.json"
COPY_JPEG_QUALITY = 90  # JPEG quality of the image copies for `false_alarms_worn`; people see no difference
_BATCH_SIZE = 32
MAX_DAYS = 36500  # largest number of days for which the usage log can be read
_ALARMS = ("false_alarms", "false_alarms_worn")
# For each figure whose distribution is compared: the function that reads its value from a row of the usage log.
DISTRIBUTIONS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "width": lambda row: max(row["width_before"], row["width_after"]),
    "height": lambda row: max(row["height_before"], row["height_after"]),
    "brightness": lambda row: row["brightness"],
    "contrast": lambda row: row["contrast"],
    "distance": lambda row: row["distance"],
    "caption_words": lambda row: len(row["caption"].split()),
    "confidence": lambda row: row["confidence"],
}

UsageRow = Mapping[str, Any]
Rate = tuple[int, int]  # (number of pairs that meet a condition, number of all pairs)


@dataclass(frozen=True)
class Figure:
    """A measured figure, such as the brightness: its value in the profile (`then`) and in recent captions (`now`).

    `then` and `now` are medians or rates. `difference` is compared with `threshold`. `by_chance` is True if a
    statistical test shows that chance alone can explain the difference.
    """

    name: str
    then: float
    now: float
    difference: float
    threshold: float
    by_chance: bool

    @property
    def moved(self) -> bool:
        """Return True if the figure drifted: the difference exceeds the threshold, and chance does not explain it."""
        return self.difference > self.threshold and not self.by_chance


@dataclass(frozen=True)
class Drift:
    """The result of a drift check.

    `figures` is empty if too few pairs were captioned. `notes` says so, and says which rows of the usage log were
    ignored. `confidences` holds all confidence values of the profile, then those of the recent captions.
    """

    num_pairs: int
    figures: list[Figure]
    notes: list[str]
    confidences: tuple[list[float], list[float]] = ([], [])

    @property
    def moved(self) -> list[str]:
        """Return the names of the figures that drifted."""
        return [figure.name for figure in self.figures if figure.moved]

    @property
    def verdict(self) -> str:
        """Return the result in a few words: 'no verdict', 'steady', or 'drifted' with the names of the figures."""
        if not self.figures:
            return "no verdict"
        return f"drifted: {', '.join(self.moved)}" if self.moved else "steady"

    def as_dict(self) -> dict[str, Any]:
        return {"drifted": bool(self.moved), "verdict": self.verdict, "num_pairs": self.num_pairs,
                "figures": [asdict(figure) | {"moved": figure.moved} for figure in self.figures], "notes": self.notes}


def load_settings() -> config.Drift:
    """Return the section `drift` of params.yaml. Raises ValueError if the section is missing."""
    settings = config.load_params().drift
    if settings is None:
        raise ValueError("params.yaml: the section drift is missing: copy it from presets/tiny.yaml")
    return settings


def write_profile(folder: Path, model: Path, data: Path = DIFFCAP, num_pairs: int = 200) -> Path:
    """Measure the profile of a model on pairs of the `gate` split, write it to <folder>/profile.json, return the path.

    The model captions `num_pairs` pairs as `onediff caption` does. The profile contains `distributions` (each figure's
    values in ascending order), `rates` (each as [number of pairs that meet a condition, number of all pairs]) and the
    digest of the weights. False alarms are measured on the `before` image of each pair. Equal models and data give
    equal files. Raises FileNotFoundError if the split or the model does not exist.
    """
    silence_libraries()
    from onediff.model.captioner import Captioner
    from onediff.model.digest import weights_digest

    pairs = [row for row in read_table(data, "gate-*.parquet") if row["num_images"] == 2]
    pair_ids = set(choose(pairs, num_pairs, seed=0))
    records = [record for record in read_records(data, "gate-*.parquet") if record.pair_id in pair_ids]
    captioner = Captioner.load(model)
    rows: list[UsageRow] = []
    for start in range(0, len(records), _BATCH_SIZE):
        rows += _usage_rows(captioner, records[start:start + _BATCH_SIZE])
    write_json(folder / PROFILE, {
        "num_pairs": len(rows), "distributions": _distributions(rows),
        "rates": {"no_change": _no_change(rows), **false_alarms(captioner, [record.before for record in records])},
        "weights": weights_digest(model)})
    return folder / PROFILE


def _usage_rows(captioner: Captioner, records: Sequence[Record]) -> list[UsageRow]:
    pairs = [(open_image(record.before), open_image(record.after)) for record in records]
    captions = captioner.caption_with_confidence(pairs)
    return [{"caption": caption, "confidence": round(confidence, 5), **pair_facts((record.before, record.after), pair)}
            for record, pair, (caption, confidence) in zip(records, pairs, captions, strict=True)]


def false_alarms(captioner: Captioner, images: Sequence[bytes]) -> dict[str, Rate]:
    """Return two rates at which the model claims a change for unchanged pairs, as (false alarms, pairs) by name.

    For `false_alarms`, each image is paired with itself. For `false_alarms_worn`, each image is paired with a copy that
    was saved as JPEG of quality 90.
    """
    alarms = dict.fromkeys(_ALARMS, 0)
    for start in range(0, len(images), _BATCH_SIZE):
        originals = [open_image(content) for content in images[start:start + _BATCH_SIZE]]
        jpeg_copies = [open_image(jpeg(image, quality=COPY_JPEG_QUALITY)) for image in originals]
        for name, copies in zip(_ALARMS, (originals, jpeg_copies), strict=True):
            captions = captioner.caption(list(zip(originals, copies, strict=True)))
            alarms[name] += sum(not says_no_change(caption) for caption in captions)
    return {name: (count, len(images)) for name, count in alarms.items()}


def says_no_change(caption: str) -> bool:
    """Return whether a caption says that nothing changed, in a sentence that the sources `scenes` or `edits` use."""
    return read_scene(caption).change_type == "none"


def _distributions(rows: Sequence[UsageRow]) -> dict[str, list[float]]:
    return {name: sorted(value_of(row) for row in rows) for name, value_of in DISTRIBUTIONS.items()}


def _no_change(rows: Sequence[UsageRow]) -> Rate:
    return sum(says_no_change(row["caption"]) for row in rows), len(rows)


def read_profile(model: str, path: Path | None = None) -> dict[str, Any]:
    """Read the profile from the file `path`, or by default from the registered version or model folder `model`.

    Raises FileNotFoundError if there is no profile or no such model, ValueError if the profile is damaged or lacks a
    figure that this code compares.
    """
    is_registered = path is None and model.startswith("models:/")
    where = f"{model}, {PROFILE}" if is_registered else str(path or folder_of(model) / PROFILE)
    try:
        text = version_text(model, PROFILE) if is_registered else Path(where).read_text(encoding="utf-8")
    except IsADirectoryError:
        raise ValueError(f"{where} is a folder, but the profile must be a file: " + (
            f"give {where}/{PROFILE}" if (Path(where) / PROFILE).is_file() else _cure(model))) from None
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{model} was registered without {PROFILE}" if is_registered else f"{where} does not exist"
        raise FileNotFoundError(f"{problem}: {_cure(model)}") from None
    try:
        profile = json.loads(text)
        complete = (set(profile["distributions"]) >= set(DISTRIBUTIONS) and "weights" in profile
                    and set(profile["rates"]) >= {"no_change", *_ALARMS})
    except (json.JSONDecodeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{where}: the profile is damaged or incomplete: {_cure(model)}")
    return dict(profile)


def _cure(model: str) -> str:
    """Return the two commands that measure a profile of the model and compare the usage log with it."""
    option = "" if model == CHAMPION else f" --model {shlex.quote(model)}"
    return (f"run 'onediff profile .onediff/profile{option}', then "
            f"'onediff drift{option} --profile .onediff/profile/{PROFILE}'")


def examine(*, days: float = 7, model: str = CHAMPION, profile: Path | None = None) -> Drift:
    """Compare the usage log of the last `days` days with a profile, by default the profile registered with the model.

    Only captions that were made with the weights of the profile count. Raises ValueError or FileNotFoundError with the
    cure if the usage log, the thresholds or the profile is missing.
    """
    settings, runtime = load_settings(), config.load_runtime()
    if runtime.usage_log is None:
        raise ValueError("runtime.yaml: usage_log must be a folder, and it is not set, so no captions were logged: see "
                         "docs/watching.md")
    if not 0 < days <= MAX_DAYS:
        raise ValueError(f"days must be greater than 0 and at most {MAX_DAYS}, got {days:g}")
    expected, log = read_profile(model, profile), Path(runtime.usage_log)
    all_rows, num_broken = read_usage(log, datetime.now(UTC) - timedelta(days=days))
    rows = [row for row in all_rows if row["weights"] == expected["weights"]]
    # The latest images come first, because false alarms are measured on the first `num_pairs` images only.
    names = dict.fromkeys(row["file_before"] for row in reversed(rows) if "file_before" in row)
    images = [path for path in (log / name for name in names) if path.exists()][:settings.num_pairs]
    alarms = None
    if len(images) >= settings.min_pairs:
        silence_libraries()
        from onediff.model.captioner import Captioner

        alarms = false_alarms(Captioner.load(folder_of(model), device=runtime.device),
                              [path.read_bytes() for path in images])
    drift = compare(expected, rows, settings, alarms=alarms)
    other_weights = len(all_rows) - len(rows)
    notes = []
    if other_weights:
        notes.append(f"{other_weights} captions were ignored, because a model with other weights made them")
    notes += [f"{num_broken} lines of the log were ignored, because they are damaged"] if num_broken else []
    return replace(drift, notes=[*drift.notes, *notes])


def compare(profile: Mapping[str, Any], rows: Sequence[UsageRow], settings: config.Drift, *,
            alarms: Mapping[str, Rate] | None = None) -> Drift:
    """Compare recent rows of the usage log with a profile. A pair that was captioned repeatedly counts once.

    `alarms` is the result of `false_alarms` for recent images, or None if the log contains no images.
    """
    distinct = list({(row["hash_before"], row["hash_after"], row["caption"]): row for row in rows}.values())
    if len(distinct) < settings.min_pairs:
        return Drift(len(distinct), [], [f"params.yaml: drift.min_pairs requires {settings.min_pairs} different pairs, "
                                         f"and {len(distinct)} were captioned: read more days of the log (--days)"])
    rates = {"no_change": _no_change(distinct), **(alarms or {})}
    rates = {name: rate for name, rate in rates.items() if rate[1] >= settings.min_pairs}
    notes = [] if alarms else ["false alarms were not measured, because runtime.yaml: usage_images is false"]
    level = settings.chance / (len(DISTRIBUTIONS) + len(rates))  # Bonferroni correction for several figures.
    values = _distributions(distinct)
    figures = [_compare_values(name, profile["distributions"][name], now, settings, level)
               for name, now in values.items()]
    figures += [_compare_rates(name, profile["rates"][name], rate, settings, level) for name, rate in rates.items()]
    return Drift(len(distinct), figures, notes, (profile["distributions"]["confidence"], values["confidence"]))


def _compare_values(name: str, then: list[float], now: list[float], settings: config.Drift, level: float) -> Figure:
    """Compare two samples by the Kolmogorov-Smirnov statistic: the largest gap between their distribution functions."""
    from scipy.stats import ks_2samp

    test = ks_2samp(then, now)
    return Figure(name, float(np.median(then)), float(np.median(now)), float(test.statistic), settings.max_distance,
                  by_chance=bool(test.pvalue > level))


def _compare_rates(name: str, then: Sequence[int], now: Rate, settings: config.Drift, level: float) -> Figure:
    """Compare the rate in the profile with the recent rate: their difference, and its confidence interval."""
    first, second = then[0] / then[1], now[0] / now[1]
    low, high = difference_interval((then[0], then[1]), now, level)
    return Figure(name, first, second, abs(second - first), settings.max_rate_change, by_chance=low <= 0 <= high)


def difference_interval(first: Rate, second: Rate, level: float) -> tuple[float, float]:
    """Return the confidence interval of second rate minus first rate, at confidence 1 - level.

    The interval combines the Wilson intervals of both rates: Newcombe, 1998, method 10.
    """
    from scipy.stats import binomtest

    rate1, rate2 = first[0] / first[1], second[0] / second[1]
    wilson1, wilson2 = (binomtest(*rate).proportion_ci(1 - level, method="wilson") for rate in (first, second))
    below = np.hypot(rate2 - wilson2.low, wilson1.high - rate1)
    above = np.hypot(wilson2.high - rate2, rate1 - wilson1.low)
    return float(rate2 - rate1 - below), float(rate2 - rate1 + above)


def as_text(drift: Drift) -> str:
    """Return the result as Markdown: a table of the figures, the verdict and the notes."""
    rows = [["figure", "then", "now", "difference", "threshold", ""]]
    rows += [[figure.name, f"{figure.then:.3f}", f"{figure.now:.3f}", f"{figure.difference:.3f}",
              f"{figure.threshold:.3f}", "moved" if figure.moved else "by chance" if figure.by_chance else ""]
             for figure in drift.figures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    table = [*lines, ""] if drift.figures else []
    return "\n".join([*table, f"{drift.verdict} ({drift.num_pairs} pairs)", *drift.notes])
