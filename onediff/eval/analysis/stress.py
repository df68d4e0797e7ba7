"""Captions beyond the plain test pairs: of pairs without or with every change, of swapped and of disturbed ones.

A trial is a way to make other pairs of the same records; captions of a trial are kept under its name:
`plain`, `identical/before`, `identical/after`, `unrelated`, `swapped`, and `<nuisance>/<strength>` for each curve.
"""

import io
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Stress
from onediff.data.record import Record
from onediff.eval.analysis.behaviour import GRAMMARS, Grammar, Outcomes, by_change_type, rates, truth
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.words import Predictions, tokenize
from onediff.eval.protocols import PairRow, protocol_of
from onediff.eval.resample import intervals
from onediff.inputs.images import open_image, png

PLAIN, UNRELATED, SWAPPED = "plain", "unrelated", "swapped"
IDENTICAL = {"before": "identical/before", "after": "identical/after"}
RESAMPLES = 2000
CURVE_FIGURES = ("change_type_accuracy", "changed_object_accuracy", "false_alarm_rate", "operation_accuracy")
_TAG = {"chosen": 11, "unrelated": 12, "disturbed": 13}  # of this stage in every random stream

Trials = Mapping[str, Predictions]  # name of the trial -> its captions


# --- which pairs ------------------------------------------------------------------------------------------------------


def is_stressed(benchmark: str) -> bool:
    """Whether this stage measures it: not a benchmark that is another source under stress itself, as scenes_far is."""
    return protocol_of(benchmark).train_source == benchmark


def choose(rows: Sequence[PairRow], count: int, *, seed: int) -> list[str]:
    """pair_ids of `count` rows, or of all if there are fewer, in their order. Same rows and seed, same pairs."""
    rng = np.random.default_rng([seed, _TAG["chosen"]])
    return [rows[place]["pair_id"] for place in sorted(rng.permutation(len(rows))[:count])]


def trials(benchmark: str, records: Sequence[Record], settings: Stress, *,
           seed: int) -> Iterator[tuple[str, Iterator[Record]]]:
    """Name of each trial and its pairs, made one by one: at full size all of them would not fit into memory.

    Pairs keep their ids and group; `unrelated` is left out if all are of one group. Raises ValueError for a broken
    image.
    """
    yield PLAIN, iter(records)
    for side, name in IDENTICAL.items():
        yield name, (replace(record, before=getattr(record, side), after=getattr(record, side)) for record in records)
    if others := unrelated(records, seed=seed):
        yield UNRELATED, iter(others)
    yield SWAPPED, (replace(record, before=record.after, after=record.before) for record in records)
    for nuisance, strength in curve_points(benchmark, settings):
        yield f"{nuisance}/{strength:g}", (disturbed(record, nuisance, strength, seed=seed) for record in records)


def num_trials(benchmark: str, settings: Stress) -> int:
    """At most: without `unrelated` one less."""
    return 3 + len(IDENTICAL) + len(curve_points(benchmark, settings))


def unrelated(records: Sequence[Record], *, seed: int) -> list[Record]:
    """Each `before` with the `after` of a random pair of another group; [] if there is only one group."""
    rng = np.random.default_rng([seed, _TAG["unrelated"]])
    if len({record.group_id for record in records}) < 2:
        return []
    mixed = []
    for record in records:
        while (other := records[int(rng.integers(len(records)))]).group_id == record.group_id:
            continue
        mixed.append(replace(record, after=other.after))
    return mixed


# --- nuisances: what no caption should tell ---------------------------------------------------------------------------


def curve_points(benchmark: str, settings: Stress) -> list[tuple[str, float]]:
    """(nuisance, strength) of every point, without the strength 0, which is `plain`.

    Where camera and light wander anyway, as in scenes, all of them are nuisances; elsewhere a shift or another
    brightness may be the very change, and only wear remains.
    """
    names = NUISANCES if protocol_of(benchmark).grammar == "scenes" else WEAR
    return [(name, strength) for name in names for strength in getattr(settings, name)]


def disturbed(record: Record, nuisance: str, strength: float, *, seed: int) -> Record:
    """The pair under a nuisance. A pair has one random stream for each: a stronger noise is the weaker one, louder."""
    place = tuple(NUISANCES).index(nuisance)
    rng = np.random.default_rng([seed, _TAG["disturbed"], place, zlib.crc32(record.pair_id.encode())])
    disturb = NUISANCES[nuisance]
    before = disturb(open_image(record.before), strength, rng) if nuisance in WEAR else record.before
    return replace(record, before=before, after=disturb(open_image(record.after), strength, rng))


def jpeg(image: Image.Image, quality: float, rng: Generator) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(quality))
    return buffer.getvalue()


def noise(image: Image.Image, grey_levels: float, rng: Generator) -> bytes:
    """Gaussian, of this standard deviation, on every channel alone."""
    pixels = np.asarray(image, dtype=np.float64)
    return _png(pixels + grey_levels * rng.standard_normal(pixels.shape))


def shift(image: Image.Image, percent: float, rng: Generator) -> bytes:
    """Moved in a random direction by this share of its side, its edge repeated where it left."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = (round(percent / 100 * side * float(turn))
            for side, turn in zip(image.size, (np.cos(angle), np.sin(angle)), strict=True))
    reach = max(abs(x), abs(y))
    padded = np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    return _png(padded[reach - y : reach - y + image.height, reach - x : reach - x + image.width])


def scale(image: Image.Image, percent: float, rng: Generator) -> bytes:
    """Enlarged around its middle by this much, or made smaller, its edge repeated around it."""
    width, height = (side / (1 + percent / 100) for side in image.size)  # of what is seen then
    reach = max(0, int(np.ceil(max(width - image.width, height - image.height) / 2)))
    padded = np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    left, top = reach + (image.width - width) / 2, reach + (image.height - height) / 2
    seen = Image.fromarray(padded).resize(image.size, Image.Resampling.BICUBIC,
                                          box=(left, top, left + width, top + height))
    return _png(np.asarray(seen))


def brightness(image: Image.Image, percent: float, rng: Generator) -> bytes:
    return _png(np.asarray(image, dtype=np.float64) * (1 + percent / 100))


def _png(values: NDArray[Any]) -> bytes:
    return png(Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)))


WEAR = {"jpeg_quality": jpeg, "noise": noise}  # of both images; the others of `after` alone, between the two
NUISANCES = {**WEAR, "shift_percent": shift, "scale_percent": scale, "brightness_percent": brightness}


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(benchmark: str, captions: Trials, rows: Sequence[PairRow], settings: Stress) -> dict[str, Any]:
    """All figures of one benchmark from the captions of its trials (name -> pair_id -> caption).

    Shares from 0 to 1 with 95 % intervals clustered by group under "intervals"; what has no pairs is left out.
    """
    grammar = GRAMMARS.get(protocol_of(benchmark).grammar)
    result: dict[str, Any] = {"num_pairs": len(rows), "identical": identical_figures(grammar, captions, rows)}
    if UNRELATED in captions:
        result["unrelated"] = unrelated_figures(grammar, captions, rows)
    return result | {"swapped": swapped_figures(grammar, captions, rows),
                     "curves": curves(benchmark, captions, rows, settings)}


def identical_figures(grammar: Grammar | None, captions: Trials, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Of one image shown twice: false_alarm_rate (the caption does not say that nothing changed), over both images and
    over each; unreadable_rate, which is part of it; same_caption_rate (of changed pairs: word for word as of the pair).
    """
    outcomes = {"same_caption_rate": [outcome for trial in IDENTICAL.values()
                                      for outcome in _unmoved(captions, trial, rows)]}
    if grammar is None:
        return rates(outcomes)
    before, after = (_claimed_types(grammar, captions[trial], rows) for trial in IDENTICAL.values())
    for name, claims in {"": before + after, "_before": before, "_after": after}.items():
        outcomes[f"false_alarm_rate{name}"] = [(group, kind != "none") for group, kind in claims]
    outcomes["unreadable_rate"] = [(group, kind is None) for group, kind in before + after]
    by_type = _by_type([*rows, *rows], {"false_alarm_rate": outcomes["false_alarm_rate"]})
    return {**rates(outcomes), "by_change_type": by_type}


def unrelated_figures(grammar: Grammar | None, captions: Trials, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Of pairs that share nothing: no_change_rate (the caption says that nothing changed) and unreadable_rate;
    same_caption_rate as of identical pairs. Groups are those of `before`.
    """
    outcomes = {"same_caption_rate": _unmoved(captions, UNRELATED, rows)}
    if grammar is not None:
        claims = _claimed_types(grammar, captions[UNRELATED], rows)
        outcomes |= {"no_change_rate": [(group, kind == "none") for group, kind in claims],
                     "unreadable_rate": [(group, kind is None) for group, kind in claims]}
    return rates(outcomes)


def swapped_figures(grammar: Grammar | None, captions: Trials, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Of (after, before): swap_accuracy (the caption says what leads back: type, object, outcome), swap_consistency
    (it takes back what the caption of the pair itself says, right or wrong); of unchanged pairs false_alarm_rate.

    Over changed pairs whose way back the grammar can say; `left_out` counts the others by type: the crop, the
    black-and-white picture, the blur, and the hole in a photograph, where what stood there has no name.
    """
    outcomes = {"same_caption_rate": _unmoved(captions, SWAPPED, rows)}
    if grammar is None:
        return rates(outcomes)
    truths = [(row, truth(row)) for row in rows]
    ways_back = [(row, grammar.undone(true)) for row, true in truths if true.change_type != "none"]
    reversible = [(row, back) for row, back in ways_back if back is not None]
    plain, swapped = ([grammar.read(captions[trial][row["pair_id"]]) for row, _ in reversible]
                      for trial in (PLAIN, SWAPPED))
    swaps = {"swap_accuracy": [(row["group_id"], grammar.says(claim, back))
                               for claim, (row, back) in zip(swapped, reversible, strict=True)],
             "swap_consistency": [(row["group_id"], grammar.inverse(first, second))
                                  for first, second, (row, _) in zip(plain, swapped, reversible, strict=True)]}
    unchanged = [row for row, true in truths if true.change_type == "none"]
    alarms = [(group, kind != "none") for group, kind in _claimed_types(grammar, captions[SWAPPED], unchanged)]
    left_out = Counter(sorted(row["change_type"] for row, back in ways_back if back is None))
    return {"num_pairs": len(reversible), **rates({**outcomes, **swaps, "false_alarm_rate": alarms}),
            "by_change_type": _by_type([row for row, _ in reversible], swaps), "left_out": dict(left_out)}


def curves(benchmark: str, captions: Trials, rows: Sequence[PairRow], settings: Stress) -> dict[str, dict[str, Any]]:
    """Nuisance -> strength -> figures; "none" is the undisturbed pair, equal in all of them.

    CIDEr counts words over these pairs alone: compare it along the curve, not with metrics.json.
    """
    tokenize(text for texts in captions.values() for text in texts.values())  # one start of Java for all points
    plain = _point(benchmark, captions[PLAIN], rows)
    points: dict[str, dict[str, Any]] = {}
    for nuisance, strength in curve_points(benchmark, settings):
        curve = points.setdefault(nuisance, {"none": plain})
        curve[f"{strength:g}"] = _point(benchmark, captions[f"{nuisance}/{strength:g}"], rows)
    return points


def _point(benchmark: str, predictions: Predictions, rows: Sequence[PairRow]) -> dict[str, Any]:
    grammar = GRAMMARS.get(protocol_of(benchmark).grammar)
    scores = score(predictions, {row["pair_id"]: list(row["references"]) for row in rows}, metrics=["CIDEr"])
    bounds = intervals(scores, [row["group_id"] for row in rows], resamples=RESAMPLES)
    behaviour = grammar.behaviour(predictions, rows) if grammar else {}
    names = [name for name in CURVE_FIGURES if name in behaviour]
    return {**{name: behaviour[name] for name in names}, "CIDEr": scores.corpus["CIDEr"],
            "intervals": {**{name: behaviour["intervals"][name] for name in names}, "CIDEr": bounds["CIDEr"]}}


def _claimed_types(grammar: Grammar, predictions: Predictions,
                   rows: Sequence[PairRow]) -> list[tuple[str, str | None]]:
    """(group_id, change type that the caption claims, or None if it cannot be read) of each row."""
    return [(row["group_id"], grammar.read(predictions[row["pair_id"]]).change_type) for row in rows]


def _unmoved(captions: Trials, trial: str, rows: Sequence[PairRow]) -> list[tuple[str, float]]:
    """Whether the caption of a changed pair stays word for word: then the model ignored what was exchanged."""
    return [(row["group_id"], captions[PLAIN][row["pair_id"]] == captions[trial][row["pair_id"]]) for row in rows
            if row["change_type"] != "none"]


def _by_type(rows: Sequence[PairRow], outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """Change type -> number and rates of the outcomes that belong to its rows."""
    return {kind: {"num_pairs": len(places),
                   **rates({name: [each[place] for place in places] for name, each in outcomes.items()})}
            for kind, places in by_change_type(rows).items()}
