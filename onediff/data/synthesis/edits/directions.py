"""Edits in both directions: an operation is applied forwards, or the pair of images is swapped and leads back."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from onediff.config import Nuisance
from onediff.data.synthesis.edits.operations import OPERATIONS
from onediff.data.synthesis.edits.pictures import Picture, Pixels
from onediff.data.synthesis.render import Thing

# The operation that leads back. What leads back from `remove` is `paste` if the removed object has a name.
WAY_BACK = {"brighten": "darken", "darken": "brighten", "more_contrast": "less_contrast",
            "less_contrast": "more_contrast", "color_cast": "remove_cast", "remove_cast": "color_cast",
            "black_and_white": "colorize", "colorize": "black_and_white", "blur": "sharpen", "sharpen": "blur",
            "crop": "zoom_out", "zoom_out": "crop", "rotate": "rotate", "remove": "restore", "restore": "remove",
            "paste": "remove", "none": "none"}
OPPOSITE_TURNS = {"to the left": "to the right", "to the right": "to the left"}

STEP = 20  # A pixel counts as changed if one of its color values (0 to 255) changed by more than this.
# An edit is visible if at least this share of the pixels changed. Each operation has its own value.
MIN_CHANGED = {"none": 0.0, "remove": 0.03, "paste": 0.02, "black_and_white": 0.08, "blur": 0.03,
               "more_contrast": 0.06, "less_contrast": 0.06}
MIN_CHANGED_ELSEWHERE = 0.2


@dataclass(frozen=True)
class Change:
    """A change from one picture to another, and the words for its caption.

    `new` is the position, the turn or the tint of the edit. The regions are the rectangles [left, top, right, bottom],
    in pixels, of an object that is only in the picture before or only in the picture after.
    """

    operation: str
    before: Pixels
    after: Pixels
    new: str | None = None
    thing: Thing | None = None
    region_before: list[int] | None = None
    region_after: list[int] | None = None

    @property
    def inverse(self) -> "Change":
        """The change that leads back from `after` to `before`."""
        back = "paste" if self.operation == "remove" and self.thing else WAY_BACK[self.operation]
        new = OPPOSITE_TURNS[self.new or ""] if back == "rotate" else self.new
        return Change(back, self.after, self.before, new, self.thing, self.region_after, self.region_before)


def draw_change(rng: Generator, operation: str, picture: Picture, limits: Nuisance) -> Change | None:
    """Draw a change with this operation, forwards or as the way back of another; None if it is not clear enough.

    For example, the picture of a pair of `sharpen` is the image after, and the image before is blurred.
    """
    ways = [source for source, back in WAY_BACK.items() if back == operation and source in OPERATIONS]
    if operation == "paste" and picture.kind == "canvas":
        ways.append("remove")
    backwards = operation not in OPERATIONS or (bool(ways) and rng.random() < 0.5)
    source = ways[int(rng.integers(len(ways)))] if backwards else operation
    change = _apply(rng, source, picture)
    if not _is_clear(change, limits):
        return None
    change = change.inverse if backwards else change
    return change if change.operation == operation else None


def _apply(rng: Generator, operation: str, picture: Picture) -> Change:
    edit = OPERATIONS[operation](rng, picture)
    before, after = (edit.region, None) if operation == "remove" else (None, edit.region)
    return Change(operation, picture.pixels, edit.after, edit.new, edit.thing, before, after)


def _is_clear(change: Change, limits: Nuisance) -> bool:
    """Return whether enough pixels changed, and the gain of the brightness is clearly an edit or clearly none."""
    # Both limits hold in both directions, because the way back of a gain is its reciprocal.
    brightest = max(limits.edit_light[1], 1 / limits.edit_light[0])
    total_before, total_after = (int(side.sum(dtype=np.int64)) for side in (change.before, change.after))
    gain = total_after / max(1, total_before)
    is_right_gain = {"brighten": gain >= brightest, "darken": gain <= 1 / brightest,
                     "more_contrast": limits.light[0] <= gain <= limits.light[1],
                     "less_contrast": limits.light[0] <= gain <= limits.light[1]}
    if not is_right_gain.get(change.operation, True):
        return False
    if change.before.shape != change.after.shape:  # A rotation exchanges width and height.
        return True
    difference = np.abs(change.before.astype(np.int16) - change.after).max(axis=2)
    return float((difference > STEP).mean()) >= MIN_CHANGED.get(change.operation, MIN_CHANGED_ELSEWHERE)
