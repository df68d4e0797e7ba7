from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onediff.inputs.images import open_image

H, W = 37, 53


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(*shape: int, high: int = 256, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(3).integers(high, size=shape).astype(dtype)


def huge_png(width: int, height: int, num_rows: int) -> bytes:
    """Return a black 8-bit RGB PNG whose header states `height` rows, but which contains only `num_rows` rows.

    The rows are compressed one by one, so that this function needs little memory.
    """
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(1), bytes(1 + 3 * width)
    rows = b"".join(packer.compress(row) for _ in range(num_rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_rgb_png_is_decoded_exactly_from_bytes_and_from_a_path(tmp_path: Path) -> None:
    pixels = noise(H, W, 3)
    content = save(Image.fromarray(pixels), "PNG")
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, tmp_path / "a.png", str(tmp_path / "a.png")):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)


def test_alpha_is_composited_on_white() -> None:
    pixels = noise(H, W, 4)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(open_image(save(Image.fromarray(pixels), "PNG"))) - expected).max() <= 1


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (W, H), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 5, H))
    pixels = np.asarray(open_image(save(image, "PNG", transparency=0)))
    assert (pixels[:, :5] == 255).all()
    assert (pixels[:, 5:] == (200, 100, 50)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_greyscale_image_gets_three_equal_channels(kind: str) -> None:
    pixels = np.asarray(open_image(save(Image.fromarray(noise(H, W)), kind)))
    assert pixels.shape == (H, W, 3)
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_values_are_scaled_and_not_clipped(kind: str) -> None:
    values = noise(H, W, high=65536, dtype="uint16")
    pixels = np.asarray(open_image(save(Image.fromarray(values), kind)))[..., 0]
    assert np.array_equal(pixels, np.floor(values / 257 + 0.5).astype(np.uint8))
    assert len(np.unique(pixels)) > 200


def test_a_cmyk_jpeg_is_converted_to_the_equal_rgb_colour() -> None:
    pixels = np.asarray(open_image(save(Image.new("CMYK", (W, H), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 6


def test_the_first_frame_of_an_animated_gif_is_used() -> None:
    frames = [Image.new("RGB", (W, H), color) for color in ("red", "green", "blue")]
    image = open_image(save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.array_equal(np.asarray(image), np.asarray(frames[0]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(kind: str) -> None:
    image = Image.new("RGB", (W, H), "white")
    image.paste("red", (0, 0, W, 16))  # The red bar is at the top.
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation 6 means that viewers must rotate the image by 90 degrees clockwise.
    upright = np.asarray(open_image(save(image, kind, exif=exif)))
    assert upright.shape == (W, H, 3)
    assert (upright[:, -8:, 1] < 100).all()  # After the rotation, the red bar is at the right border.
    assert (upright[:, :8, 1] > 200).all()


def test_exif_rotation_is_applied_to_sixteen_bit_grey_images_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(save(Image.fromarray(noise(H, W, dtype="uint16")), "PNG", exif=exif)).size == (H, W)


def test_a_missing_file_and_a_folder_are_refused_with_a_message_that_contains_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="is not a file: give the path of an image"):
        open_image(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused_with_a_one_line_message(kind: str, share: float, tmp_path: Path) -> None:
    content = save(Image.fromarray(noise(97, 101, 3)), kind)
    path = tmp_path / "half.img"
    path.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(ValueError, match=r"half\.img: (corrupt or truncated|not an image)") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


def test_corrupt_content_is_refused() -> None:
    with pytest.raises(ValueError, match="image: not an image"):
        open_image(b"")
    with pytest.raises(ValueError, match="not an image, or not in a supported format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    content = bytearray(save(Image.fromarray(noise(H, W, 3)), "PNG"))
    content[len(content) // 2] ^= 255
    with pytest.raises(ValueError, match="corrupt or truncated"):
        open_image(bytes(content))


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_a_randomly_damaged_image_raises_only_value_errors() -> None:
    rng = np.random.default_rng(11)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        intact = np.frombuffer(save(Image.fromarray(noise(H, W, 3)), kind), dtype=np.uint8)
        for _ in range(60):
            damaged = intact.copy()
            damaged[rng.integers(len(intact), size=5)] = rng.integers(256, size=5)
            try:
                assert open_image(damaged.tobytes()).mode == "RGB"
            except ValueError as error:
                assert "\n" not in str(error)


def test_float_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="float pixel values have no standard range"):
        open_image(save(Image.fromarray(noise(H, W).astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_with_too_many_megapixels_is_refused(kind: str) -> None:
    content = save(Image.new("RGB", (1000, 500)), kind)
    assert open_image(content, max_megapixels=0.5).size == (1000, 500)
    with pytest.raises(ValueError, match=r"image: 0\.5 megapixels, at most 0\.4 allowed"):
        open_image(content, max_megapixels=0.4)


def test_an_image_above_the_limit_of_pillow_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 178 megapixels, at most 64 allowed"):
        open_image(huge_png(60000, 60000, 1))


def test_a_100_megapixel_png_is_refused_without_decoding_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(huge_png(10000, 10000, 10000))
    program = f"""
import resource
from onediff.inputs.images import open_image
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image({str(path)!r})
except ValueError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start, error)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    kibibytes, message = out.stdout.split(maxsplit=1)
    assert int(kibibytes) < 20_000  # The decoded image would need 300 MB.
    assert "huge.png: 100.0 megapixels, at most 64 allowed" in message
