from __future__ import annotations

import io
import tracemalloc
from urllib.parse import quote

import pytest
from damaged_images import chunk, inserted
from PIL import Image
from serving import base64_text, image_file

from onediff.config import Serve
from onediff.inputs.images import open_image
from onediff.serve.http.errors import ApiError
from onediff.serve.http.pictures import MOST_SCANS, image_bytes, is_large, num_scans, open_picture

LIMITS = Serve(megapixels=1.0, image_px=128)


def jpeg(size: tuple[int, int], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, "JPEG", **options)
    return buffer.getvalue()


def one_bit_png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_base64_text_and_data_uris_give_the_bytes() -> None:
    content = image_file()
    text = base64_text(content)
    for form in (text, f"data:image/png;base64,{text}", f"DATA:;BASE64,{text}", f"{text[:40]}\n {text[40:]}"):
        assert image_bytes(form, "before") == content


def test_the_signs_of_base64_text_in_a_data_uri_may_be_escaped() -> None:
    content = bytes([0xFB, 0xFF, 0xBF, 0xFB])
    text = base64_text(content)
    assert text == "+/+/+w=="
    for escaped in (quote(text, safe=""), quote(text, safe="/"), "%2b/%2b%2f%2Bw%3d="):
        assert image_bytes(f"data:image/png;base64,{escaped}", "before") == content
        with pytest.raises(ApiError, match="before: not base64 text"):
            image_bytes(escaped, "before")
    with pytest.raises(ApiError, match="before: not base64 text"):
        image_bytes("data:image/png;base64,%41AAA", "before")
    with pytest.raises(ApiError, match="a data URI must look like data:image/png;base64,"):
        image_bytes("data:image/png,%89PNG", "before")


@pytest.mark.parametrize(("text", "num_bytes"), [("AAA " * 250_000, 562_500),
                                                 ("data:;base64," + "AAA%2b" * 160_000, 480_000)])
def test_spaces_and_escapes_in_base64_text_need_little_memory(text: str, num_bytes: int) -> None:
    tracemalloc.start()
    try:
        assert len(image_bytes(text, "before")) == num_bytes
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()


def test_an_error_calls_an_image_as_the_client_does() -> None:
    with pytest.raises(ApiError, match=r"^1\.before: 64\.0 megapixels, at most 1 allowed"):
        open_picture(one_bit_png(8000, 8000), LIMITS, "1.before")
    with pytest.raises(ApiError, match=r"^after: not an image"):
        open_picture(b"no image", LIMITS, "after")


def test_a_small_image_is_opened_without_a_change() -> None:
    assert open_picture(image_file(), LIMITS, "before").tobytes() == open_image(image_file()).tobytes()


def test_a_large_image_is_shrunk_and_keeps_its_shape() -> None:
    assert open_picture(image_file(size=(900, 600)), LIMITS, "before").size == (128, 85)


def test_of_a_large_jpeg_only_a_part_is_decoded() -> None:
    """Three megapixels exceed the limit, but the draft at an eighth of the size does not."""
    assert open_picture(jpeg((2000, 1500)), LIMITS, "before").size == (128, 96)


@pytest.mark.parametrize("content", [jpeg((2000, 1500), progressive=True), one_bit_png(8000, 8000),
                                     one_bit_png(16_000, 16_000), image_file(size=(1200, 900))])
def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(content: bytes) -> None:
    with pytest.raises(ApiError, match=r"after: .*megapixels, at most 1 allowed") as refusal:
        open_picture(content, LIMITS, "after")
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (413, "image_too_large", "after")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xff\xff\xff", image_file()[:200], b"GIF89a",
                                     b"II*\x00" + bytes(40)])
def test_a_corrupt_image_is_refused(content: bytes) -> None:
    with pytest.raises(ApiError) as refusal:
        open_picture(content, LIMITS, "before")
    assert (refusal.value.status, refusal.value.code) == (422, "corrupt_image")


def test_the_scans_of_a_jpeg_are_counted_without_its_preview() -> None:
    preview = Image.Exif()
    preview[0x010E] = jpeg((64, 64)).decode("latin-1")
    assert num_scans(jpeg((64, 64))) == 1
    assert num_scans(jpeg((64, 64), exif=preview)) == 1
    assert num_scans(jpeg((64, 64), progressive=True)) > 1
    assert num_scans(image_file()) == 0


def test_a_jpeg_with_thousands_of_scans_is_refused() -> None:
    content = jpeg((64, 64))
    start = content.index(b"\xff\xda")
    scan = content[start:-2]
    with pytest.raises(ApiError, match=f"at most {MOST_SCANS} scans, got 3000"):
        open_picture(content[:start] + scan * 3000 + b"\xff\xd9", LIMITS, "before")


def test_an_image_with_broken_metadata_is_opened_like_everywhere() -> None:
    broken = inserted(image_file(), chunk(b"zTXt", b"a\0\7") + chunk(b"eXIf", b"no EXIF at all"))
    assert open_picture(broken, LIMITS, "before").tobytes() == open_image(image_file()).tobytes()
    assert is_large(inserted(one_bit_png(2000, 1500), chunk(b"zTXt", b"a\0\7")))


def test_bytes_before_a_marker_do_not_hide_the_scans_of_a_jpeg() -> None:
    content = jpeg((64, 64))
    assert num_scans(content[:2] + b"\xff" * 9 + content[2:]) == num_scans(content) == 1


def test_only_images_with_many_pixels_are_large() -> None:
    assert is_large(one_bit_png(2000, 1500))
    assert not is_large(image_file())
    assert not is_large(b"no image")
