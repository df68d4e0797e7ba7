"""Opens image files, also those with damaged metadata or without an end, if every pixel is intact."""

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import Image

from onediff.inputs.formats import FORMATS
from onediff.inputs.metadata import END, EXIF, PROFILE, SCAN, START, stripped

# The errors that Pillow raises for broken files. The decoder of AVIF raises RuntimeError.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
          struct.error, zlib.error)
_LARGEST_REPAIR = 1 << 28  # A larger file is not read into memory, in order to be read without its metadata.
_MOST_PIXELS_REPAIR = 32_000_000  # The end of a JPEG with more pixels is not repaired, because this needs much memory.
# Bytes with other bits, and without a marker. They replace missing pixels, so that the picture shows that pixels miss.
_FILLERS = (b"", b"\x55" * 4096, b"\xaa" * 4096)
# Which metadata is kept if the file cannot be read as it is -> notes about the loss
_LESS_METADATA = {
    (EXIF, PROFILE): ("damaged metadata was ignored, which may have stated an orientation or a color profile",),
    (EXIF,): ("the color profile cannot be read, so the colors are taken as sRGB",),
    (PROFILE,): ("EXIF cannot be read, so the orientation is unknown",),
    (): ("EXIF and the color profile cannot be read, so the orientation is unknown, and the colors are taken as sRGB",),
}
_NO_END = "the end of the file is missing, but no pixel"
Result = TypeVar("Result")


class UnsupportedImageError(ValueError):
    """An image that is not broken is refused."""


def retried(source: bytes | Path, read: Callable[[bytes | Path, tuple[str, ...]], Result]) -> Result:
    """Return what `read` returns for the first version of the file that it can read.

    The versions are the file, and then the file with less and less metadata. `read` also gets notes about what is
    missing. Raises the error about the file itself if `read` fails for every version.
    """
    problem: Exception | None = None
    for content, notes in _versions(source):
        try:
            return read(content, notes)
        except UnsupportedImageError:
            raise
        except BROKEN as error:
            problem = problem or error
    assert problem is not None, "there is at least one version"
    raise problem


def _versions(source: bytes | Path) -> Iterator[tuple[bytes | Path, tuple[str, ...]]]:
    """Yield the file, and versions of it with less metadata, each with notes about what is missing."""
    yield source, ()
    if not isinstance(source, bytes):
        if source.stat().st_size > _LARGEST_REPAIR:
            return
        source = source.read_bytes()
    ended = _with_end_marker(source)
    if ended:
        source = ended
        yield source, (_NO_END,)
    seen, content = {hash(source)}, source
    for keep, notes in _LESS_METADATA.items():
        content = stripped(source, keep)
        if hash(content) not in seen:
            yield content, notes
        seen.add(hash(content))
    if not ended and (ended := _with_end_marker(content)):
        yield ended, (*notes, _NO_END)


def _with_end_marker(content: bytes) -> bytes | None:
    """Return a JPEG that lacks only the marker at its end with this marker, or None if pixels are missing, too.

    libjpeg makes missing pixels up from the bytes that follow. So pixels are missing if other bytes give other pixels.
    """
    if not content.startswith(START) or content.find(END, content.rfind(SCAN)) >= 0:
        return None
    content = content.removesuffix(END[:1])
    pictures = []
    for filler in _FILLERS:
        try:
            with opened(content + filler + END) as image:
                # A progressive JPEG may lack the scans with the details of all pixels.
                if image.info.get("progressive") or image.width * image.height > _MOST_PIXELS_REPAIR:
                    return None
                pictures.append(hash(image.tobytes()))
        except BROKEN:
            return None
    return content + END if len(set(pictures)) == 1 else None


@functools.cache
def readable() -> tuple[str, ...]:
    """Return the formats that can be read here: HEIC needs the optional package pillow-heif.

    The first call registers pillow-heif in Pillow, if it is installed.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return tuple(name for name in FORMATS if name != "HEIF")
    register_heif_opener()
    return tuple(FORMATS)


@contextmanager
def opened(source: bytes | Path) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        # Pillow warns about large images, whose size this module checks itself, and about unusual metadata.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=readable()) as image:
            yield image
