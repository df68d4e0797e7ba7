"""Makes image files whose pixels are intact, but whose metadata, color profile, chunks or end are damaged."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageCms, ImageOps

from onediff.data.synthesis.edits.photographs import PHOTOS, photo_paths

PARTS = ("EXIF", "profile", "text")
KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "TIFF with LZW", "AVIF")
Damage = Callable[[bytes, Generator], bytes]


def photographs(count: int, *, side: int) -> list[Image.Image]:
    """Return some of the photographs that Python packages contain, `side` pixels wide."""
    paths = [path for split in PHOTOS for path in photo_paths(split, None).values()][:count]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return [ImageOps.fit(picture, (side, side * 3 // 4)) for picture in pictures]


def with_metadata(image: Image.Image, kind: str) -> bytes:
    """Return an image file with EXIF (which rotates the picture by a quarter turn), a color profile, and a text."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera " * 9
    if kind != "TIFF with LZW":  # Pillow cannot write it.
        exif[0x8769] = {0x9286: b"a comment " * 20}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"JPEG": {"quality": 90, "comment": b"a comment " * 30}, "WEBP": {"lossless": True, "xmp": XMP},
               "TIFF with LZW": {"compression": "tiff_lzw"}, "AVIF": {"quality": 90, "speed": 10, "xmp": XMP}}
    file = io.BytesIO()
    image.save(file, kind.split()[0], exif=exif.tobytes(), icc_profile=profile, **options.get(kind, {}))
    content = file.getvalue()
    return inserted(content, chunk(b"tEXt", b"Title\0" + b"a text " * 40)) if kind == "PNG" else content


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">' + b"<a>text</a>" * 30 + b"</x:xmpmeta>"


def chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def inserted(content: bytes, new: bytes) -> bytes:
    """Return a PNG file with a chunk before its pixels."""
    place = content.index(b"IDAT") - 4
    return content[:place] + new + content[place:]


def places(content: bytes, kind: str) -> list[tuple[str, int, int]]:
    """Return (name, start, end) of the content of each part of the metadata: EXIF, a profile, and a text."""
    if kind == "PNG":
        starts = {name: content.index(mark) + 4 for name, mark in zip(PARTS, (b"eXIf", b"iCCP", b"tEXt"), strict=True)}
        return [(name, start, start + int.from_bytes(content[start - 8 : start - 4])) for name, start in starts.items()]
    if kind == "WEBP":
        starts = {name: content.index(mark) + 8 for name, mark in zip(PARTS, (b"EXIF", b"ICCP", b"XMP "), strict=True)}
        return [(name, start, start + int.from_bytes(content[start - 4 : start], "little"))
                for name, start in starts.items()]
    profile = content.index(b"acsp") - 36
    found = [("profile", profile, profile + int.from_bytes(content[profile : profile + 4]))]
    texts = re.search(rb"(a camera )+", content)
    assert texts
    if kind == "JPEG":
        start, text = content.index(b"Exif\0\0") + 6, content.index(b"a comment " * 30)
        return [*found, ("EXIF", start, texts.end()), ("text", text, text + 300)]
    if kind == "AVIF":
        start = max(content.rfind(order, 0, texts.start()) for order in (b"II*\0", b"MM\0*"))
        return [*found, ("EXIF", start, texts.end()), ("text", content.index(XMP), content.index(XMP) + len(XMP))]
    return [*found, ("text", texts.start(), texts.end())]


def replaced(content: bytes, kind: str, number: int, new: Callable[[bytes], bytes]) -> bytes:
    """Replace one part of the metadata by other bytes of equal length, and correct the checksum of a PNG."""
    _, start, end = places(content, kind)[number]
    part = new(content[start:end])
    assert len(part) == end - start
    content = content[:start] + part + content[end:]
    if kind == "PNG":
        content = content[:end] + struct.pack(">I", zlib.crc32(content[start - 4 : end])) + content[end + 4 :]
    return content


def _flipped(part: bytes, rng: Generator) -> bytes:
    values = np.frombuffer(part, np.uint8).copy()
    values[rng.integers(len(values), size=5)] = rng.integers(256, size=5)
    return values.tobytes()


# how the content of one part of the metadata is damaged
CONTENTS: dict[str, Damage] = {
    "zeros": lambda part, rng: bytes(len(part)),
    "ones": lambda part, rng: b"\xff" * len(part),
    "noise": lambda part, rng: rng.bytes(len(part)),
    "five bytes": _flipped,
    "half": lambda part, rng: part[: len(part) // 2] + bytes(len(part) - len(part) // 2),
}


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _after_start(content: bytes, segments: bytes) -> bytes:
    return content[:2] + segments + content[2:]


def _tag(content: bytes, number: int, *, value: int, count: int | None = None, kind: int | None = None) -> bytes:
    """Change an entry in the list of tags of a little-endian TIFF file."""
    first = int.from_bytes(content[4:8], "little") + 2
    num_tags = int.from_bytes(content[first - 2 : first], "little")
    place = next(place for place in range(first, first + 12 * num_tags, 12)
                 if content[place : place + 2] == struct.pack("<H", number))
    old_kind, old_count = struct.unpack("<HI", content[place + 2 : place + 8])
    new = struct.pack("<HHII", number, old_kind if kind is None else kind, old_count if count is None else count, value)
    return content[:place] + new + content[place + 12 :]


def _next_page(content: bytes, place: int) -> bytes:
    first = int.from_bytes(content[4:8], "little") + 2
    end = first + 12 * int.from_bytes(content[first - 2 : first], "little")
    return content[:end] + struct.pack("<I", place) + content[end + 4 :]


# how the chunks and the end of a file are damaged, without any damage to the pixels
STRUCTURE: dict[str, dict[str, Damage]] = {
    "PNG": {
        "no end": lambda content, rng: content[: content.rindex(b"IEND") - 4],
        "half an end": lambda content, rng: content[:-7],
        "no last checksum": lambda content, rng: content[: content.rindex(b"IEND") - 6],
        "text after the pixels cut": lambda content, rng: content[:-12] + chunk(b"tEXt", b"a\0" + bytes(999))[:500],
        "a wrong checksum": lambda content, rng: inserted(content, chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
        "a length too large": lambda content, rng: inserted(content, b"\x7f\0\0\0tEXta\0b" + bytes(4)),
        "a length too small": lambda content, rng: inserted(content, b"\0\0\0\1tEXta\0 text" + bytes(4)),
        "a text of 3 MB": lambda content, rng: inserted(
            content, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 3_000_000))),
        "a profile of 90 MB": lambda content, rng: inserted(
            content, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(90_000_000), 1))),
        "300 texts": lambda content, rng: inserted(content, chunk(b"iTXt", b"a\0\0\0\0\0" + b"text " * 99) * 300),
        "a raw profile": lambda content, rng: inserted(
            content, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  12\nno hex digits")),
        "empty chunks": lambda content, rng: inserted(content, b"".join(
            chunk(name, b"") for name in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"iDOT", b"acTL", b"fcTL"))),
        "a text without name": lambda content, rng: inserted(content, chunk(b"zTXt", b"a\0\7") + chunk(b"iTXt", b"")),
        "a broken animation": lambda content, rng: inserted(
            content, chunk(b"acTL", struct.pack(">II", 5, 0)) + chunk(b"fcTL", rng.bytes(26))),
    },
    "JPEG": {
        "no end": lambda content, rng: content.removesuffix(b"\xff\xd9"),
        "half an end": lambda content, rng: content.removesuffix(b"\xd9"),
        "comments of 600 kB": lambda content, rng: _after_start(content, _segment(0xFE, bytes(60_000)) * 10),
        "a broken list of pictures": lambda content, rng: _after_start(
            content, _segment(0xE2, b"MPF\0" + rng.bytes(99))),
        "a list of no pictures": lambda content, rng: _after_start(content, _segment(
            0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\5\0\0\0\0\0\0\0")),
        "a broken Photoshop part": lambda content, rng: _after_start(
            content, _segment(0xED, b"Photoshop 3.0\x008BIM" + rng.bytes(50))),
        "a profile that is cut": lambda content, rng: _after_start(content, _segment(0xE2, b"ICC_PROFILE\0")),
        "a profile in 9 parts": lambda content, rng: _after_start(content, _segment(0xE2, b"ICC_PROFILE\0\2\x09abc")),
        "EXIF twice": lambda content, rng: _after_start(content, _segment(0xE1, b"Exif\0\0" + rng.bytes(60))),
        "bytes between markers": lambda content, rng: _after_start(content, b"\xff" * 9 + _segment(0xFE, b"a")),
        "an empty JFIF": lambda content, rng: content.replace(b"\xff\xe0\0\x10JFIF", b"\xff\xe0\0\x10XXXX"),
        "a later edition": lambda content, rng: _after_start(content, _segment(0xE1, b"http://ns.adobe.com/xap/1.0/")),
    },
    "WEBP": {
        "XMP is cut": lambda content, rng: content[:-99],
        "EXIF is cut": lambda content, rng: content[: places(content, "WEBP")[0][1] + 9],
        "no size": lambda content, rng: content[:4] + bytes(4) + content[8:],
        "a size too large": lambda content, rng: content[:4] + struct.pack("<I", len(content) + 999) + content[8:],
        "a part too large": lambda content, rng: content[: -len(XMP) - 4] + b"\xff\xff\xff\x0f" + content[-len(XMP) :],
        "an unknown part": lambda content, rng: content + b"ABCD\4\0\0\0abcd",
        "half a part": lambda content, rng: content + b"ABCD\xff\0",
        "an empty profile": lambda content, rng: content[:30] + b"ICCP\0\0\0\0" + content[30:],
    },
    "TIFF": {
        "EXIF behind the end": lambda content, rng: _tag(content, 0x8769, value=2**31),
        "EXIF at noise": lambda content, rng: _tag(content + rng.bytes(500), 0x8769, value=len(content)),
        "EXIF is a text": lambda content, rng: _tag(content, 0x8769, value=9, kind=2, count=50),
        "a text behind the end": lambda content, rng: _tag(content, 0x010F, value=2**31),
        "a text of 4 GB": lambda content, rng: _tag(content, 0x010F, value=8, count=2**32 - 1),
        "a tag of unknown type": lambda content, rng: _tag(content, 0x010F, value=8, kind=77),
        "a profile behind the end": lambda content, rng: _tag(content, 0x8773, value=2**31),
        "a profile of 4 GB": lambda content, rng: _tag(content, 0x8773, value=8, count=2**32 - 1),
        "a profile that is a number": lambda content, rng: _tag(content, 0x8773, value=8, kind=3, count=1),
        "a page behind the end": lambda content, rng: _next_page(content, 2**31),
        "a page of noise": lambda content, rng: _next_page(content + rng.bytes(500), len(content)),
        "pages in a circle": lambda content, rng: _next_page(content, int.from_bytes(content[4:8], "little")),
    },
    "AVIF": {
        "an unknown box": lambda content, rng: content + b"\0\0\0\x0cabcdefgh",
        "half a box": lambda content, rng: content + b"\0\0\xff\xffab",
        "a box without length": lambda content, rng: content + b"\0\0\0\0free" + rng.bytes(50),
    },
}
STRUCTURE["TIFF with LZW"] = {how: damage for how, damage in STRUCTURE["TIFF"].items() if not how.startswith("EXIF")}
ENDS: dict[str, Damage] = {  # what tools append to files of any format
    "zeros at the end": lambda content, rng: content + bytes(4096),
    "noise at the end": lambda content, rng: content + rng.bytes(3000),
    "a second file at the end": lambda content, rng: content + content,
    "a video at the end": lambda content, rng: content + b"\0\0\0\x18ftypmp42" + rng.bytes(5000),
}


def damaged(content: bytes, kind: str, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (what was done, file) for every damage to an image file of this format that leaves the pixels intact."""
    rng = np.random.default_rng(seed)
    for number, (part, _, _) in enumerate(places(content, kind)):
        for how, damage in CONTENTS.items():
            yield f"{part}: {how}", replaced(content, kind, number, lambda old, damage=damage: damage(old, rng))
    for how, damage in (STRUCTURE[kind] | ENDS).items():
        yield how, damage(content, rng)
