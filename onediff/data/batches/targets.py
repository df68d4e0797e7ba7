"""Targets of the auxiliary losses: where a pair changed, and which attributes the change has.

The facts of a pair come from its record. `facts_of` keeps those that the losses need, as JSON for the corpus store, and
`targets_of` turns the facts of a batch into tensors.

Shapes:  P pairs of a batch, G places along one side of a square image, A attributes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onediff.data.record import Record
from onediff.inputs.attributes import OF_THE_OBJECT, result_of
from onediff.inputs.boxes import coverage, on_the_grid
from onediff.inputs.images import image_size
from onediff.inputs.processing import IGNORED

SIDES = ("before", "after")
# These edits move or replace the whole picture, so their regions are no changed places.
WHOLE = ("crop", "rotate", "zoom_out")

Facts = dict[str, Any]
Classes = Mapping[str, Collection[str]]
Targets = Callable[[Sequence[Facts]], dict[str, Tensor]]


def facts_of(record: Record) -> Facts:
    """Return the known facts about the change of a pair.

    `changed` is True, False or None (unknown). `boxes` has the changed region of each image, or null for an image
    without one, in shares of the square to which the model pads an image; it is null if the places are unknown.
    `attributes` maps an attribute to its class, or to null if the change has no such attribute.
    """
    kind, provenance = record.change_type, record.provenance
    attributes: dict[str, str | None] = {"change_type": kind}
    if "object" in provenance:
        attributes |= {name: (provenance["object"] or {}).get(name) for name in OF_THE_OBJECT}
    if "new" in provenance:
        attributes["result"] = provenance["new"] and result_of(provenance["new"])
    return {"changed": None if kind in ("", "unlabelled") else kind != "none", "boxes": _boxes(record),
            "attributes": attributes}


def _boxes(record: Record) -> list[list[float] | None] | None:
    """Return the value `boxes` of `facts_of`."""
    if record.change_type == "none":
        return [None, None]
    regions = [record.provenance.get(f"region_{side}") for side in SIDES]
    if record.change_type in WHOLE or not any(regions):
        return None
    return [list(on_the_grid(region, image_size(image), side=1)) if region else None
            for region, image in zip(regions, record.images, strict=True)]


def targets_of(facts: Sequence[Facts], classes: Classes, *, places: int) -> dict[str, Tensor]:
    """Return the targets for P pairs: place_targets (P, 2, G * G), changed_targets (P,) and object_targets (P, A).

    Everything that the facts do not state is IGNORED, and so is an attribute with a class that `classes` lacks. The
    target of an attribute that the change does not have is the number of its classes.
    """
    shares = np.full((len(facts), 2, places * places), IGNORED, dtype=np.float32)
    numbers = torch.full((len(facts), len(classes)), IGNORED)
    for row, fact in enumerate(facts):
        for side, box in enumerate(fact["boxes"] or ()):
            shares[row, side] = coverage([value * places for value in box], side=places).ravel() if box else 0
        for column, (name, options) in enumerate(classes.items()):
            names = [*options, None]
            if (value := fact["attributes"].get(name, IGNORED)) in names:
                numbers[row, column] = names.index(value)
    changed = [IGNORED if fact["changed"] is None else float(fact["changed"]) for fact in facts]
    return {"place_targets": torch.from_numpy(shares), "changed_targets": torch.tensor(changed, dtype=torch.float32),
            "object_targets": numbers}
