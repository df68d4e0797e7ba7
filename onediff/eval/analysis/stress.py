"""Stress test: caption altered versions of the test pairs, and measure how the captions change.

Each way to alter the pairs is a trial with a name. The trials are: `plain` (unaltered pairs), `identical/before` and
`identical/after` (one image shown twice), `unrelated` (two images of different pairs), `swapped` (after, before), and
`<perturbation>/<strength>` (noise, JPEG compression and other changes that a caption should not mention).
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from onediff.config import Stress
from onediff.data.record import Record
from onediff.data.synthesis.nuisance import Disturbance, apply
from onediff.eval.analysis.behaviour import GRAMMARS, Grammar, claims_change, rates, rates_by
from onediff.eval.analysis.grammar import Change, truth
from onediff.eval.metrics.compute import score
from onediff.eval.metrics.words import Predictions, tokenize
from onediff.eval.protocols import PairRow, protocol_of
from onediff.eval.resample import intervals
from onediff.inputs.images import jpeg, open_image, png

PLAIN, UNRELATED, SWAPPED = "plain", "unrelated", "swapped"
IDENTICAL = {"before": "identical/before", "after": "identical/after"}
RESAMPLES = 2000
CURVE_FIGURES = ("change_type_accuracy", "changed_object_accuracy", "false_alarm_rate", "operation_accuracy",
                 "unreadable_rate")
_TAG = {"chosen": 11, "unrelated": 12, "disturbed": 13}  # part of the random seed; each use has its own number

Trials = Mapping[str, Predictions]  # maps the name of each trial to the captions of all pairs in this trial


def is_stressed(benchmark: str) -> bool:
    """Return whether the stress test includes the benchmark.

    A harder version of another source is not included; for example, `scenes_far` is a harder version of `scenes`.
    """
    return protocol_of(benchmark).train_source == benchmark


def choose(rows: Sequence[PairRow], count: int, *, seed: int) -> list[str]:
    """Return the pair_ids of `count` random rows in the order of the rows, or of all rows if there are fewer.

    The same rows and seed give the same pairs.
    """
    rng = np.random.default_rng([seed, _TAG["chosen"]])
    return [rows[place]["pair_id"] for place in sorted(rng.permutation(len(rows))[:count])]


def trials(benchmark: str, records: Sequence[Record], settings: Stress, *,
           seed: int) -> Iterator[tuple[str, Iterator[Record]]]:
    """Yield each trial of the stress test as (name of the trial, iterator over the altered records).

    Records are altered one at a time, because the records of all trials together do not fit into memory. An altered
    record keeps its pair_id and group_id. The trial `unrelated` is left out if all records belong to one group. Raises
    ValueError for an image that cannot be decoded.
    """
    yield PLAIN, iter(records)
    for side, name in IDENTICAL.items():
        yield name, map(partial(_identical, side=side), records)
    if others := unrelated(records, seed=seed):
        yield UNRELATED, iter(others)
    yield SWAPPED, (replace(record, before=record.after, after=record.before) for record in records)
    for nuisance, strength in curve_points(benchmark, settings):
        alter = partial(disturbed, nuisance=nuisance, strength=strength, seed=seed)
        yield f"{nuisance}/{strength:g}", map(alter, records)


def _identical(record: Record, *, side: str) -> Record:
    return replace(record, before=getattr(record, side), after=getattr(record, side))


def num_trials(benchmark: str, settings: Stress) -> int:
    """Return the number of trials of the stress test on a benchmark.

    The trial `unrelated` is always counted, although `trials` leaves it out if all records belong to one group.
    """
    return 3 + len(IDENTICAL) + len(curve_points(benchmark, settings))


def unrelated(records: Sequence[Record], *, seed: int) -> list[Record]:
    """Return one record for each pair, with two unrelated images: its `before`, and `after` of a pair of another group.

    The other pair is drawn at random. The result is empty if there is only one group.
    """
    rng = np.random.default_rng([seed, _TAG["unrelated"]])
    if len({record.group_id for record in records}) < 2:
        return []
    mixed = []
    for record in records:
        while (other := records[int(rng.integers(len(records)))]).group_id == record.group_id:
            continue
        mixed.append(replace(record, after=other.after))
    return mixed


def curve_points(benchmark: str, settings: Stress) -> list[tuple[str, float]]:
    """Return the points of the stress curves as (perturbation, strength).

    The unperturbed pairs are captioned in the trial `plain`, so strength 0 is left out. For the source `scenes`, all
    perturbations are used, because camera and light differ between the images of every pair. In other sources a shift
    or another brightness may be the change to describe, so only JPEG compression and noise are used, on both images.
    """
    names = NUISANCES if protocol_of(benchmark).grammar == "scenes" else WEAR
    return [(name, strength) for name in names for strength in getattr(settings, name)]


def disturbed(record: Record, nuisance: str, strength: float, *, seed: int) -> Record:
    """Return the record with images that are altered by a perturbation of the given strength.

    The random numbers depend on the pair and the perturbation but not on the strength: stronger noise is the same noise
    pattern with a larger amplitude.
    """
    place = tuple(NUISANCES).index(nuisance)
    rng = np.random.default_rng([seed, _TAG["disturbed"], place, zlib.crc32(record.pair_id.encode())])
    disturb = NUISANCES[nuisance]
    before = disturb(open_image(record.before), strength, rng) if nuisance in WEAR else record.before
    return replace(record, before=before, after=disturb(open_image(record.after), strength, rng))


def compressed(image: Image.Image, quality: float, rng: Generator) -> bytes:
    """Return the image as a JPEG file of the given quality."""
    return jpeg(image, quality=round(quality))


def noise(image: Image.Image, grey_levels: float, rng: Generator) -> bytes:
    """Return the image as a PNG file with added Gaussian noise, which is independent for each color channel.

    `grey_levels` is the standard deviation of the noise.
    """
    return png(Image.fromarray(apply(rng, np.asarray(image), Disturbance(noise=grey_levels))))


def shift(image: Image.Image, percent: float, rng: Generator) -> bytes:
    """Return the image as a PNG file, shifted in a random direction by `percent` % of its width and height.

    The empty border is filled by repeating the edge pixels.
    """
    angle = rng.uniform(0, 2 * np.pi)
    x, y = (round(percent / 100 * side * float(turn))
            for side, turn in zip(image.size, (np.cos(angle), np.sin(angle)), strict=True))
    reach = max(abs(x), abs(y))
    padded = np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    return _png(padded[reach - y : reach - y + image.height, reach - x : reach - x + image.width])


def scale(image: Image.Image, percent: float, rng: Generator) -> bytes:
    """Return the image as a PNG file, enlarged around its centre by `percent` %, or reduced if `percent` is negative.

    The empty border of a reduced image is filled by repeating the edge pixels.
    """
    width, height = (side / (1 + percent / 100) for side in image.size)  # visible part of the image, in input pixels
    reach = max(0, int(np.ceil(max(width - image.width, height - image.height) / 2)))
    padded = np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    left, top = reach + (image.width - width) / 2, reach + (image.height - height) / 2
    seen = Image.fromarray(padded).resize(image.size, Image.Resampling.BICUBIC,
                                          box=(left, top, left + width, top + height))
    return _png(np.asarray(seen))


def brightness(image: Image.Image, percent: float, rng: Generator) -> bytes:
    """Return the image as a PNG file with all pixel values increased by `percent` %, or decreased if it is negative."""
    return _png(np.asarray(image, dtype=np.float64) * (1 + percent / 100))


def _png(values: NDArray[Any]) -> bytes:
    return png(Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)))


# The perturbations in WEAR are applied to both images, all other perturbations only to the image `after`.
WEAR = {"jpeg_quality": compressed, "noise": noise}
NUISANCES = {**WEAR, "shift_percent": shift, "scale_percent": scale, "brightness_percent": brightness}


def figures(benchmark: str, captions: Trials, rows: Sequence[PairRow], settings: Stress) -> dict[str, Any]:
    """Return all stress-test figures of one benchmark, computed from the captions of all trials.

    The figures are shares from 0 to 1, except CIDEr. Their 95 % intervals, from a bootstrap over groups of pairs, are
    under "intervals". A figure without pairs is left out.
    """
    grammar = GRAMMARS.get(protocol_of(benchmark).grammar)
    result: dict[str, Any] = {"num_pairs": len(rows), "identical": identical_figures(grammar, captions, rows)}
    if UNRELATED in captions:
        result["unrelated"] = unrelated_figures(grammar, captions, rows)
    return result | {"swapped": swapped_figures(grammar, captions, rows),
                     "curves": curves(benchmark, captions, rows, settings)}


def identical_figures(grammar: Grammar | None, captions: Trials, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Return the stress-test figures for pairs in which one image is shown twice.

    false_alarm_rate: share of captions that claim a change. It is given for all these pairs, and separately for pairs
    that show `before` twice and for pairs that show `after` twice. unreadable_rate: share of captions that no grammar
    can read; these are no false alarms, but they are not right either. same_caption_rate: share of changed pairs
    whose caption is identical to the caption of the unaltered pair.
    """
    outcomes = {"same_caption_rate": [outcome for trial in IDENTICAL.values()
                                      for outcome in _unmoved(captions, trial, rows)]}
    if grammar is None:
        return rates(outcomes)
    before, after = (_claims(grammar, captions[trial], rows) for trial in IDENTICAL.values())
    for name, claims in {"": before + after, "_before": before, "_after": after}.items():
        outcomes[f"false_alarm_rate{name}"] = [(group, claims_change(claim)) for group, claim in claims]
    outcomes["unreadable_rate"] = [(group, claim.change_type is None) for group, claim in before + after]
    kinds = [row["change_type"] for row in rows]
    by_type = rates_by(kinds + kinds, {"false_alarm_rate": outcomes["false_alarm_rate"]})
    return {**rates(outcomes), "by_change_type": by_type}


def unrelated_figures(grammar: Grammar | None, captions: Trials, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Return the stress-test figures for pairs of two unrelated images.

    no_change_rate: share of captions that say that nothing changed. unreadable_rate: share of captions that no grammar
    can read. same_caption_rate: share of changed pairs whose caption is identical to the caption of the unaltered pair.
    A pair of unrelated images belongs to the group of its image `before`.
    """
    outcomes = {"same_caption_rate": _unmoved(captions, UNRELATED, rows)}
    if grammar is not None:
        claims = _claims(grammar, captions[UNRELATED], rows)
        outcomes |= {"no_change_rate": [(group, claim.change_type == "none") for group, claim in claims],
                     "unreadable_rate": [(group, claim.change_type is None) for group, claim in claims]}
    return rates(outcomes)


def swapped_figures(grammar: Grammar | None, captions: Trials, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Return the stress-test figures for swapped pairs, in which the model sees (after, before).

    swap_accuracy: share of changed pairs whose caption describes the inverse change correctly: for edits the operation
    that leads back, with place, turn, tint and object as far as its sentence says them. swap_consistency: share of
    changed pairs whose caption is the inverse of the caption of the unaltered pair, even if both captions are wrong.
    false_alarm_rate: share of unchanged pairs whose caption claims a change. same_caption_rate: share of changed pairs
    whose caption is identical to the caption of the unaltered pair.

    by_change_type has the number of pairs and both swap figures for each type of the unaltered pair.
    """
    outcomes = {"same_caption_rate": _unmoved(captions, SWAPPED, rows)}
    if grammar is None:
        return rates(outcomes)
    reversible = [(row, back) for row in rows if (back := grammar.undone(truth(row))) is not None]
    plain, swapped = ([grammar.read(captions[trial][row["pair_id"]]) for row, _ in reversible]
                      for trial in (PLAIN, SWAPPED))
    swaps = {"swap_accuracy": [(row["group_id"], grammar.says(claim, back))
                               for claim, (row, back) in zip(swapped, reversible, strict=True)],
             "swap_consistency": [(row["group_id"], grammar.inverse(first, second))
                                  for first, second, (row, _) in zip(plain, swapped, reversible, strict=True)]}
    unchanged = [row for row in rows if row["change_type"] == "none"]
    alarms = [(group, claims_change(claim)) for group, claim in _claims(grammar, captions[SWAPPED], unchanged)]
    return {"num_pairs": len(reversible), **rates({**outcomes, **swaps, "false_alarm_rate": alarms}),
            "by_change_type": rates_by([row["change_type"] for row, _ in reversible], swaps)}


def curves(benchmark: str, captions: Trials, rows: Sequence[PairRow], settings: Stress) -> dict[str, dict[str, Any]]:
    """Return the figures for each perturbation and strength, as {perturbation: {strength: figures}}.

    The strength "none" stands for the unaltered pairs. The document frequencies of CIDEr are counted only on the pairs
    of the stress test, so CIDEr can be compared between strengths but not with metrics.json.
    """
    tokenize(text for texts in captions.values() for text in texts.values())  # This fills the tokenizer's cache.
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


def _claims(grammar: Grammar, predictions: Predictions, rows: Sequence[PairRow]) -> list[tuple[str, Change]]:
    """Return (group_id, change that the caption claims) for each row."""
    return [(row["group_id"], grammar.read(predictions[row["pair_id"]])) for row in rows]


def _unmoved(captions: Trials, trial: str, rows: Sequence[PairRow]) -> list[tuple[str, float]]:
    """Return for each changed pair whether its caption in the trial is identical to the caption of the unaltered pair.

    An identical caption shows that the model ignored the image that was replaced.
    """
    return [(row["group_id"], captions[PLAIN][row["pair_id"]] == captions[trial][row["pair_id"]]) for row in rows
            if row["change_type"] != "none"]
