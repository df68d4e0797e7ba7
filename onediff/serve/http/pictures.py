"""Images from clients: base64 text and data URIs become bytes, and bytes become RGB images within the server's limits.

Only bytes are decoded. No text from a client is ever opened as a path or fetched as an address.
"""

import base64
import binascii
import string

from PIL import Image

from onediff.config import Serve
from onediff.inputs.images import TooManyPixelsError, num_pixels, open_image
from onediff.inputs.metadata import END, SCAN, START, jpeg_segments
from onediff.serve.http.errors import ApiError

LARGE_MEGAPIXELS = 2.0  # An image with more pixels takes more than about 50 ms to decode.
MOST_SCANS = 100  # A JPEG with thousands of scans is a few kilobytes long, but takes minutes to decode.
_WHITESPACE = string.whitespace.encode()
_ESCAPED = ("%2B", "+"), ("%2b", "+"), ("%2F", "/"), ("%2f", "/"), ("%3D", "="), ("%3d", "=")


def image_bytes(text: str, param: str) -> bytes:
    """Return the bytes of base64 text or of a data URI. Raises ApiError, which names `param`, for any other text.

    The signs of the base64 text in a data URI may be escaped, as in %2B (RFC 2397).
    """
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ApiError(422, f"{param}: a data URI must look like data:image/png;base64,...", code="invalid_image",
                           param=param)
        for escape, sign in _ESCAPED:  # The function `unquote` would need much more memory.
            text = text.replace(escape, sign)
    elif "://" in text[:100]:
        raise ApiError(422, f"{param}: this server opens no address: send the image as base64 text or as a data URI",
                       code="address_refused", param=param)
    try:
        return base64.b64decode(text.encode("ascii").translate(None, _WHITESPACE), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ApiError(422, f"{param}: not base64 text: send the image as base64 text or as a data URI",
                       code="invalid_image", param=param) from None


def open_picture(content: bytes, limits: Serve, param: str) -> Image.Image:
    """Decode an image to RGB, with at most `limits.image_px` pixels on its longer side.

    A larger JPEG is decoded at a part of its size. Raises ApiError, which names `param`: 413 for an image with too
    many pixels, which is refused before any pixel is decoded, and 422 for an image that cannot be decoded.
    """
    scans = num_scans(content)
    if scans > MOST_SCANS:
        raise ApiError(422, f"{param}: a JPEG may have at most {MOST_SCANS} scans, got {scans}; save the image again",
                       code="corrupt_image", param=param)
    try:
        # A JPEG with several scans is always decoded at full size, also if it is not progressive.
        image = open_image(content, name=param, max_megapixels=limits.megapixels,
                           draft_px=limits.image_px if scans == 1 else None)
    except TooManyPixelsError as error:
        raise ApiError(413, str(error), code="image_too_large", param=param) from None
    except ValueError as error:
        raise ApiError(422, str(error), code="corrupt_image", param=param) from None
    image.thumbnail((limits.image_px, limits.image_px))
    return image


def is_large(content: bytes) -> bool:
    """Return whether an image has many pixels, according to its header. A file that is not an image is not large."""
    return num_pixels(content) > LARGE_MEGAPIXELS * 1e6


def num_scans(content: bytes) -> int:
    """Return how many times a JPEG goes over its pixels, or 0 for a file of another format.

    An embedded preview does not count.
    """
    for marker, start, _ in jpeg_segments(content) if content.startswith(START) else ():
        if marker == SCAN:
            end = content.find(END, start)
            return content.count(SCAN, start, end if end >= 0 else len(content))
    return 0
