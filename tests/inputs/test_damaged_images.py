"""Images whose metadata, color profile, chunks or end are damaged: the pixels decide whether an image can be read."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from damaged_images import KINDS, damaged, photographs, with_metadata

from onediff.inputs.images import decode, image_size


def faults(num_photographs: int, *, side: int) -> tuple[int, list[str]]:
    """Decode the damaged files made from some photographs; return their number, and what is wrong with the images."""
    count, found = 0, []
    for number, picture in enumerate(photographs(num_photographs, side=side)):
        kind = KINDS[number % len(KINDS)]
        content = with_metadata(picture, kind)
        intact = decode(content)
        assert intact.notes == ()
        expected = np.asarray(intact.image)
        for how, file in damaged(content, kind, seed=number):
            count += 1
            try:
                decoded = decode(file)
            except ValueError as error:
                found.append(f"{number} {kind} {how}: {error}")
                continue
            pixels, notes = np.asarray(decoded.image), " ".join(decoded.notes)
            if image_size(file) != decoded.image.size:
                found.append(f"{number} {kind} {how}: image_size returns {image_size(file)}")
            if pixels.shape != expected.shape and "orientation" in notes:
                pixels = np.rot90(pixels, -1)
            # With five other bytes, EXIF may state another orientation, and a profile may be that of other colors.
            if not np.array_equal(pixels, expected) and not how.endswith("five bytes"):
                found.append(f"{number} {kind} {how}: other pixels, notes: {notes or 'none'}")
    return count, found


def test_every_damaged_image_with_whole_pixels_is_read() -> None:
    count, found = faults(6, side=64)
    assert found == []
    assert count > 150


@pytest.mark.slow
def test_500_damaged_images_of_20_photographs_are_read_and_need_little_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count, found = faults(20, side=500)
    assert found == []
    assert count >= 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB
