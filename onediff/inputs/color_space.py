"""Finds the color space that a file states, also where it has no color profile (ICC), and returns it as a profile.

PNG states it in the chunks cICP, sRGB, gAMA and cHRM, AVIF and HEIC in the box nclx, and cameras in EXIF.
"""

import re
import struct

import numpy as np
from PIL import ExifTags, Image

from onediff.inputs.color import ProfileError
from onediff.inputs.repair import BROKEN

SEARCHED = 1 << 16  # number of bytes at the start of a file in which cICP or nclx is searched
# x and y of white, red, green and blue. The white of all of them is D65.
_SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_ADOBE_RGB = (*_SRGB[:4], 0.21, 0.71, *_SRGB[6:])
_ADOBE_GAMMA = 563 / 256
# The numbers of color spaces in ITU-T H.273, which cICP and nclx use. 2 means that the file does not say it.
_PRIMARIES = {1: _SRGB, 2: _SRGB,
              5: (*_SRGB[:4], 0.29, 0.60, 0.15, 0.06),  # video of Europe
              6: (*_SRGB[:2], 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),  # video of North America
              9: (*_SRGB[:2], 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
              12: (*_SRGB[:2], 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)}  # Display P3
# The gamma of each transfer function; None is the curve of sRGB, with which browsers also show pictures in the curve
# of video. 16 (PQ) and 18 (HLG) have a high dynamic range, which has no standard conversion to sRGB.
_GAMMAS = {**dict.fromkeys((1, 2, 6, 13, 14, 15)), 4: 2.2, 5: 2.8, 8: 1.0}
_CODES = {"PNG": re.compile(rb"\0\0\0\x04cICP(.)(.)\0[\0\x01]", re.DOTALL),
          **dict.fromkeys(("AVIF", "HEIF"), re.compile(rb"colrnclx\0(.)\0(.)", re.DOTALL))}
# The tolerances are those of libpng. A gamma of 2.2 with the primaries of sRGB means sRGB.
_NEAR_GAMMA, _NEAR_PRIMARIES = 0.05, 0.01
_TO_CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # Bradford
_D50 = np.array([0.9642, 1.0, 0.8249])
_UNCALIBRATED = 65535


def color_profile(image: Image.Image, head: bytes) -> bytes | None:
    """Return the profile of an opened image: b"" for sRGB, also if the file states nothing, or None for a broken one.

    `head` are the first SEARCHED bytes of the file. Raises ProfileError, which says what the file states, if this color
    space cannot be converted.
    """
    profile: bytes | None = image.info.get("icc_profile", b"")  # None if Pillow could not read it
    pattern = _CODES.get(image.format or "")
    codes = pattern.search(head.split(b"IDAT")[0]) if pattern else None
    if codes and (not profile or image.format == "PNG"):  # In PNG, cICP has priority over a profile.
        primaries, transfer = codes[1][0], codes[2][0]
        if primaries in _PRIMARIES and transfer in _GAMMAS:
            return _made(_PRIMARIES[primaries], _GAMMAS[transfer])
        if not profile:
            raise ProfileError(f"the color space is not converted (ITU-T H.273: primaries {primaries}, transfer "
                               f"function {transfer})")
    if profile != b"" or "srgb" in image.info:
        return profile
    if "gamma" in image.info or "chromaticity" in image.info:
        return _of_png(image)
    return _of_exif(image)


def _of_png(image: Image.Image) -> bytes:
    """Return the profile for the chunks gAMA and cHRM of a PNG."""
    exponent, chromaticity = image.info.get("gamma"), image.info.get("chromaticity", _SRGB)
    if np.abs(np.subtract(chromaticity, _SRGB)).max() <= _NEAR_PRIMARIES:
        chromaticity = _SRGB
    if exponent is None or (abs(exponent * 2.2 - 1) <= _NEAR_GAMMA and chromaticity == _SRGB):
        return _made(chromaticity, None)
    if not 0.1 <= exponent <= 10:
        raise ProfileError(f"the chunk gAMA states the impossible value {exponent:g}")
    return _made(chromaticity, 1 / exponent)


def _of_exif(image: Image.Image) -> bytes:
    """Return the profile of Adobe RGB if EXIF states this color space, and b"" for sRGB or EXIF that says nothing."""
    try:
        exif = image.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) if space else None
    except BROKEN:
        return b""  # Another note says that EXIF cannot be read.
    if space not in (_UNCALIBRATED, 2):
        return b""
    if space == 2 or str(index).startswith("R03"):
        return _made(_ADOBE_RGB, _ADOBE_GAMMA)
    raise ProfileError("EXIF says that the color space is not sRGB, but not which one it is")


def _made(chromaticity: tuple[float, ...], gamma: float | None) -> bytes:
    """Return a profile (ICC version 4) with these primaries; the gamma None is the curve of sRGB.

    Raises ProfileError if no color space has these primaries.
    """
    if chromaticity == _SRGB and gamma is None:
        return b""
    kind, values = (0, [gamma]) if gamma else (3, [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
    curve = struct.pack(f">4s4xH2x{len(values)}i", b"para", kind, *(round(65536 * value) for value in values))
    try:
        white, *colors = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in np.reshape(chromaticity, (4, 2)).tolist())
        mixed = np.stack(colors, axis=1)
        mixed = mixed * np.linalg.solve(mixed, white)
        adapted = np.linalg.solve(_TO_CONES, (_TO_CONES @ _D50 / (_TO_CONES @ white))[:, None] * (_TO_CONES @ mixed))
        columns = [struct.pack(">4s4x3i", b"XYZ ", *(round(65536 * value) for value in column))
                   for column in (_D50.tolist(), *adapted.T.tolist())]
    except (ZeroDivisionError, np.linalg.LinAlgError, struct.error, ValueError, OverflowError):
        raise ProfileError("the primaries that the file states are impossible") from None
    names = (b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC")
    tags = dict(zip(names, [*columns, curve, curve, curve], strict=True))
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    head = struct.pack(">I4xI4s4s4s12x4s28x3i", start + len(body), 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp",
                       *(round(65536 * value) for value in _D50.tolist()))
    return head.ljust(128, b"\0") + table + body
