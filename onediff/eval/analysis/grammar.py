"""The grammars that read a caption of a generated pair: which change the caption claims.

The sentence templates that generated the references also parse the captions. Every caption is read with the templates
of both sources, `scenes` and `edits`, because a model that is always asked the same question may answer with a sentence
of either source.
"""

import functools
import re
from dataclasses import dataclass, replace

from onediff.data.synthesis.phrases import DIRECTIONS, EDIT_TEMPLATES, SCENE_TEMPLATES, SYNONYMS
from onediff.data.synthesis.render import COLORS, MATERIALS, SHAPES, SIZES
from onediff.eval.metrics.words import clean
from onediff.eval.protocols import PairRow

_KINDS = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "material": MATERIALS}
_WORDS = {synonym: (kind, word) for kind, words in _KINDS.items() for word in words
          for synonym in SYNONYMS.get(word, (word,))}
_NEIGHBOUR = re.compile(r" (?:left of|right of|in front of|behind) the ")
_INVERSE = {"color": "color", "texture": "texture", "add": "drop", "drop": "add", "move": "move"}
_OPPOSITE = {"left": "right", "right": "left", "front": "back", "back": "front"}
# The operations that lead back from an edited picture to the original one. Only the sentence for a pasted object names
# the object; `restore` asks to put back what a photograph showed at a place.
_EDIT_INVERSES = {"brighten": ("darken",), "darken": ("brighten",), "more_contrast": ("less_contrast",),
                  "less_contrast": ("more_contrast",), "color_cast": ("remove_cast",), "remove_cast": ("color_cast",),
                  "black_and_white": ("colorize",), "colorize": ("black_and_white",), "blur": ("sharpen",),
                  "sharpen": ("blur",), "crop": ("zoom_out",), "zoom_out": ("crop",), "rotate": ("rotate",),
                  "paste": ("remove",), "restore": ("remove",), "remove": ("paste", "restore")}
_OPPOSITE_TURN = {"to the left": "to the right", "to the right": "to the left"}
# The same change in the words of the other source.
_EDIT_AS_SCENE = {"paste": "add", "restore": "add", "remove": "drop"}
_SCENE_AS_EDIT = {"add": "paste", "drop": "remove"}


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


def read_scene(caption: str) -> Change:
    """Read a caption for a pair of `scenes` with both grammars, and return the change that the caption claims.

    A request to paste or to restore an object counts as `add`, and a request to remove one as `drop`. Any other edit,
    such as `brighten`, keeps the name of the operation: the caption claims a change, of a type that scenes do not have.
    Returns UNREADABLE if no grammar matches the caption.
    """
    claim = parse(caption)
    if claim == UNREADABLE:
        claim = parse_edit(caption)
        if claim.change_type in _EDIT_AS_SCENE:
            return replace(claim, change_type=_EDIT_AS_SCENE[claim.change_type], new=None)
    return claim


def read_edit(caption: str) -> Change:
    """Read a caption for a pair of `edits` with both grammars, and return the edit that the caption claims.

    The claim that an object was added counts as `paste`, and the claim that one disappeared as `remove`. Any other
    change of a scene keeps the name of its type: it is a claim of a change, but never the right operation. Returns
    UNREADABLE if no grammar matches the caption.
    """
    claim = parse_edit(caption)
    if claim == UNREADABLE:
        claim = parse(caption)
        if claim.change_type in _SCENE_AS_EDIT:
            return replace(claim, change_type=_SCENE_AS_EDIT[claim.change_type])
    return claim


def parse(caption: str) -> Change:
    """Parse a caption in the words of the source `scenes`, and return the change that the caption claims.

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
    """Parse a caption in the words of the source `edits`, and return the edit that the caption asks for.

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
    """Return the edit that undoes `edit`: the true edit of the swapped pair. None if nothing or nothing known was done.

    What was removed from a photograph has no name, so `restore` brings it back; a removed object that is known is
    pasted again.
    """
    kinds = _EDIT_INVERSES.get(edit.change_type or "")
    if kinds is None:
        return None
    kind = kinds[0] if edit.shape else kinds[-1]
    return replace(edit, change_type=kind, new=_OPPOSITE_TURN.get(edit.new or "") if kind == "rotate" else edit.new)


def inverse_edit(a: Change, b: Change) -> bool:
    """Return whether edit b undoes edit a.

    A caption that asks to remove an object does not name the object, so pasting any object at the same place, or
    restoring what was there, undoes a removal.
    """
    if b.change_type not in _EDIT_INVERSES.get(a.change_type or "", ()):
        return False
    return (_OPPOSITE_TURN.get(a.new or "") if b.change_type == "rotate" else a.new) == b.new
