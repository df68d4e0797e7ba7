from __future__ import annotations

import io

import numpy as np
import pytest
from damaged_images import KINDS, chunk, inserted, photographs, places, with_metadata
from PIL import Image

from onediff.inputs.metadata import EXIF, PROFILE, SCAN, jpeg_segments, stripped


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def info(content: bytes) -> dict[str, object]:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image.info


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("TIFF")])
def test_the_metadata_is_removed_and_no_pixel_changes(kind: str) -> None:
    content = with_metadata(photographs(1, side=96)[0], kind)
    assert np.array_equal(decoded(stripped(content)), decoded(content))
    # An AVIF file keeps its profile, and its rotation, which is not in EXIF.
    assert b"a camera" not in info(stripped(content)).get("exif", b"") and "xmp" not in info(stripped(content))
    assert ("icc_profile" in info(stripped(content))) == (kind == "AVIF")
    both = info(stripped(content, (EXIF, PROFILE)))
    assert b"a camera" in both["exif"] and both["icc_profile"] == info(content)["icc_profile"]
    assert "exif" not in info(stripped(content, (PROFILE,))) or kind == "AVIF"


def test_a_tiff_keeps_its_pixels_and_loses_its_texts_and_other_pages() -> None:
    picture = photographs(1, side=96)[0]
    file = io.BytesIO()
    picture.save(file, "TIFF", save_all=True, append_images=[picture], description="a text", icc_profile=b"profile")
    image = Image.open(io.BytesIO(stripped(file.getvalue())))
    assert image.n_frames == 1 and 270 not in image.tag_v2 and "icc_profile" not in image.info
    assert np.array_equal(np.asarray(image), np.asarray(picture))
    assert Image.open(io.BytesIO(stripped(file.getvalue(), (PROFILE,)))).info["icc_profile"] == b"profile"


def test_a_chunk_that_holds_pixels_is_never_removed() -> None:
    file = io.BytesIO()
    Image.new("P", (53, 37)).save(file, "PNG", transparency=0)
    content = file.getvalue()
    place = content.index(b"tRNS") + 4
    damaged = content[:place] + b"\1" + content[place + 1:]
    assert stripped(damaged) == damaged, "the checksum shows that the transparency is lost"
    assert stripped(inserted(content, chunk(b"tEXt", b"a\0b"))) == content


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_ends_anywhere_is_no_error(kind: str) -> None:
    content = with_metadata(photographs(1, side=32)[0], kind)
    for end in range(0, len(content), 7):
        assert isinstance(stripped(content[:end]), bytes)


def test_a_file_of_another_format_is_returned_unchanged() -> None:
    for content in (b"", b"GIF89a" + bytes(50), b"P6 1 1 255 abc", b"any text"):
        assert stripped(content) == content


def test_the_segments_of_a_jpeg_end_with_the_first_scan() -> None:
    content = with_metadata(photographs(1, side=96)[0], "JPEG")
    segments = list(jpeg_segments(content))
    assert segments[-1][0] == SCAN and segments[-1][2] == len(content)
    assert [marker for marker, _, _ in segments].count(SCAN) == 1
    exif = next(start for name, start, _ in places(content, "JPEG") if name == "EXIF")
    assert any(marker == b"\xff\xe1" and start < exif < end for marker, start, end in segments)
    filled = content[:2] + b"\xff" * 5 + content[2:]
    assert [marker for marker, _, _ in jpeg_segments(filled)] == [marker for marker, _, _ in segments]
