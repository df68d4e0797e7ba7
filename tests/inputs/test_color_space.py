"""Small real files state a color space without a color profile: in PNG chunks, in the box nclx, or in EXIF."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from profiles import ADOBE_RGB, SRGB, rgb_profile

from onediff.inputs.images import decode, open_image
from onediff.inputs.metadata import EXIF, PROFILE, stripped

DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
CHRM = {"sRGB": (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
        "Adobe RGB": (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)}
BROKEN_TEXT = b"\0\0\0\4zTXta\0\0x\0\0\0\0"


def picture() -> Image.Image:
    """Return a picture of moderate colors, which every color space of the tests contains."""
    values = np.random.default_rng(3).uniform(70, 180, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((53, 37), Image.Resampling.BICUBIC)


def in_space(primaries: np.ndarray, gamma: float | None) -> Image.Image:
    """Return the picture in another color space; the gamma None is the curve of sRGB."""
    share = np.asarray(picture(), np.float64) / 255
    light = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    light = np.linalg.solve(primaries, SRGB @ light.reshape(-1, 3).T).T.clip(0, 1)
    values = light ** (1 / gamma) if gamma else np.where(light <= 0.0031308, 12.92 * light,
                                                         1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray((255 * values + 0.5).astype(np.uint8).reshape(37, 53, 3))


def png_file(image: Image.Image, *, profile: bytes = b"", **chunks: bytes) -> bytes:
    info, file = PngInfo(), io.BytesIO()
    for name, content in chunks.items():
        info.add(name.encode(), content)
    image.save(file, "PNG", pnginfo=info, icc_profile=profile or None)
    return file.getvalue()


def jpeg_file(image: Image.Image, space: int, index: str | None, **options: object) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = space
    if index:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {ExifTags.Interop.InteropIndex: index}
    image.save(file, "JPEG", quality=100, subsampling=0, exif=exif, **options)
    return file.getvalue()


def gama(value: float) -> bytes:
    return struct.pack(">I", round(100_000 * value))


def chrm(name: str) -> bytes:
    return struct.pack(">8I", *CHRM[name])


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())


WIDE = {
    "gAMA and cHRM": png_file(in_space(ADOBE_RGB, 2.2), gAMA=gama(1 / 2.2), cHRM=chrm("Adobe RGB")),
    "gAMA": png_file(in_space(SRGB, 1.8), gAMA=gama(1 / 1.8)),
    "cHRM": png_file(in_space(ADOBE_RGB, None), cHRM=chrm("Adobe RGB")),
    "cICP": png_file(in_space(DISPLAY_P3, None), cICP=bytes([12, 13, 0, 1])),
    "cICP and another profile": png_file(in_space(DISPLAY_P3, None), cICP=bytes([12, 13, 0, 1]),
                                         profile=rgb_profile(ADOBE_RGB, 1.8)),
    "a profile and PQ": png_file(in_space(ADOBE_RGB, 1.8), cICP=bytes([9, 16, 0, 1]),
                                 profile=rgb_profile(ADOBE_RGB, 1.8)),
    "EXIF": jpeg_file(in_space(ADOBE_RGB, 2.2), 65535, "R03"),
}


@pytest.mark.parametrize("states", WIDE)
def test_a_picture_in_another_color_space_equals_the_picture_in_srgb(states: str) -> None:
    decoded = decode(WIDE[states])
    assert distance(Image.open(io.BytesIO(WIDE[states])), picture()) > 2
    assert distance(decoded.image, picture()) < (1 if states == "EXIF" else 0.6)
    assert decoded.notes == ()


def test_the_box_nclx_of_avif_is_converted() -> None:
    file = io.BytesIO()
    in_space(DISPLAY_P3, None).save(file, "AVIF", quality=100, subsampling="4:4:4")
    old, new = b"nclx\0\1\0\x0d", b"nclx\0\x0c\0\x0d"
    assert file.getvalue().count(old) == 1
    assert distance(open_image(file.getvalue()), picture()) > 2
    assert distance(open_image(file.getvalue().replace(old, new)), picture()) < 1


@pytest.mark.parametrize("chunks", [
    {"gAMA": gama(1 / 2.2)}, {"gAMA": gama(0.45), "cHRM": chrm("sRGB")}, {"cHRM": chrm("sRGB")},
    {"sRGB": b"\0", "gAMA": gama(1), "cHRM": chrm("Adobe RGB")}, {"cICP": bytes([1, 13, 0, 1]), "gAMA": gama(1)},
    {"cICP": bytes([2, 2, 0, 1])}])
def test_a_png_in_srgb_does_not_change(chunks: dict[str, bytes]) -> None:
    decoded = decode(png_file(picture(), **chunks))
    assert decoded.image.tobytes() == picture().tobytes() and decoded.notes == ()


@pytest.mark.parametrize(("space", "index"), [(1, "R98"), (1, "R03"), (1, None)])
def test_a_photograph_in_srgb_does_not_change(space: int, index: str | None) -> None:
    decoded = decode(jpeg_file(picture(), space, index))
    assert decoded.image.tobytes() == Image.open(io.BytesIO(jpeg_file(picture(), space, index))).tobytes()
    assert decoded.notes == ()


@pytest.mark.parametrize(("file", "note"), [
    (png_file(picture(), cICP=bytes([9, 16, 0, 1])), r"primaries 9, transfer function 16"),
    (png_file(picture(), cICP=bytes([11, 17, 0, 1])), r"primaries 11, transfer function 17"),
    (png_file(picture(), gAMA=gama(0)), "gAMA states the impossible value 0"),
    (png_file(picture(), cHRM=bytes(32)), "the primaries that the file states are impossible"),
    (png_file(picture(), cHRM=struct.pack(">8I", *[33000] * 8)), "the primaries that the file states are impossible"),
    (jpeg_file(picture(), 65535, None), "EXIF says that the color space is not sRGB"),
    (jpeg_file(picture(), 65535, "R98"), "EXIF says that the color space is not sRGB"),
])
def test_a_color_space_that_is_not_converted_is_noted(file: bytes, note: str) -> None:
    decoded = decode(file)
    assert decoded.image.tobytes() == Image.open(io.BytesIO(file)).tobytes()
    assert len(decoded.notes) == 1 and note in decoded.notes[0] and "taken as sRGB" in decoded.notes[0]


def test_a_color_profile_is_used_before_exif() -> None:
    file = jpeg_file(in_space(ADOBE_RGB, 1.8), 65535, None, icc_profile=rgb_profile(ADOBE_RGB, 1.8))
    assert decode(file).notes == () and distance(open_image(file), picture()) < 1


@pytest.mark.parametrize("states", ["gAMA and cHRM", "cICP"])
def test_the_color_space_stays_known_when_other_metadata_is_broken(states: str) -> None:
    start = WIDE[states].index(b"IDAT") - 4
    broken = WIDE[states][:start] + BROKEN_TEXT + WIDE[states][start:]
    assert stripped(broken, (EXIF, PROFILE)) == WIDE[states]
    assert distance(open_image(broken), picture()) < 0.6
