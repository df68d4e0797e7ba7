"""Decodes image files of common formats to RGB, refuses unreadable ones with a one-line error, and encodes images."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from onediff.files import find_file
from onediff.inputs.color import ProfileError, lab_to_srgb, to_srgb
from onediff.inputs.color_space import SEARCHED, color_profile
from onediff.inputs.formats import HEAD, format_of, refusal
from onediff.inputs.repair import BROKEN, UnsupportedImageError, opened, readable, retried

_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}  # the orientation that EXIF states -> how to show the picture upright
_BITS_PER_SAMPLE, _SUBFILE_TYPE, _DNG_VERSION = 258, 254, 50706  # tags of TIFF


class TooManyPixelsError(UnsupportedImageError):
    """An image has more pixels than the caller allows. It was refused before any pixel was decoded."""


@dataclass(frozen=True)
class Decoded:
    """An image in 8-bit sRGB, and the Pillow mode of its file.

    `notes` says in short texts which metadata could not be used, and what this means for the image.
    """

    image: Image.Image
    mode: str
    notes: tuple[str, ...]


def open_image(source: bytes | str | Path, *, name: str = "", max_megapixels: float = 64,
               draft_px: int | None = None) -> Image.Image:
    """Decode an image, given as file content or path, to RGB. `decode` explains how."""
    return decode(source, name=name, max_megapixels=max_megapixels, draft_px=draft_px).image


def decode(source: bytes | str | Path, *, name: str = "", max_megapixels: float = 64,
           draft_px: int | None = None) -> Decoded:
    """Decode an image, given as file content or path, to RGB.

    The first frame of an animation and the first page of a document are used, the EXIF orientation is applied, colors
    are converted to sRGB, transparency is composited on white, and values of more than 8 bits are scaled to 8
    bits. Metadata that cannot be read is ignored. An image of more than `max_megapixels` is refused before any pixel is
    decoded. If `draft_px` is given, a large JPEG is decoded at a half, a quarter or an eighth of its size, so that its
    shorter side has at least `draft_px` pixels; `max_megapixels` then limits the pixels that are decoded.
    Raises FileNotFoundError, TooManyPixelsError, UnsupportedImageError for an image that is refused although it is not
    broken, or ValueError for a file that is corrupt, truncated or of an unknown format. The errors call the image
    `name`, or else by its path, or "image" if its content is given.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes):
        path = find_file(Path(source))
        if path is None:
            raise FileNotFoundError(f"{name} does not exist or is not a file: give the path of an image")
        source = path
    try:
        if reason := refusal(_head(source), readable()):
            raise UnsupportedImageError(reason)
        return retried(source, lambda content, notes: _decode(content, notes, max_megapixels, draft_px))
    except UnsupportedImageError as error:
        raise type(error)(f"{name}: {error}") from None
    except Image.DecompressionBombError:  # Pillow itself refuses images above 178 megapixels.
        raise TooManyPixelsError(f"{name}: more than 178 megapixels, at most {max_megapixels:g} allowed; reduce the "
                                 "size of the image") from None
    except BROKEN as error:
        raise ValueError(f"{name}: {_problem(error, source)}") from None


def image_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image that `open_image` can decode, without decoding its pixels."""
    def read(content: bytes | Path, _: tuple[str, ...]) -> tuple[int, int]:
        with opened(content) as image:
            # Pillow states the size of a TIFF as its orientation demands.
            is_lying = image.format != "TIFF" and (_orientation(image) or 1) >= 5  # rotated by a quarter turn
            return (image.height, image.width) if is_lying else image.size

    return retried(content, read)


def num_pixels(content: bytes) -> int:
    """Return the number of pixels that the header of an image states, or 0 for a file that is no image."""
    def read(content: bytes | Path, _: tuple[str, ...]) -> int:
        with opened(content) as image:
            return image.width * image.height

    try:
        return retried(content, read)
    except (*BROKEN, Image.DecompressionBombError):
        return 0


def png(image: Image.Image, *, compress_level: int = 1) -> bytes:
    """Encode an image as PNG and return the content of the file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Encode an image as JPEG and return the content of the file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _head(source: bytes | Path, size: int = HEAD) -> bytes:
    if isinstance(source, bytes):
        return source[:size]
    with source.open("rb") as file:
        return file.read(size)


def _problem(error: Exception, source: bytes | Path) -> str:
    """Return what is wrong with a file that could not be decoded, and the cure."""
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({error.strerror}); correct its permissions, or replace the file"
    kind = format_of(_head(source))
    if kind is None:
        return f"not an image, or not in a supported format; use {', '.join(readable())}"
    if not isinstance(error, UnidentifiedImageError):
        return f"corrupt or truncated image ({' '.join(str(error).split())}); replace the file"
    if kind == "TIFF":
        return ("corrupt or truncated image, or a TIFF whose pixels are stored in a way that is not supported; save it "
                "as RGB or grey with 8 or 16 bits")
    return f"corrupt or truncated image (the header of a {kind} file is broken); replace the file"


def _decode(source: bytes | Path, notes: tuple[str, ...], max_megapixels: float,
            draft_px: int | None) -> Decoded:
    """Decode one version of a file, unless the file is refused."""
    with opened(source) as image:
        # A progressive JPEG is always decoded at full size. HEIC would be replaced by a preview of lower quality.
        if draft_px and image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
            image.draft(image.mode, (draft_px, draft_px))
        megapixels = image.width * image.height / 1e6
        if megapixels > max_megapixels:
            raise TooManyPixelsError(f"{megapixels:.1f} megapixels, at most {max_megapixels:g} allowed; reduce the "
                                     "size of the image")
        tags = getattr(image, "tag_v2", {})
        if _DNG_VERSION in tags or tags.get(_SUBFILE_TYPE, 0) & 1:
            raise UnsupportedImageError("the first picture in this TIFF file is only a preview, as in raw photographs "
                                        "(DNG, NEF, ARW); save the photograph as JPEG or PNG")
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        image.load()
        mode = image.mode
        if tags and getattr(image, "is_animated", False):
            notes += ("only the first of several pages is used",)
        orientation = _orientation(image)
        if orientation is None:
            notes += ("EXIF cannot be read, so the orientation is unknown",)
        pixels = _eight_bits(image, 2**bits - 1)
        try:
            rgb = _rgb(pixels, color_profile(image, _head(source, SEARCHED)))
        except ProfileError as error:
            notes += (f"{error}, so the colors are taken as sRGB",)
            rgb = _rgb(pixels, b"")
        if orientation in _TURNS:
            rgb = rgb.transpose(_TURNS[orientation])
        rgb.info = {}  # Pillow would save a color profile again, which the pixels no longer have.
        return Decoded(rgb, mode, notes)


def _orientation(image: Image.Image) -> int | None:
    """Return the orientation that EXIF states, 1 (upright) if it states none, or None if EXIF cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        Image.Exif().load(image.info.get("exif", b""))  # When Pillow opens a JPEG, it hides errors in EXIF.
    except BROKEN:
        return None
    return orientation if orientation in _TURNS else 1


def _eight_bits(image: Image.Image, largest: int) -> Image.Image:
    """Return an image with 8 bits per value. `largest` is the value of white in an image of 16 bits.

    Raises UnsupportedImageError for pixel values without a known range.
    """
    if image.mode == "F":
        raise UnsupportedImageError("float pixel values have no standard range; save the image with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "I":
        largest = 65535
    if values.min(initial=0) < 0 or values.max(initial=0) > largest:
        raise UnsupportedImageError("32-bit grey values have no standard range; save the image with 8 or 16 bits")
    # Pillow's own conversion would clip values at 255 instead of scaling them.
    return Image.fromarray(((values.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8))


def _rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image with 8 bits per value to RGB in sRGB.

    `profile` is empty if the image has no color profile, and None if it cannot be read. Raises ProfileError if the
    profile cannot be used.
    """
    rgba = image.convert("RGBA") if image.has_transparency_data else None
    if profile != b"":
        mode = image.mode if image.mode in ("CMYK", "LAB") else "L" if Image.getmodebase(image.mode) == "L" else "RGB"
        rgb = to_srgb((rgba or image).convert(mode), profile or b"")
    elif image.mode == "LAB":
        rgb = lab_to_srgb(image)
    else:
        rgb = image if image.mode == "RGB" and not rgba else (rgba or image).convert("RGB")
    if rgba:
        rgb.putalpha(rgba.getchannel("A"))
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb
