from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from onediff.inputs.formats import FORMATS, IMAGE_ENDINGS, format_of, refusal
from onediff.inputs.images import open_image
from onediff.inputs.repair import UnsupportedImageError, readable


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "HEIF"])
def test_each_format_is_recognized_by_its_first_bytes(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (37, 23), "red").save(file, kind)
    assert format_of(file.getvalue()) == kind
    assert refusal(file.getvalue(), FORMATS) is None


def test_no_two_formats_share_an_ending() -> None:
    assert len(set(IMAGE_ENDINGS)) == len(IMAGE_ENDINGS)
    assert all(ending == ending.lower() and ending.startswith(".") for ending in IMAGE_ENDINGS)
    assert {".jfif", ".ppm", ".avif", ".heic"} <= set(IMAGE_ENDINGS)


@pytest.mark.parametrize(("head", "name"), [
    (b"8BPS\0\1", "Photoshop"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"), (b"%PDF-1.7\n", "PDF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x0a\xfa\x1f", "JPEG XL"), (b"II\xbc\x01", "JPEG XR"),
    (b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg"', "SVG"), (b" <svg a", "SVG"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI", "Apple-optimized PNG"), (b"\0\0\1\0\2\0", "icon"), (b"SIMPLE  =    T", "FITS"),
    (bytes(128) + b"DICM", "DICOM"), (b"ZISRAWFILE", "Zeiss"), (b"\x76\x2f\x31\x01", "OpenEXR"), (b"Pf\n3 3\n", "PFM"),
    (b"II*\0\x10\0\0\0CR\2\0", "raw camera"), (b"\0\0\0\x18ftypcrx ", "raw camera"), (b"FUJIFILMCCD-RAW", "raw camera"),
    (b"\0\0\0\x18ftypmp42", "a video"), (b"<!DOCTYPE html>\n<html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
])
def test_a_file_of_another_kind_is_refused_by_name(head: bytes, name: str) -> None:
    with pytest.raises(ValueError, match=f"image: .*{name}") as caught:
        open_image(head + bytes(200))
    assert "\n" not in str(caught.value)


def test_heic_is_refused_without_the_extra_and_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # so that the import fails although the package is installed
    readable.cache_clear()
    # These bytes are the start of a real file.
    start = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf\0\0\1|meta\0\0\0\0\0\0\0!hdlr\0\0\0\0\0\0\0\0pict"
    try:
        assert "HEIF" not in readable()
        with pytest.raises(UnsupportedImageError, match=r"image: a HEIC image.*pip install 'onediff-idc\[heic\]'"):
            open_image(start + bytes(400))
    finally:
        readable.cache_clear()


def test_heic_is_read_with_the_extra() -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: the extra 'heic'")
    picture = Image.effect_mandelbrot((160, 96), (-2, -1, 1, 1), 20).convert("RGB")
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(file, "HEIF", quality=-1, exif=exif.tobytes())
    image = open_image(file.getvalue())
    assert image.size == (96, 160)
    assert np.abs(np.rot90(np.asarray(image, np.int16)) - np.asarray(picture, np.int16)).mean() < 2
    broken = file.getvalue().replace(b"MM\0*", b"\xff" * 4).replace(b"II*\0", b"\xff" * 4)
    assert broken != file.getvalue()
    assert open_image(broken).size == (96, 160), "the file itself states the rotation, too"


def test_a_sequence_that_may_hold_avif_or_heic_is_recognized_by_the_formats_that_it_lists() -> None:
    assert format_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf") == "AVIF"
    assert format_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf") == "HEIF"
