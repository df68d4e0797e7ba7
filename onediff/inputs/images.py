"""An image file of any common kind -> one RGB picture, or one line that says what is wrong with it; and back to PNG."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # no format that runs another program, as EPS does
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def open_image(source: bytes | str | Path, *, max_megapixels: float = 64) -> Image.Image:
    """File content or path -> RGB: first frame, upright by EXIF, alpha on white, 16 bits scaled to 8.

    One rule for size: above `max_megapixels` it is refused from its header, JPEG too, before any pixel is decoded.
    Raises FileNotFoundError, or ValueError for a file that is corrupt, truncated, too large or of no known format.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} not found, or not a file: give the path of an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source), formats=FORMATS)
        with image:
            megapixels = image.width * image.height / 1e6
            if megapixels <= max_megapixels:
                image.load()
                is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
                return _rgb(image if is_upright else ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:  # Pillow's own bound, twice 89 megapixels
        raise ValueError(f"{name}: more than {max_megapixels:g} megapixels; make it smaller") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image, or of no known format ({', '.join(FORMATS)})") from None
    except _BROKEN as error:
        raise ValueError(f"{name}: corrupt or truncated image ({' '.join(str(error).split())})") from None
    raise ValueError(f"{name}: {megapixels:.1f} megapixels, at most {max_megapixels:g} allowed; make it smaller")


def png(image: Image.Image, *, compress_level: int = 1) -> bytes:
    """The file content of a PNG with these pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("32-bit grey has no agreed range: save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # Pillow would clip at 255
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
