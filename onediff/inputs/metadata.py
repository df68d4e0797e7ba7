"""Removes metadata from image files without any change of the pixels.

Tools write broken EXIF data, broken color profiles and huge texts into files whose pixels are intact. Pillow refuses
some of these files. Without the metadata, it reads them.
"""

import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterator

from onediff.inputs.formats import HEAD, format_of

EXIF, PROFILE = "EXIF", "profile"  # the metadata that changes how a picture looks: its orientation and its colors
START, END, SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"  # markers of JPEG

_JPEG_MARKER = re.compile(rb"(\xff[\x02-\xcf\xda-\xfe])")  # a marker that a length follows
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_PNG_METADATA = {EXIF: (b"eXIf",), PROFILE: (b"iCCP", b"cICP", b"sRGB", b"gAMA", b"cHRM")}
_PNG_NEXT = re.compile(b"PLTE|tRNS|IDAT|IEND")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA = {EXIF: (b"EXIF", 0x08), PROFILE: (b"ICCP", 0x20)}  # chunk, and its bit in the header
_WEBP_METADATA_BITS = 0x2C
# The tags of a TIFF that say how the pixels are stored, and the tag that marks a raw photograph (50706).
_TIFF_PIXELS = {254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324,
                325, 332, 334, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 50706}
_TIFF_METADATA = {EXIF: (274,), PROFILE: (34675,)}


def stripped(content: bytes, keep: Collection[str] = ()) -> bytes:
    """Return the content of an image file without its metadata, except the kinds in `keep` (EXIF, PROFILE).

    Chunks of a PNG whose checksum is wrong count as metadata, unless they hold pixels. A file of a format without such
    metadata, or whose structure is not readable, is returned unchanged.
    """
    strip = _STRIP.get(format_of(content[:HEAD]) or "")
    try:
        return strip(content, keep) if strip else content
    except (struct.error, IndexError):  # The file ends within a header.
        return content


def jpeg_segments(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (marker, start, end) of each segment of a JPEG up to the first scan, whose `end` is that of the file.

    Bytes between two segments are skipped, as Pillow and libjpeg do.
    """
    place = len(START)
    while (found := _JPEG_MARKER.search(content, place)) and found.end() + 2 <= len(content):
        marker, start = found[1], found.start(1)
        place = len(content) if marker == SCAN else start + 2 + int.from_bytes(content[start + 2 : start + 4])
        yield marker, start, place


def _png(content: bytes, keep: Collection[str]) -> bytes:
    wanted = {*_PNG_PIXELS, *(name for kind in keep for name in _PNG_METADATA[kind])}
    parts, place = [content[:8]], 8
    while place + 8 <= len(content):
        length, name = struct.unpack(">I4s", content[place : place + 8])
        end = place + 12 + length
        is_whole = content[end - 4 : end] == _crc(content[place + 4 : end - 4])
        if name == b"IEND":
            break
        # Pillow does not read the checksums of pixels, because the compressed stream of all pixels has its own.
        if (name == b"IDAT" and end <= len(content)) or (name in wanted and is_whole):
            parts.append(content[place : end - 4] + _crc(content[place + 4 : end - 4]))
        elif name in _PNG_PIXELS:
            return content
        elif not is_whole:  # The length may be wrong, so search the next chunk.
            end = next((found.start() - 4 for found in _PNG_NEXT.finditer(content, place + 9)
                        if _is_whole(content, found.start() - 4)), len(content))
        place = end
    return b"".join([*parts, struct.pack(">I", 0), b"IEND", _crc(b"IEND")])


def _is_whole(content: bytes, place: int) -> bool:
    """Return whether the chunk of a PNG at `place` has the right checksum."""
    end = place + 8 + int.from_bytes(content[place : place + 4])
    return content[end : end + 4] == _crc(content[place + 4 : end])


def _crc(content: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(content))


def _jpeg(content: bytes, keep: Collection[str]) -> bytes:
    parts = [START]
    for marker, start, end in jpeg_segments(content):
        kind = {b"\xff\xe1": EXIF, b"\xff\xe2": PROFILE}.get(marker, "")
        is_metadata = b"\xff\xe0" <= marker <= b"\xff\xef" or marker == b"\xff\xfe"
        kept = content[start + 4 : start + 16].startswith((b"Exif\0", b"ICC_PROFILE\0")) and kind in keep
        # JFIF (E0) and Adobe (EE) say how the colors are stored.
        if not is_metadata or kept or marker in (b"\xff\xe0", b"\xff\xee"):
            parts.append(content[start:end])
    return b"".join(parts)


def _webp(content: bytes, keep: Collection[str]) -> bytes:
    wanted = {*_WEBP_PIXELS, *(_WEBP_METADATA[kind][0] for kind in keep)}
    parts, place = [b""], 12
    while place + 8 <= len(content):
        name, length = struct.unpack("<4sI", content[place : place + 8])
        end = place + 8 + length + length % 2
        if name in wanted and end <= len(content) + length % 2:
            parts.append(content[place:end])
        place = end
    bits = sum(bit for name, bit in _WEBP_METADATA.values() if any(part.startswith(name) for part in parts))
    if parts[1:] and parts[1].startswith(b"VP8X"):
        parts[1] = parts[1][:8] + bytes([parts[1][8] & ~_WEBP_METADATA_BITS | bits]) + parts[1][9:]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(content: bytes, keep: Collection[str]) -> bytes:
    """Write a new list of tags for the first page to the end of the file, without metadata and other pages."""
    wanted = {*_TIFF_PIXELS, *(tag for kind in keep for tag in _TIFF_METADATA[kind])}
    order = "<" if content.startswith(b"II") else ">"
    is_big = struct.unpack(f"{order}H", content[2:4]) == (43,)
    at, offset, count, size = (8, "Q", "Q", 20) if is_big else (4, "I", "H", 12)
    place, = struct.unpack_from(f"{order}{offset}", content, at)
    num_tags, = struct.unpack_from(f"{order}{count}", content, place)
    start = place + struct.calcsize(count)
    if start + num_tags * size > len(content):
        return content
    tags = [content[first : first + size] for first in range(start, start + num_tags * size, size)]
    tags = [tag for tag in tags if struct.unpack_from(f"{order}H", tag)[0] in wanted]
    content += bytes(len(content) % 2)
    table = struct.pack(f"{order}{count}", len(tags)) + b"".join(tags) + struct.pack(f"{order}{offset}", 0)
    return b"".join([content[:at], struct.pack(f"{order}{offset}", len(content)),
                     content[at + struct.calcsize(offset):], table])


def _isobmff(content: bytes, keep: Collection[str]) -> bytes:
    """Rename the metadata of an AVIF or HEIC file, so that decoders skip it. Its color profile stays."""
    place = 0
    while place + 8 <= len(content):
        length, name = struct.unpack(">I4s", content[place : place + 8])
        if name == b"meta":
            meta = content[place : place + length]
            for item in (b"mime", *(() if EXIF in keep else (b"Exif",))):
                # An entry of an item has its version, flags and numbers, and then the type of the item.
                meta = re.sub(rb"(infe[\2\3]...(?:..|....)..)" + item, rb"\1skip", meta, flags=re.DOTALL)
            return content[:place] + meta + content[place + length:]
        if length < 8:
            return content
        place += length
    return content


_STRIP: dict[str, Callable[[bytes, Collection[str]], bytes]] = {
    "PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "TIFF": _tiff, "AVIF": _isobmff, "HEIF": _isobmff}
