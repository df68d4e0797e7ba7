"""Whether use still looks like training: the pairs, the model's confidence, and how often it sees a change in none.

A profile is measured on split gate when a version is registered, and lies with it; recent rows of the usage log are
held against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from onediff import config
from onediff.data.record import Record, read_records, read_table
from onediff.eval.analysis.behaviour import GRAMMARS
from onediff.eval.analysis.stress import choose, jpeg
from onediff.inputs.images import open_image
from onediff.library_logs import silence_libraries
from onediff.ops.predict import folder_of
from onediff.paths import DIFFCAP
from onediff.serve.usage_log import pair_facts, read_usage

if TYPE_CHECKING:
    from PIL import Image

    from onediff.model.captioner import Captioner

PROFILE = "profile.json"
WORN_JPEG = 90  # quality of the disturbed copy: nobody would call it a change
_BATCH = 32
_CURE = "'onediff profile .onediff/profile' measures one for 'onediff drift --profile .onediff/profile/profile.json'"
_ALARMS = ("false_alarms", "false_alarms_worn")
# What is compared of a row; both images count where they may differ.
DISTRIBUTIONS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "width": lambda row: max(row["width_before"], row["width_after"]),
    "height": lambda row: max(row["height_before"], row["height_after"]),
    "brightness": lambda row: row["brightness"],
    "contrast": lambda row: row["contrast"],
    "distance": lambda row: row["distance"],
    "caption_words": lambda row: len(row["caption"].split()),
    "confidence": lambda row: row["confidence"],
}

T = TypeVar("T")
Row = Mapping[str, Any]
Rate = tuple[int, int]  # how many of how many


@dataclass(frozen=True)
class Figure:
    """One comparison: `then` and `now` are medians, or rates; `difference` is what the threshold bounds. It moved if
    the difference is above the threshold and chance alone does not explain it.
    """

    name: str
    then: float
    now: float
    difference: float
    threshold: float
    by_chance: bool
    moved: bool


@dataclass(frozen=True)
class Drift:
    """`figures` is empty where there are too few pairs; `notes` say why, and what was left out. `confidences`: every
    value, then and now, for a picture.
    """

    num_pairs: int
    figures: list[Figure]
    notes: list[str]
    confidences: tuple[list[float], list[float]] = ([], [])

    @property
    def moved(self) -> list[str]:
        return [figure.name for figure in self.figures if figure.moved]

    @property
    def verdict(self) -> str:
        if not self.figures:
            return "no verdict"
        return f"drifted: {', '.join(self.moved)}" if self.moved else "steady"

    def as_dict(self) -> dict[str, Any]:
        return {"drifted": bool(self.moved), "verdict": self.verdict, "num_pairs": self.num_pairs,
                "figures": [asdict(figure) for figure in self.figures], "notes": self.notes}


# --- then -------------------------------------------------------------------------------------------------------------


def write_profile(folder: Path, model: Path, data: Path = DIFFCAP, num_pairs: int = 200) -> Path:
    """Writes <folder>/profile.json of a model folder, from pairs of split gate. Same model and data, same bytes.

    Raises FileNotFoundError without that split or the model.
    """
    silence_libraries()
    from onediff.model.captioner import Captioner
    from onediff.model.digest import weights_digest

    rows = [row for row in read_table(data, "gate-*.parquet") if row["num_images"] == 2]
    wanted = set(choose(rows, num_pairs, seed=0))
    records = [record for record in read_records(data, "gate-*.parquet") if record.pair_id in wanted]
    found = measure(Captioner.load(model), records) | {"weights": weights_digest(model)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROFILE
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return path


def measure(captioner: Captioner, records: Sequence[Record]) -> dict[str, Any]:
    """`distributions` (every value, in order) and `rates` ([how many, of how many]) of pairs that the model captions
    as in use; false alarms on the first image of each.
    """
    rows: list[dict[str, Any]] = []
    for some in _batches(records):
        rows += _rows(captioner, some)
    rates = {"no_change": _no_change(rows), **false_alarms(captioner, [record.before for record in records])}
    return {"num_pairs": len(rows), "distributions": _values(rows),
            "rates": {name: list(rate) for name, rate in rates.items()}}


def false_alarms(captioner: Captioner, images: Iterable[bytes]) -> dict[str, Rate]:
    """How often the model does not say that nothing changed: of an image shown twice, and of it beside a copy that was
    saved as JPEG once more.
    """
    alarms, total = dict.fromkeys(_ALARMS, 0), 0
    for some in _batches(images):
        opened = [open_image(content) for content in some]
        worn = [open_image(jpeg(image, WORN_JPEG, np.random.default_rng(0))) for image in opened]
        for name, others in zip(_ALARMS, (opened, worn), strict=True):
            said = captioner.caption(list(zip(opened, others, strict=True)))
            alarms[name] += sum(not says_no_change(text) for text in said)
        total += len(some)
    return {name: (count, total) for name, count in alarms.items()}


def says_no_change(caption: str) -> bool:
    """Whether a caption claims that nothing changed, in the words of scenes or of edits."""
    return any(grammar.read(caption).change_type == "none" for grammar in GRAMMARS.values())


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _rows(captioner: Captioner, records: Sequence[Record]) -> list[dict[str, Any]]:
    """As the usage log would hold them."""
    from onediff.serve.confidence import caption_with_confidence

    pairs = [(open_image(record.before), open_image(record.after)) for record in records]
    said = caption_with_confidence(captioner, pairs, instructions=[record.instruction for record in records])
    return [_row(record, pair, *told) for record, pair, told in zip(records, pairs, said, strict=True)]


def _row(record: Record, pair: tuple[Image.Image, Image.Image], caption: str, confidence: float) -> dict[str, Any]:
    facts = pair_facts((record.before, record.after), pair)
    return {"caption": caption, "confidence": round(confidence, 5), **facts}


def _values(rows: Sequence[Row]) -> dict[str, list[float]]:
    return {name: sorted(of(row) for row in rows) for name, of in DISTRIBUTIONS.items()}


def _no_change(rows: Sequence[Row]) -> Rate:
    return sum(says_no_change(row["caption"]) for row in rows), len(rows)


# --- now --------------------------------------------------------------------------------------------------------------


def check(then: Mapping[str, Any], rows: Sequence[Row], settings: config.Drift, *,
          alarms: Mapping[str, Rate] | None = None) -> Drift:
    """Recent rows of the usage log, each pair once, against a profile; `alarms` is what `false_alarms` found on recent
    images, where they are kept.
    """
    distinct = list({(row["hash_before"], row["hash_after"], row["caption"]): row for row in rows}.values())
    if len(distinct) < settings.min_pairs:
        return Drift(len(distinct), [], [f"{len(distinct)} different pairs were captioned, and params.yaml: "
                                         f"drift.min_pairs asks for {settings.min_pairs}: look further back (--days)"])
    rates = {"no_change": _no_change(distinct), **(alarms or {})}
    rates = {name: rate for name, rate in rates.items() if rate[1] >= settings.min_pairs}
    notes = [] if alarms else ["false alarms in use are not measured: runtime.yaml: usage_images is off"]
    level = settings.chance / (len(DISTRIBUTIONS) + len(rates))  # all figures share it: Bonferroni
    values = _values(distinct)
    figures = [_distribution(name, then["distributions"][name], now, settings, level) for name, now in values.items()]
    figures += [_rate(name, then["rates"][name], rate, settings, level) for name, rate in rates.items()]
    return Drift(len(distinct), figures, notes, (then["distributions"]["confidence"], values["confidence"]))


def _distribution(name: str, then: list[float], now: list[float], settings: config.Drift, level: float) -> Figure:
    """Kolmogorov and Smirnov's distance: the largest gap between the shares of values below any value."""
    from scipy.stats import ks_2samp

    tested = ks_2samp(then, now)
    distance, by_chance = float(tested.statistic), bool(tested.pvalue > level)
    return Figure(name, float(np.median(then)), float(np.median(now)), distance, settings.max_distance, by_chance,
                  distance > settings.max_distance and not by_chance)


def _rate(name: str, then: Sequence[int], now: Rate, settings: config.Drift, level: float) -> Figure:
    first, second = then[0] / then[1], now[0] / now[1]
    low, high = difference_interval((then[0], then[1]), now, level)
    by_chance = low <= 0 <= high
    difference = abs(second - first)
    return Figure(name, first, second, difference, settings.max_rate_change, by_chance,
                  difference > settings.max_rate_change and not by_chance)


def difference_interval(first: Rate, second: Rate, level: float) -> tuple[float, float]:
    """Of second minus first, at confidence 1 - level, from both rates' Wilson intervals. Newcombe, 1998, method 10."""
    (low1, rate1, high1), (low2, rate2, high2) = (_wilson(rate, level) for rate in (first, second))
    below = np.hypot(rate2 - low2, high1 - rate1)
    above = np.hypot(high2 - rate2, rate1 - low1)
    return float(rate2 - rate1 - below), float(rate2 - rate1 + above)


def _wilson(rate: Rate, level: float) -> tuple[float, float, float]:
    from scipy.stats import binomtest

    bounds = binomtest(*rate).proportion_ci(1 - level, method="wilson")
    return float(bounds.low), rate[0] / rate[1], float(bounds.high)


# --- the champion in use ----------------------------------------------------------------------------------------------


def examine(*, days: float = 7, model: str = "models:/onediff@champion", profile: Path | None = None) -> Drift:
    """The usage log of the last days against a model's profile: by default the one that was registered with it.

    Raises ValueError or FileNotFoundError, saying what to do, without a log, thresholds or profile.
    """
    settings, runtime = config.load_params().drift, config.load_runtime()
    if settings is None:
        raise ValueError("params.yaml: drift: missing; copy it from presets/tiny.yaml")
    if runtime.usage_log is None:
        raise ValueError("runtime.yaml: usage_log is not set, so nothing was noted: name a folder, docs/watching.md")
    if days <= 0:
        raise ValueError(f"days must be above 0, got {days:g}")
    then = read_profile(profile) if profile else profile_of(model)
    rows, broken = read_usage(Path(runtime.usage_log), datetime.now(UTC) - timedelta(days=days))
    own = [row for row in rows if row["weights"] == then["weights"]]
    images = _recent_images(Path(runtime.usage_log), own, settings.num_pairs)
    alarms = None
    if len(images) >= settings.min_pairs:
        silence_libraries()
        from onediff.model.captioner import Captioner

        captioner = Captioner.load(folder_of(model), device=runtime.device)
        alarms = false_alarms(captioner, (path.read_bytes() for path in images))
    found = check(then, own, settings, alarms=alarms)
    notes = [f"{len(rows) - len(own)} captions of other weights left out"] if len(own) < len(rows) else []
    notes += [f"{broken} broken lines of the log left out"] if broken else []
    return replace(found, notes=[*found.notes, *notes])


def profile_of(model: str) -> dict[str, Any]:
    """What a registered version carries, or what lies in a model folder.

    Raises FileNotFoundError if there is none, ValueError if it is none of this version of OneDiff.
    """
    if not model.startswith("models:/"):
        return read_profile(Path(model) / PROFILE)
    from onediff.registry import version_text

    try:
        return _parsed(version_text(model, PROFILE), f"{model}, {PROFILE}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{model} was registered without {PROFILE}: {_CURE}") from None


def read_profile(path: Path) -> dict[str, Any]:
    """Raises as `profile_of`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {_CURE}")
    return _parsed(path.read_text(encoding="utf-8"), str(path))


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        whole = (set(found["distributions"]) >= set(DISTRIBUTIONS) and "weights" in found
                 and set(found["rates"]) >= {"no_change", *_ALARMS})
    except (json.JSONDecodeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{where}: not a whole profile; {_CURE}")
    return dict(found)


def _recent_images(log: Path, rows: Sequence[Row], count: int) -> list[Path]:
    """The first images of the latest pairs that were kept, each once."""
    names = dict.fromkeys(row["file_before"] for row in reversed(rows) if "file_before" in row)
    return [path for path in (log / name for name in names) if path.exists()][:count]


def as_text(drift: Drift) -> str:
    """Markdown: the figures in a table, then the notes."""
    head = ["figure", "then", "now", "difference", "threshold", ""]
    rows = [[figure.name, f"{figure.then:.3f}", f"{figure.now:.3f}", f"{figure.difference:.3f}",
             f"{figure.threshold:.3f}", "moved" if figure.moved else "by chance" if figure.by_chance else ""]
            for figure in drift.figures]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in [head, *rows]]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    table = [lines[0], rule, *lines[1:], ""] if rows else []
    return "\n".join([*table, f"{drift.verdict} ({drift.num_pairs} pairs)", *drift.notes])
