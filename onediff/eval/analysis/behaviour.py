"""Behaviour figures: parse the captions of generated pairs and compare the claimed change with the true change.

The grammar that generated the references also parses the captions. BLEU and CIDEr give a high score to "the red cube
was removed" if the blue cube was removed; these figures count such a caption as wrong.
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
# What undoes `remove` is `restore` instead of `paste` if the removed object has no name.
_EDIT_INVERSE = {"brighten": "darken", "darken": "brighten", "more_contrast": "less_contrast",
                 "less_contrast": "more_contrast", "color_cast": "color_cast", "black_and_white": "colorize",
                 "colorize": "black_and_white", "blur": "sharpen", "sharpen": "blur", "crop": "zoom_out",
                 "zoom_out": "crop", "rotate": "rotate", "paste": "remove", "restore": "remove", "remove": "paste"}
_EDIT_OPPOSITE = {"color_cast": {"red": "cyan", "cyan": "red", "green": "purple", "purple": "green", "blue": "yellow",
                                 "yellow": "blue"},
                  "rotate": {"to the left": "to the right", "to the right": "to the left"}}

Outcomes = Sequence[tuple[str, float]]  # for each pair: (group_id, outcome from 0 = wrong to 1 = right)


@dataclass(frozen=True)
class Change:
    """The change that a caption claims, or the change that really happened in a pair.

    A `change_type` of None means that the caption could not be parsed. `color`, `shape`, `size` and `material` describe
    the object that changed; for an edit, the object to be pasted. `new` is the new color or material; for an edit, it
    is the position, the turn or the tint. `direction` is the direction in which an object was moved.
    """

    change_type: str | None
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    material: str | None = None
    new: str | None = None
    direction: str | None = None


UNREADABLE = Change(None)


def parse(caption: str) -> Change:
    """Parse a caption of a generated scene, and return the change that the caption claims.

    Returns UNREADABLE if the grammar does not match the caption.
    """
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
    """Parse a caption of the source `edits`, and return the edit that the caption asks for.

    The change_type of the result is the operation. If the operation is `paste`, the attributes describe the object to
    be pasted. Returns UNREADABLE if the grammar does not match the caption.
    """
    text = _plain(caption)
    for operation, pattern in _edit_patterns():
        match = pattern.fullmatch(text)
        if match is not None:
            slots = match.groupdict()
            return Change(operation, **_parse_noun(slots.get("old", "")) or {}, new=slots.get("new"))
    return UNREADABLE


def matching_templates(caption: str, change_type: str) -> list[str]:
    """Return the sentence templates for a change type of scenes that can generate the caption."""
    text = _plain(caption)
    return [template for kind, template, pattern in _scene_patterns()
            if kind == change_type and pattern.fullmatch(text)]


def _plain(caption: str) -> str:
    return clean(re.sub(r"[.,;:!?\"]+(?=\s|$)", " ", clean(caption).lower()))


@functools.cache
def _scene_patterns() -> list[tuple[str, str, re.Pattern[str]]]:
    """Return (change type, template, regular expression) for each sentence template of scenes.

    The slot {new} of a template matches only words that fit the change type: "became red" is a change of color, "became
    shiny" a change of texture.
    """
    return [(kind, text, _pattern(text, new="|".join(_results(kind))))
            for kind, texts in SCENE_TEMPLATES.items() for text in texts]


@functools.cache
def _edit_patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Return (operation, regular expression) for each sentence template of edits.

    A slot is a placeholder such as {new}. Templates without a slot come first, because the slot of another template
    could also match their words.
    """
    flat = [(kind, text) for kind, texts in EDIT_TEMPLATES.items() for text in texts]
    flat.sort(key=lambda item: "{" in item[1])
    return [(kind, _pattern(text, new=r"\w+(?: \w+){0,3}")) for kind, text in flat]


def _pattern(template: str, *, new: str) -> re.Pattern[str]:
    text = re.escape(template.lower()).replace(r"\ ", " ")
    text = text.replace(r"\{old\}", r"(?P<old>\w+(?: \w+)*?)").replace(r"\{new\}", f"(?P<new>{new})")
    return re.compile(re.sub(r"\ba (?=\(\?P<old>)", "an? ", text))


def _results(change_type: str) -> dict[str, str]:
    """Return the phrases for the result of a change, as {phrase: color, material or direction}."""
    if change_type == "move":
        return {phrase: name for name, phrase in DIRECTIONS.items()}
    result_kind = {"color": "color", "texture": "material"}.get(change_type)
    return {phrase: word for phrase, (kind, word) in _WORDS.items() if kind == result_kind}


def _parse_noun(phrase: str) -> dict[str, str | None] | None:
    """Return the attributes, such as color and shape, of the object that a noun phrase describes.

    The result is None if a word is unknown or the shape is missing. A phrase may locate the object by a neighbour, as
    in "the cube left of the ball"; the attributes of the neighbour are ignored.
    """
    first, *rest = _NEIGHBOUR.split(phrase)
    parts = [_parse_words(text.split()) for text in (first, *rest)]
    return None if len(parts) > 2 or None in parts else parts[0]


def _parse_words(words: list[str]) -> dict[str, str | None] | None:
    attributes: dict[str, str | None] = dict.fromkeys(_KINDS)
    for word in words:
        kind, value = _WORDS.get(word, (None, None))
        if kind is None or attributes[kind] is not None or attributes["shape"] is not None:
            return None  # The word is unknown, repeats an attribute, or follows the shape, which must be the last word.
        attributes[kind] = value
    return attributes if attributes["shape"] else None


def truth(row: PairRow) -> Change:
    """Return the true change of a generated pair, which the provenance of the row records."""
    if row["change_type"] == "none":
        return Change("none")
    thing = row["provenance"]["object"]
    attributes = {kind: thing[kind] for kind in _KINDS} if thing else {}
    outcome = "direction" if row["change_type"] == "move" else "new"
    return Change(row["change_type"], **attributes, **{outcome: row["provenance"]["new"]})


def same_object(a: Change, b: Change) -> bool:
    """Return whether both changes name the color and the shape of the object, and these are equal."""
    return None not in (a.color, a.shape) and (a.color, a.shape) == (b.color, b.shape)


def says_the_truth(claim: Change, true: Change) -> bool:
    """Return whether the change that a scene caption claims is correct in type, object (color and shape) and result."""
    return claim.change_type == true.change_type and (true.change_type == "none" or (
        same_object(claim, true) and (claim.new, claim.direction) == (true.new, true.direction)))


def inverse(a: Change, b: Change) -> bool:
    """Return whether change b undoes change a: b must change the same object back to its former state."""
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
    """Return whether the edit that a caption asks for has the right operation and the right position, turn or tint.

    If the operation is `paste`, color and shape of the pasted object must also be correct.
    """
    return ((claim.change_type, claim.new) == (true.change_type, true.new)
            and (true.change_type != "paste" or same_object(claim, true)))


def undone(change: Change) -> Change | None:
    """Return the change of a scene that undoes `change`: the true change of the swapped pair (after, before).

    The result is None if nothing changed or if the change is unknown.
    """
    kind = _INVERSE.get(change.change_type or "")
    if kind is None:
        return None
    if kind == "color":
        return replace(change, color=change.new, new=change.color)
    if kind == "texture":
        return replace(change, material=change.new, new=change.material)
    return replace(change, change_type=kind, direction=_OPPOSITE.get(change.direction or ""))


def undone_edit(edit: Change) -> Change | None:
    """Return the edit that undoes `edit`, or None if nothing was edited or the edit is unknown."""
    kind = _EDIT_INVERSE.get(edit.change_type or "")
    if kind is None:
        return None
    if kind == "paste" and edit.shape is None:
        kind = "restore"
    opposite = _EDIT_OPPOSITE.get(kind)
    return replace(edit, change_type=kind, new=opposite.get(edit.new or "") if opposite else edit.new)


def inverse_edit(a: Change, b: Change) -> bool:
    """Return whether edit b undoes edit a.

    A caption that asks to remove an object does not name the object, so pasting any object and restoring what was
    there undo a removal.
    """
    kind = _EDIT_INVERSE.get(a.change_type or "")
    if kind is None or b.change_type not in ({"paste", "restore"} if kind == "paste" else {kind}):
        return False
    opposite = _EDIT_OPPOSITE.get(kind)
    return a.new == b.new if opposite is None else opposite.get(a.new or "") == b.new


def scene_checks(prediction: str, row: PairRow) -> dict[str, bool]:
    """Return which parts of a scene caption are correct, as {part: whether it is correct}.

    The parts are "type" (of the change), "object" (color and shape) and "outcome" (new color, material or direction, if
    the change has one). For an unchanged pair, the only part is "no change". The caption is correct if all parts are
    correct.
    """
    claim, true = parse(prediction), truth(row)
    if true.change_type == "none":
        return {"no change": claim.change_type == "none"}
    checks = {"type": claim.change_type == true.change_type, "object": same_object(claim, true)}
    if true.new or true.direction:
        checks["outcome"] = checks["type"] and (claim.new, claim.direction) == (true.new, true.direction)
    return checks


def edit_checks(prediction: str, row: PairRow) -> dict[str, bool]:
    """Return {"operation": whether the caption names the right edit}. Object and position are not checked."""
    return {"operation": parse_edit(prediction).change_type == row["change_type"]}


def scene_behaviour(predictions: Predictions, rows: Iterable[PairRow]) -> dict[str, Any]:
    """Return the behaviour figures of scene captions: shares from 0 to 1, and 95 % intervals under "intervals".

    Shares of changed pairs: change_found_rate (the caption claims a change), change_type_accuracy,
    changed_object_accuracy (color and shape are right), change_accuracy (type, object and result are right). Share of
    unchanged pairs: false_alarm_rate (the caption does not say that nothing changed). Share of the pairs whose swapped
    pair is also in `rows`: swap_consistency (the captions of the pair and of the swapped pair describe inverse changes,
    even if both captions are wrong).

    A caption that cannot be parsed counts as wrong in every figure. A figure without pairs is left out.
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
    """Return operation_accuracy: the share of edits whose caption names the right operation.

    The share is computed for all edits, and for each operation in operation_accuracy_by_operation.
    """
    table = list(rows)
    outcomes = [(row["group_id"], edit_checks(predictions[row["pair_id"]], row)["operation"]) for row in table]
    return {**rates({"operation_accuracy": outcomes}), "operation_accuracy_by_operation": _by_type(table, outcomes)}


def by_change_type(rows: Sequence[PairRow]) -> dict[str, list[int]]:
    """Return {change type: positions of the rows with this change type}, sorted by change type."""
    return {kind: [place for place, row in enumerate(rows) if row["change_type"] == kind]
            for kind in sorted({row["change_type"] for row in rows})}


def _by_type(rows: Sequence[PairRow], outcomes: Outcomes) -> dict[str, float]:
    return {kind: sum(outcomes[place][1] for place in places) / len(places)
            for kind, places in by_change_type(rows).items()}


def rates(outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """Return {name: mean of the outcomes under this name}, and the 95 % intervals of these means under "intervals".

    A name without outcomes is left out.
    """
    known = {name: values for name, values in outcomes.items() if values}
    return {**{name: sum(ok for _, ok in values) / len(values) for name, values in known.items()},
            "intervals": {name: interval(values) for name, values in known.items()}}


def interval(outcomes: Outcomes) -> list[float]:
    """Return the 95 % bootstrap interval [low, high] of the mean outcome.

    The bootstrap draws groups instead of pairs, because pairs from one scene or photograph are not independent.
    """
    groups = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in outcomes))}
    numbers = [groups[group] for group, _ in outcomes]
    right, count = np.bincount(numbers, [ok for _, ok in outcomes]), np.bincount(numbers)
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    shares = right[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    return [float(bound) for bound in np.percentile(shares, [2.5, 97.5])]


@dataclass(frozen=True)
class Grammar:
    """The functions that parse and judge the captions of a generated source.

    `read`: parse a caption. `undone`: return the change that undoes a change, which is the true change of the swapped
    pair; None if the grammar has no sentence for it. `says`: return whether a claimed change is the true change.
    `inverse`: return whether the second claimed change is the inverse of the first, even if both are wrong. `checks`:
    return which parts of a caption are correct. `behaviour`: return the behaviour figures of a set of captions.
    """

    read: Callable[[str], Change]
    undone: Callable[[Change], Change | None]
    says: Callable[[Change, Change], bool]
    inverse: Callable[[Change, Change], bool]
    checks: Callable[[str, PairRow], dict[str, bool]]
    behaviour: Callable[[Predictions, Iterable[PairRow]], dict[str, Any]]


# The keys are the values of Protocol.grammar. If a protocol has no grammar, captions are not parsed.
GRAMMARS: dict[str | None, Grammar] = {
    "scenes": Grammar(parse, undone, says_the_truth, inverse, scene_checks, scene_behaviour),
    "edits": Grammar(parse_edit, undone_edit, says_the_edit, inverse_edit, edit_checks, edit_behaviour)}
