"""Decodes image files of common formats to RGB, refuses unreadable ones with a one-line error, and encodes PNG."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# EPS is not allowed, because Pillow opens EPS files by running another program, Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class TooManyPixelsError(ValueError):
    """An image has more pixels than the caller allows. It was refused before any pixel was decoded."""


def open_image(source: bytes | str | Path, *, name: str = "", max_megapixels: float = 64,
               draft_px: int | None = None) -> Image.Image:
    """Decode an image, given as file content or path, to RGB.

    The first frame of an animation is used, the EXIF orientation is applied, transparency is composited on white, and
    16-bit values are scaled to 8 bits. An image of more than `max_megapixels` is refused before any pixel is decoded.
    If `draft_px` is given, a large JPEG is decoded at a half, a quarter or an eighth of its size, so that its shorter
    side has at least `draft_px` pixels; `max_megapixels` then limits the pixels that are decoded.
    Raises FileNotFoundError, TooManyPixelsError, or ValueError for a file that is corrupt, truncated or of an unknown
    format. The errors call the image `name`, or else by its path, or "image" if its content is given.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} does not exist or is not a file: give the path of an image")
    try:
        with warnings.catch_warnings():
            # Pillow's warning about large images is not needed, because this function checks the size itself.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source), formats=FORMATS)
        with image:
            if draft_px and not image.info.get("progressive"):  # A progressive JPEG is always decoded at full size.
                image.draft(image.mode, (draft_px, draft_px))
            megapixels = image.width * image.height / 1e6
            if megapixels <= max_megapixels:
                image.load()
                is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
                return _rgb(image if is_upright else ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:  # Pillow itself refuses images above 178 megapixels.
        raise TooManyPixelsError(f"{name}: more than 178 megapixels, at most {max_megapixels:g} allowed; reduce the "
                                 "size of the image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image, or not in a supported format; use {', '.join(FORMATS)}") from None
    except BROKEN as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: corrupt or truncated image ({reason}); replace the file") from None
    raise TooManyPixelsError(f"{name}: {megapixels:.1f} megapixels, at most {max_megapixels:g} allowed; reduce the "
                             "size of the image")


def image_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image that `open_image` can decode, without decoding its pixels."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        is_lying = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # rotated by a quarter turn
        return (image.height, image.width) if is_lying else image.size


def png(image: Image.Image, *, compress_level: int = 1) -> bytes:
    """Encode an image as PNG and return the content of the file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB. Raises ValueError for pixel values without a known range."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("32-bit grey values have no standard range; save the image with 8 or 16 bits")
        # For 16-bit images, Pillow's own conversion would clip values at 255 instead of scaling them.
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("float pixel values have no standard range; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
