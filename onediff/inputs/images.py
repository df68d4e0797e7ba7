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
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def open_image(source: bytes | str | Path, *, max_megapixels: float = 64) -> Image.Image:
    """Decode an image, given as file content or path, to RGB.

    The first frame of an animation is used, the EXIF orientation is applied, transparency is composited on white, and
    16-bit values are scaled to 8 bits. An image of more than `max_megapixels` is refused before any pixel is decoded.
    Raises FileNotFoundError, or ValueError for a file that is corrupt, truncated, too large or of an unknown format.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} does not exist or is not a file: give the path of an image")
    try:
        with warnings.catch_warnings():
            # Pillow's warning about large images is not needed, because this function checks the size itself.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source), formats=FORMATS)
        with image:
            megapixels = image.width * image.height / 1e6
            if megapixels <= max_megapixels:
                image.load()
                is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
                return _rgb(image if is_upright else ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:  # Pillow itself refuses images above 178 megapixels.
        raise ValueError(f"{name}: more than 178 megapixels, at most {max_megapixels:g} allowed; reduce the size of "
                         "the image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image, or not in a supported format; use {', '.join(FORMATS)}") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: corrupt or truncated image ({reason}); replace the file") from None
    raise ValueError(f"{name}: {megapixels:.1f} megapixels, at most {max_megapixels:g} allowed; reduce the size of the "
                     "image")


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
