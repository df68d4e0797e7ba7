"""What the model says beyond the plain test pairs: of pairs without or with every change, of swapped and of worn ones.

A trial is a way to make other pairs of the same records; captions of a trial are kept under its name:
`plain`, `identical/before`, `identical/after`, `unrelated`, `swapped`, and `<nuisance>/<strength>` for each curve.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Stress
from onediff.data.record import Record
from onediff.eval.analysis.behaviour import (
    Change,
    Outcomes,
    Row,
    edit_behaviour,
    edit_truth,
    inverse,
    inverse_edit,
    parse,
    parse_edit,
    rates,
    says_the_edit,
    says_the_truth,
    scene_behaviour,
    truth,
    undone,
    undone_edit,
)
from onediff.eval.metrics.compute import Predictions, score, tokenize
from onediff.eval.protocols import protocol_of
from onediff.eval.resample import intervals
from onediff.inputs.images import open_image, png

PLAIN, UNRELATED, SWAPPED = "plain", "unrelated", "swapped"
IDENTICAL = {"before": "identical/before", "after": "identical/after"}
RESAMPLES = 2000
CURVE_FIGURES = ("change_type_accuracy", "changed_object_accuracy", "false_alarm_rate", "operation_accuracy")
_TAG = {"chosen": 11, "unrelated": 12, "worn": 13}  # of this stage in every random stream

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Grammar:
    """How captions of a source are read and what they should say.

    `undone`: what the swapped pair shows, None where the grammar has no sentence for it; `inverse`: whether the second
    claim takes the first one back, right or wrong.
    """

    read: Callable[[str], Change]
    truth: Callable[[Row], Change]
    undone: Callable[[Change], Change | None]
    says: Callable[[Change, Change], bool]
    inverse: Callable[[Change, Change], bool]
    behaviour: Callable[[Predictions, Iterable[Row]], dict[str, Any]]


GRAMMARS = {"scenes": Grammar(parse, truth, undone, says_the_truth, inverse, scene_behaviour),
            "edits": Grammar(parse_edit, edit_truth, undone_edit, says_the_edit, inverse_edit, edit_behaviour)}


def grammar_of(benchmark: str) -> Grammar | None:
    name = protocol_of(benchmark).grammar
    return GRAMMARS[name] if name else None


# --- which pairs ------------------------------------------------------------------------------------------------------


def stressed(benchmark: str) -> bool:
    """Whether it is measured here: not one that is another source under stress itself, as scenes_far is."""
    return protocol_of(benchmark).train_source == benchmark


def choose(rows: Sequence[Row], count: int, *, seed: int) -> list[str]:
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
        yield name, (same(record, side) for record in records)
    others = unrelated(records, seed=seed)
    if others:
        yield UNRELATED, iter(others)
    yield SWAPPED, (replace(record, before=record.after, after=record.before) for record in records)
    for nuisance, strength in curve_points(benchmark, settings):
        yield trial_name(nuisance, strength), (worn(record, nuisance, strength, seed=seed) for record in records)


def num_trials(benchmark: str, settings: Stress) -> int:
    """At most: without `unrelated` one less."""
    return 3 + len(IDENTICAL) + len(curve_points(benchmark, settings))


def same(record: Record, side: str) -> Record:
    """One of the two images twice."""
    image = {"before": record.before, "after": record.after}[side]
    return replace(record, before=image, after=image)


def unrelated(records: Sequence[Record], *, seed: int) -> list[Record]:
    """Each `before` with the `after` of a random pair of another group; [] if there is only one group."""
    rng = np.random.default_rng([seed, _TAG["unrelated"]])
    if len({record.group_id for record in records}) < 2:
        return []
    found = []
    for record in records:
        while (other := records[int(rng.integers(len(records)))]).group_id == record.group_id:
            continue
        found.append(replace(record, after=other.after))
    return found


# --- nuisances: what no caption should tell ---------------------------------------------------------------------------


def curve_points(benchmark: str, settings: Stress) -> list[tuple[str, float]]:
    """(nuisance, strength) of every point, without the strength 0, which is `plain`.

    Where camera and light wander anyway, as in scenes, all of them are nuisances; elsewhere a shift or another
    brightness may be the very change, and only wear remains.
    """
    names = NUISANCES if protocol_of(benchmark).grammar == "scenes" else WEAR
    return [(name, strength) for name in names for strength in getattr(settings, name)]


def trial_name(nuisance: str, strength: float) -> str:
    return f"{nuisance}/{strength:g}"


def worn(record: Record, nuisance: str, strength: float, *, seed: int) -> Record:
    """The pair under a nuisance. A pair has one random stream for each: a stronger noise is the weaker one, louder."""
    place = tuple(NUISANCES).index(nuisance)
    rng = np.random.default_rng([seed, _TAG["worn"], place, zlib.crc32(record.pair_id.encode())])
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
    pixels: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return png(Image.fromarray(pixels))


WEAR = {"jpeg_quality": jpeg, "noise": noise}  # of both images; the others of `after` alone, between the two
NUISANCES = {**WEAR, "shift_percent": shift, "scale_percent": scale, "brightness_percent": brightness}


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(benchmark: str, said: Mapping[str, Predictions], rows: Sequence[Row], settings: Stress) -> dict[str, Any]:
    """All figures of one benchmark from the captions of its trials (name -> pair_id -> caption).

    Shares from 0 to 1 with 95 % intervals clustered by group under "intervals"; what has no pairs is left out.
    """
    result: dict[str, Any] = {"num_pairs": len(rows), "identical": identical_figures(benchmark, said, rows)}
    if UNRELATED in said:
        result["unrelated"] = unrelated_figures(benchmark, said, rows)
    return result | {"swapped": swapped_figures(benchmark, said, rows),
                     "curves": curves(benchmark, said, rows, settings)}


def identical_figures(benchmark: str, said: Mapping[str, Predictions], rows: Sequence[Row]) -> dict[str, Any]:
    """Of one image shown twice: false_alarm_rate (it is not said that nothing changed), over both images and over
    each; unreadable_rate, which is part of it; same_caption_rate (of changed pairs: word for word as of the pair).
    """
    grammar = grammar_of(benchmark)
    found: dict[str, Outcomes] = {"same_caption_rate": [
        item for name in IDENTICAL.values() for item in _unmoved(said[PLAIN], said[name], rows)]}
    if grammar is None:
        return rates(found)
    claims = {side: _read(grammar, said[name], rows) for side, name in IDENTICAL.items()}
    alarms = {side: [(row["group_id"], claim.change_type != "none") for row, claim in table]
              for side, table in claims.items()}
    both = [item for table in claims.values() for item in table]
    found |= {"false_alarm_rate": [*alarms["before"], *alarms["after"]], "false_alarm_rate_before": alarms["before"],
              "false_alarm_rate_after": alarms["after"], "unreadable_rate": _unreadable(both)}
    by_type = _by_type([row for row, _ in both], {"false_alarm_rate": found["false_alarm_rate"]})
    return {**rates(found), "by_change_type": by_type}


def unrelated_figures(benchmark: str, said: Mapping[str, Predictions], rows: Sequence[Row]) -> dict[str, Any]:
    """Of pairs that share nothing: no_change_rate (it is said that nothing changed) and unreadable_rate;
    same_caption_rate as of identical pairs. Groups are those of `before`.
    """
    grammar = grammar_of(benchmark)
    found: dict[str, Outcomes] = {"same_caption_rate": _unmoved(said[PLAIN], said[UNRELATED], rows)}
    if grammar is not None:
        claims = _read(grammar, said[UNRELATED], rows)
        found |= {"no_change_rate": [(row["group_id"], claim.change_type == "none") for row, claim in claims],
                  "unreadable_rate": _unreadable(claims)}
    return rates(found)


def swapped_figures(benchmark: str, said: Mapping[str, Predictions], rows: Sequence[Row]) -> dict[str, Any]:
    """Of (after, before): swap_accuracy (the caption says what leads back: type, object, outcome), swap_consistency
    (it takes back what is said of the pair itself, right or wrong); of unchanged pairs false_alarm_rate.

    Over changed pairs whose way back the grammar can say; `left_out` counts the others by type: the crop, the
    black-and-white picture, the blur, and the hole in a photograph, where what stood there has no name.
    """
    grammar = grammar_of(benchmark)
    found: dict[str, Outcomes] = {"same_caption_rate": _unmoved(said[PLAIN], said[SWAPPED], rows)}
    if grammar is None:
        return rates(found)
    true = {row["pair_id"]: grammar.truth(row) for row in rows}
    back = {key: grammar.undone(change) for key, change in true.items()}
    changed = [row for row in rows if true[row["pair_id"]].change_type != "none"]
    asked = [row for row in changed if back[row["pair_id"]] is not None]
    right, consistent = [], []
    for row in asked:
        key, wanted = row["pair_id"], back[row["pair_id"]]
        assert wanted is not None, "only pairs with a way back are asked"
        first, second = grammar.read(said[PLAIN][key]), grammar.read(said[SWAPPED][key])
        right.append((row["group_id"], grammar.says(second, wanted)))
        consistent.append((row["group_id"], grammar.inverse(first, second)))
    same_kind = {"swap_accuracy": right, "swap_consistency": consistent}
    calm = [row for row in rows if true[row["pair_id"]].change_type == "none"]
    found |= same_kind | {"false_alarm_rate": [(row["group_id"], claim.change_type != "none")
                                               for row, claim in _read(grammar, said[SWAPPED], calm)]}
    left_out = sorted(row["change_type"] for row in changed if back[row["pair_id"]] is None)
    return {"num_pairs": len(asked), **rates(found), "by_change_type": _by_type(asked, same_kind),
            "left_out": {kind: left_out.count(kind) for kind in dict.fromkeys(left_out)}}


def curves(benchmark: str, said: Mapping[str, Predictions], rows: Sequence[Row],
           settings: Stress) -> dict[str, dict[str, Any]]:
    """Nuisance -> strength -> figures; "none" is the undisturbed pair, equal in all of them.

    CIDEr counts words over these pairs alone: compare it along the curve, not with metrics.json.
    """
    tokenize(text for texts in said.values() for text in texts.values())  # one start of Java for all points
    untouched = _point(benchmark, said[PLAIN], rows)
    found: dict[str, dict[str, Any]] = {}
    for nuisance, strength in curve_points(benchmark, settings):
        curve = found.setdefault(nuisance, {"none": untouched})
        curve[f"{strength:g}"] = _point(benchmark, said[trial_name(nuisance, strength)], rows)
    return found


def _point(benchmark: str, predictions: Predictions, rows: Sequence[Row]) -> dict[str, Any]:
    grammar = grammar_of(benchmark)
    scores = score(predictions, {row["pair_id"]: list(row["references"]) for row in rows}, metrics=["CIDEr"])
    bounds = intervals(scores, [row["group_id"] for row in rows], resamples=RESAMPLES)
    told = grammar.behaviour(predictions, rows) if grammar else {}
    kept = {name: told[name] for name in CURVE_FIGURES if name in told}
    return {**kept, "CIDEr": scores.corpus["CIDEr"],
            "intervals": {**{name: told["intervals"][name] for name in kept}, "CIDEr": list(bounds["CIDEr"])}}


def _read(grammar: Grammar, predictions: Predictions, rows: Sequence[Row]) -> list[tuple[Row, Change]]:
    return [(row, grammar.read(predictions[row["pair_id"]])) for row in rows]


def _unreadable(claims: Sequence[tuple[Row, Change]]) -> Outcomes:
    return [(row["group_id"], claim.change_type is None) for row, claim in claims]


def _unmoved(plain: Predictions, other: Predictions, rows: Sequence[Row]) -> Outcomes:
    """Whether the caption of a changed pair stays word for word: then the model did not look at what was exchanged."""
    return [(row["group_id"], plain[row["pair_id"]] == other[row["pair_id"]]) for row in rows
            if row["change_type"] != "none"]


def _by_type(rows: Sequence[Row], outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """Change type -> number and rates of the outcomes that belong to its rows."""
    kinds = sorted({row["change_type"] for row in rows})
    chosen = {kind: [place for place, row in enumerate(rows) if row["change_type"] == kind] for kind in kinds}
    return {kind: {"num_pairs": len(places),
                   **rates({name: [each[place] for place in places] for name, each in outcomes.items()})}
            for kind, places in chosen.items()}
