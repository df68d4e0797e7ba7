"""What a caption claims, read by the grammar that made the references, and how often the claim is true.

BLEU and CIDEr reward "the red cube was removed" where the blue one was; these figures do not.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onediff.data.synthesis.phrases import DIRECTIONS, EDIT_TEMPLATES, SCENE_TEMPLATES, SYNONYMS
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES
from onediff.eval.metrics.words import Predictions, clean
from onediff.eval.protocols import PairRow

RESAMPLES = 2000
_KINDS = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "material": MATERIALS}
_WORDS = {synonym: (kind, word) for kind, words in _KINDS.items() for word in words
          for synonym in SYNONYMS.get(word, (word,))}
_NEIGHBOUR = re.compile(r" (?:left of|right of|in front of|behind) the ")
_INVERSE = {"color": "color", "texture": "texture", "add": "drop", "drop": "add", "move": "move"}
_OPPOSITE = {"left": "right", "right": "left", "front": "back", "back": "front"}
# crop, black_and_white and blur have no inverse: no sentence asks to widen, to colour or to sharpen.
_EDIT_INVERSE = {"brighten": "darken", "darken": "brighten", "more_contrast": "less_contrast",
                 "less_contrast": "more_contrast", "color_cast": "color_cast", "rotate": "rotate", "paste": "remove",
                 "remove": "paste"}
_EDIT_OPPOSITE = {"color_cast": {"red": "cyan", "cyan": "red", "green": "purple", "purple": "green", "blue": "yellow",
                                 "yellow": "blue"},
                  "rotate": {"to the left": "to the right", "to the right": "to the left"}}

Outcomes = Sequence[tuple[str, float]]  # (group_id, right or not, or a share)


@dataclass(frozen=True)
class Change:
    """What a caption says about a pair. change_type None: it could not be read. `new`: the new color or material; of an
    edit its place, turn or tint.
    """

    change_type: str | None
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    material: str | None = None
    new: str | None = None
    direction: str | None = None


UNREADABLE = Change(None)


# --- reading captions ------------------------------------------------------------------------------------------------


def parse(caption: str) -> Change:
    """The change that a caption of a scene claims; UNREADABLE if it is none of the grammar's sentences."""
    text = _plain(caption)
    for change_type, _, pattern in _scene_patterns():
        match = pattern.fullmatch(text)
        if match is None:
            continue
        if change_type == "none":
            return Change("none")
        thing = _parse_noun(match["old"])
        if thing is not None:
            new = _results(change_type).get(match.groupdict().get("new", ""))
            return Change(change_type, **thing, **{"direction" if change_type == "move" else "new": new})
    return UNREADABLE


def parse_edit(caption: str) -> Change:
    """What a request asks for: its operation as the type, the object that is pasted; UNREADABLE if it is none."""
    text = _plain(caption)
    for operation, pattern in _edit_patterns():
        match = pattern.fullmatch(text)
        if match is not None:
            slots = match.groupdict()
            return Change(operation, **_parse_noun(slots.get("old", "")) or {}, new=slots.get("new"))
    return UNREADABLE


def matching_templates(caption: str, change_type: str) -> list[str]:
    """The scene templates of the type that the caption could have been made from."""
    text = _plain(caption)
    return [template for kind, template, pattern in _scene_patterns()
            if kind == change_type and pattern.fullmatch(text)]


def _plain(caption: str) -> str:
    return clean(re.sub(r"[.,;:!?\"]+(?=\s|$)", " ", clean(caption).lower()))


@functools.cache
def _scene_patterns() -> list[tuple[str, str, re.Pattern[str]]]:
    """The slot {new} takes only what fits the type: "became red" is a color, "became shiny" a texture."""
    return [(kind, text, _pattern(text, new="|".join(_results(kind))))
            for kind, texts in SCENE_TEMPLATES.items() for text in texts]


@functools.cache
def _edit_patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Sentences without a slot come first, since a slot would also take their words."""
    flat = [(kind, text) for kind, texts in EDIT_TEMPLATES.items() for text in texts]
    flat.sort(key=lambda item: "{" in item[1])
    return [(kind, _pattern(text, new=r"\w+(?: \w+){0,3}")) for kind, text in flat]


def _pattern(template: str, *, new: str) -> re.Pattern[str]:
    text = re.escape(template.lower()).replace(r"\ ", " ")
    text = text.replace(r"\{old\}", r"(?P<old>\w+(?: \w+)*?)").replace(r"\{new\}", f"(?P<new>{new})")
    return re.compile(re.sub(r"\ba (?=\(\?P<old>)", "an? ", text))


def _results(change_type: str) -> dict[str, str]:
    """Phrase for what an object became or where it went -> the color, material or direction."""
    if change_type == "move":
        return {phrase: name for name, phrase in DIRECTIONS.items()}
    result_kind = {"color": "color", "texture": "material"}.get(change_type)
    return {phrase: word for phrase, (kind, word) in _WORDS.items() if kind == result_kind}


def _parse_noun(phrase: str) -> dict[str, str | None] | None:
    """The attributes named before the neighbour, if there is one; None if a word is unknown or the shape is missing."""
    first, *rest = _NEIGHBOUR.split(phrase)
    parts = [_parse_words(text.split()) for text in (first, *rest)]
    return None if len(parts) > 2 or None in parts else parts[0]


def _parse_words(words: list[str]) -> dict[str, str | None] | None:
    attributes: dict[str, str | None] = dict.fromkeys(_KINDS)
    for word in words:
        kind, value = _WORDS.get(word, (None, None))
        if kind is None or attributes[kind] is not None or attributes["shape"] is not None:  # the shape is last
            return None
        attributes[kind] = value
    return attributes if attributes["shape"] else None


# --- the truth -------------------------------------------------------------------------------------------------------


def truth(row: PairRow) -> Change:
    """What really happened in a pair of scenes, or was done to a picture, from its provenance."""
    if row["change_type"] == "none":
        return Change("none")
    thing = row["provenance"]["object"]
    attributes = {kind: thing[kind] for kind in _KINDS} if thing else {}
    outcome = "direction" if row["change_type"] == "move" else "new"
    return Change(row["change_type"], **attributes, **{outcome: row["provenance"]["new"]})


def same_object(a: Change, b: Change) -> bool:
    """Color and shape are named and agree."""
    return None not in (a.color, a.shape) and (a.color, a.shape) == (b.color, b.shape)


def says_the_truth(claim: Change, true: Change) -> bool:
    """Type, object (color and shape) and what it became or where it went."""
    return claim.change_type == true.change_type and (true.change_type == "none" or (
        same_object(claim, true) and (claim.new, claim.direction) == (true.new, true.direction)))


def inverse(a: Change, b: Change) -> bool:
    """Whether b undoes a: the same object, before and after exchanged."""
    if a.change_type is None or _INVERSE.get(a.change_type) != b.change_type:
        return False
    if a.change_type == "color":
        return None not in (a.shape, a.color) and (a.shape, a.color, a.new) == (b.shape, b.new, b.color)
    if not same_object(a, b):
        return False
    if a.change_type == "texture":
        return a.new != b.new
    return a.change_type != "move" or _OPPOSITE.get(a.direction or "") == b.direction


def says_the_edit(claim: Change, true: Change) -> bool:
    """Operation, place, turn or tint, and of what is pasted color and shape."""
    return ((claim.change_type, claim.new) == (true.change_type, true.new)
            and (true.change_type != "paste" or same_object(claim, true)))


def undone(change: Change) -> Change | None:
    """What happens in the same scenes with before and after exchanged; None if nothing does."""
    kind = _INVERSE.get(change.change_type or "")
    if kind is None:
        return None
    if kind == "color":
        return replace(change, color=change.new, new=change.color)
    if kind == "texture":
        return replace(change, material=change.new, new=change.material)
    return replace(change, change_type=kind, direction=_OPPOSITE.get(change.direction or ""))


def undone_edit(edit: Change) -> Change | None:
    """The edit that leads back, in the grammar's words; None where it has none, as for a crop or a hole in a photo."""
    kind = _EDIT_INVERSE.get(edit.change_type or "")
    if kind is None or (kind == "paste" and edit.shape is None):
        return None
    opposite = _EDIT_OPPOSITE.get(kind)
    return replace(edit, change_type=kind, new=opposite.get(edit.new or "") if opposite else edit.new)


def inverse_edit(a: Change, b: Change) -> bool:
    """Whether request b undoes request a; a request to remove names no object, so any may be pasted in its place."""
    kind = _EDIT_INVERSE.get(a.change_type or "")
    if kind is None or kind != b.change_type:
        return False
    opposite = _EDIT_OPPOSITE.get(kind)
    return a.new == b.new if opposite is None else opposite.get(a.new or "") == b.new


def scene_checks(prediction: str, row: PairRow) -> dict[str, bool]:
    """What of the caption is right: its type, its object, and what that became or where it went; all of it: right."""
    claim, true = parse(prediction), truth(row)
    if true.change_type == "none":
        return {"no change": claim.change_type == "none"}
    checks = {"type": claim.change_type == true.change_type, "object": same_object(claim, true)}
    if true.new or true.direction:
        checks["outcome"] = checks["type"] and (claim.new, claim.direction) == (true.new, true.direction)
    return checks


def edit_checks(prediction: str, row: PairRow) -> dict[str, bool]:
    """Whether the request names the operation, whatever its object or place."""
    return {"operation": parse_edit(prediction).change_type == row["change_type"]}


# --- figures ---------------------------------------------------------------------------------------------------------


def scene_behaviour(predictions: Predictions, rows: Iterable[PairRow]) -> dict[str, Any]:
    """Shares of pairs, 0 to 1, with 95 % intervals under "intervals"; what has no pairs is left out.

    Over changed pairs: change_found_rate (a change is claimed), change_type_accuracy, changed_object_accuracy (color
    and shape), change_accuracy (type, object and what it became). Over unchanged pairs: false_alarm_rate (the caption
    does not say that nothing changed). Over pairs and their exact swaps: swap_consistency (the two captions undo each
    other, right or wrong). A caption that cannot be read is wrong everywhere.
    """
    table = [(row, parse(predictions[row["pair_id"]]), truth(row)) for row in rows]
    claims = {row["pair_id"]: claim for row, claim, _ in table}
    changed = [(row["group_id"], claim, true) for row, claim, true in table if true.change_type != "none"]
    right_types = [(group, claim.change_type == true.change_type) for group, claim, true in changed]
    result = rates({
        "change_found_rate": [(group, claim.change_type not in (None, "none")) for group, claim, _ in changed],
        "change_type_accuracy": right_types,
        "changed_object_accuracy": [(group, same_object(claim, true)) for group, claim, true in changed],
        "change_accuracy": [(group, says_the_truth(claim, true)) for group, claim, true in changed],
        "false_alarm_rate": [(row["group_id"], claim.change_type != "none") for row, claim, true in table
                             if true.change_type == "none"],
        "swap_consistency": [(row["group_id"], inverse(claims[row["provenance"]["swap_of"]], claim))
                             for row, claim, _ in table if row["provenance"].get("swap_of") in claims],
    })
    changed_rows = [row for row, _, true in table if true.change_type != "none"]
    return result | {"change_type_accuracy_by_type": _by_type(changed_rows, right_types)}


def edit_behaviour(predictions: Predictions, rows: Iterable[PairRow]) -> dict[str, Any]:
    """operation_accuracy: share of pairs whose caption names the operation, whatever its object or place."""
    table = list(rows)
    outcomes = [(row["group_id"], edit_checks(predictions[row["pair_id"]], row)["operation"]) for row in table]
    return {**rates({"operation_accuracy": outcomes}), "operation_accuracy_by_operation": _by_type(table, outcomes)}


def by_change_type(rows: Sequence[PairRow]) -> dict[str, list[int]]:
    """Change type -> the positions of its rows, in order of type."""
    return {kind: [place for place, row in enumerate(rows) if row["change_type"] == kind]
            for kind in sorted({row["change_type"] for row in rows})}


def _by_type(rows: Sequence[PairRow], outcomes: Outcomes) -> dict[str, float]:
    return {kind: sum(outcomes[place][1] for place in places) / len(places)
            for kind, places in by_change_type(rows).items()}


def rates(outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """The mean of the outcomes under each name that has any, the share of right ones, and their intervals."""
    known = {name: values for name, values in outcomes.items() if values}
    return {**{name: sum(ok for _, ok in values) / len(values) for name, values in known.items()},
            "intervals": {name: interval(values) for name, values in known.items()}}


def interval(outcomes: Outcomes) -> list[float]:
    """95 % bootstrap interval of the share, drawing whole groups: pairs of one scene or photo are not independent."""
    groups = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in outcomes))}
    numbers = [groups[group] for group, _ in outcomes]
    right, count = np.bincount(numbers, [ok for _, ok in outcomes]), np.bincount(numbers)
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    shares = right[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    return [float(bound) for bound in np.percentile(shares, [2.5, 97.5])]

# --- both grammars ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grammar:
    """How the captions of a source are read and what they should say.

    `undone`: what the swapped pair shows, None where the grammar has no sentence for it; `inverse`: whether the second
    claim takes the first one back, right or wrong; `checks`: what of a prediction is right.
    """

    read: Callable[[str], Change]
    undone: Callable[[Change], Change | None]
    says: Callable[[Change, Change], bool]
    inverse: Callable[[Change, Change], bool]
    checks: Callable[[str, PairRow], dict[str, bool]]
    behaviour: Callable[[Predictions, Iterable[PairRow]], dict[str, Any]]


# By Protocol.grammar; the captions of a protocol without grammar are not read.
GRAMMARS: dict[str | None, Grammar] = {
    "scenes": Grammar(parse, undone, says_the_truth, inverse, scene_checks, scene_behaviour),
    "edits": Grammar(parse_edit, undone_edit, says_the_edit, inverse_edit, edit_checks, edit_behaviour)}
