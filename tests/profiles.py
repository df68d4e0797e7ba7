"""Makes color profiles (ICC) for tests: RGB with given primaries, grey, and CMYK."""

from __future__ import annotations

import struct

import numpy as np

# the colors of red, green and blue as XYZ with the white point D50, in the columns of each matrix
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
D50 = (0.9642, 1.0, 0.8249)


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """Return the profile of an RGB color space with these primaries, whose three channels have the same gamma."""
    colors = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", colors | {name: _gamma(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma: float) -> bytes:
    """Return the profile of a grey color space."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _gamma(gamma)})


def cmyk_profile() -> bytes:
    """Return the profile of a printer whose ink is all grey: lightness falls with the sum of the four inks."""
    corners = np.indices((2, 2, 2, 2)).reshape(4, 16).sum(axis=0)
    lab = np.stack([255 - corners * 60, np.full(16, 128), np.full(16, 128)], axis=1).clip(0, 255).astype(np.uint8)
    line = bytes(range(256))
    table = struct.pack(">4s4xBBBx9i", b"mft1", 4, 3, 2, *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table + line * 4 + lab.tobytes() + line * 3})


def _xyz(values: np.ndarray | tuple[float, ...]) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(round(65536 * float(value)) for value in values))


def _gamma(gamma: float) -> bytes:
    return struct.pack(">4s4xIH2x", b"curv", 1, round(256 * gamma))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(D50)} | tags
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, place + len(body), len(content))
        body += content
    head = struct.pack(">I4xI4s4s4s12x4s28x3i", place + len(body), 0x02100000, kind, space, connection, b"acsp",
                       *(round(65536 * value) for value in D50))
    return head.ljust(128, b"\0") + table + body
