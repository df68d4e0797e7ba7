"""The image formats that `open_image` reads, the endings of their files, and the names of formats that it refuses."""

import re
from collections.abc import Collection

# The names of the formats are those of Pillow, and the first ending of each format is the usual one. EPS is not
# allowed, because Pillow opens EPS files by running another program, Ghostscript.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
IMAGE_ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
HEAD = 256  # number of bytes at the start of a file that decide its format

# patterns for the first bytes of the files of each format
_READ = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "PPM": rb"P[1-6][\s#]",
    "AVIF": rb"....ftyp(avif|avis|(mif1|msf1).{,64}avi[fs])",
    "HEIF": rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)",
}
_REFUSED = {
    "an Apple-optimized PNG (CgBI)": rb"\x89PNG\r\n\x1a\n....CgBI",
    "a JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "a JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "a JPEG XR": rb"II\xbc",
    "a JPEG LS": rb"\xff\xd8\xff\xf7",
    "a Photoshop (PSD)": rb"8BPS",
    "a GIMP (XCF)": rb"gimp xcf",
    "a PostScript (EPS)": rb"%!PS|\xc5\xd0\xd3\xc6",
    "a PDF": rb"%PDF",
    "an SVG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!DOCTYPE svg[^>]*>\s*)*<svg",
    "an icon (ICO)": rb"\0\0[\1\2]\0",
    "an icon (ICNS)": rb"icns",
    "a DDS": rb"DDS ",
    "a QOI": rb"qoif",
    "an OpenEXR": rb"\x76\x2f\x31\x01",
    "a Radiance HDR": rb"#\?R",
    "a float PPM (PFM)": rb"P[Ff]\s",
    "a FITS": rb"SIMPLE  =",
    "a DICOM": rb".{128}DICM",
    "a Zeiss (CZI)": rb"ZISRAWFILE",
    "a Leica (LIF)": rb"\x70\0\0\0....\x2a",
    "a Nikon (ND2)": rb"\xda\xce\xbe\x0a",
    "a raw camera (CR2)": rb"II\*\0....CR",
    "a raw camera (CR3)": rb"....ftypcrx ",
    "a raw camera (RAF)": rb"FUJIFILMCCD-RAW",
    "a raw camera (RW2)": rb"IIU\0",
    "a raw camera (ORF)": rb"IIR[OS]|MMOR",
}
_OTHERS = {
    "a video": rb"....ftyp(isom|iso2|mp4|M4V|qt  |3gp)|\x1aE\xdf\xa3|RIFF....AVI ",
    "a web page": rb"\s*<(!doctype html|html)",
    "a pointer of Git LFS": rb"version https://git-lfs",
}
# Most images match none of these patterns, which one search shows.
_NOT_READ = re.compile(b"|".join(b"(?:%b)" % pattern for pattern in (*_REFUSED.values(), *_OTHERS.values())),
                       re.DOTALL | re.IGNORECASE)


def format_of(head: bytes) -> str | None:
    """Return the format of FORMATS to which a file belongs, given its first HEAD bytes, or None."""
    return next((name for name, pattern in _READ.items() if re.match(pattern, head, re.DOTALL)), None)


def refusal(head: bytes, readable: Collection[str]) -> str | None:
    """Return why a file is refused, given its first HEAD bytes and the formats that are readable here.

    None means that the file may be readable.
    """
    if _NOT_READ.match(head):
        for name, pattern in _REFUSED.items():
            if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
                return f"{name} image, which is not supported; save it as PNG or JPEG"
        for name, pattern in _OTHERS.items():
            if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
                return f"{name}, not an image; download the image again"
    if format_of(head) == "HEIF" and "HEIF" not in readable:
        return ("a HEIC image, for which the package pillow-heif is missing; run \"pip install 'onediff-idc[heic]'\", "
                "or save it as JPEG")
    return None
