from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from onediff.inputs.images import decode, image_size, num_pixels, open_image
from onediff.inputs.repair import UnsupportedImageError

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
    file = save(image, kind, exif=exif)
    upright = np.asarray(open_image(file))
    assert upright.shape == (W, H, 3)
    assert image_size(file) == (H, W)
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


@pytest.mark.parametrize("orientation", range(10))
def test_each_orientation_equals_that_of_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(Image.fromarray(noise(H, W, 3)), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert np.array_equal(np.asarray(open_image(file)), np.asarray(expected))
    assert image_size(file) == expected.size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
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
    with pytest.raises(ValueError, match=r"image: not an image, or not in a supported format; use PNG, .*AVIF"):
        open_image(b"any text")
    content = bytearray(save(Image.fromarray(noise(H, W, 3)), "PNG"))
    content[len(content) // 2] ^= 255
    with pytest.raises(ValueError, match="corrupt or truncated"):
        open_image(bytes(content))


def test_a_randomly_damaged_image_raises_only_value_errors() -> None:
    rng = np.random.default_rng(11)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"):
        intact = np.frombuffer(save(Image.fromarray(noise(H, W, 3)), kind), dtype=np.uint8)
        for _ in range(60):
            damaged = intact.copy()
            damaged[rng.integers(len(intact), size=5)] = rng.integers(256, size=5)
            try:
                assert open_image(damaged.tobytes()).mode == "RGB"
            except ValueError as error:
                assert "\n" not in str(error)


def test_a_jpeg_without_its_last_bytes_is_read_only_if_they_hold_no_pixels() -> None:
    pixels = Image.fromarray(noise(97, 101, 3))
    file = save(pixels, "JPEG", quality=90)
    for missing in (1, 2):
        assert np.array_equal(np.asarray(open_image(file[:-missing])), np.asarray(open_image(file)))
    for missing in (*range(3, 40), 400, 4000):
        with pytest.raises(ValueError, match="image: corrupt or truncated image"):
            open_image(file[:-missing])
    with pytest.raises(ValueError, match="image: corrupt or truncated image"):
        open_image(save(pixels, "JPEG", progressive=True)[:-2])


def test_a_picture_of_a_phone_is_read_without_its_gain_map_and_video() -> None:
    first, second = Image.fromarray(noise(H, W, 3)), Image.new("RGB", (9, 7))
    file = save(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(file)).n_frames == 2
    image = open_image(file + b"\0\0\0\x18ftypmp42" + bytes(5000), draft_px=8)
    assert image.size[0] * image.size[1] < W * H  # A large JPEG is decoded at a part of its size.
    assert open_image(file).size == (W, H)


def test_a_scan_of_black_and_white_pages_is_read_and_the_other_pages_are_noted() -> None:
    page = Image.fromarray(noise(H, W)).convert("1")
    file = save(page, "TIFF", compression="group4", save_all=True, append_images=[page])
    assert decode(file).notes == ("only the first of several pages is used",)
    assert np.array_equal(np.asarray(open_image(file))[..., 0], np.asarray(page) * np.uint8(255))


def test_twelve_bits_of_a_microscope_are_scaled_to_the_full_range() -> None:
    values = noise(H, 2 * W, high=4096, dtype="uint16")
    left, right = values[:, ::2], values[:, 1::2]
    packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=-1)
    tags = [(256, 4, 2 * W), (257, 4, H), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, H),
            (279, 4, packed.size)]
    content = packed.astype(np.uint8).tobytes()
    table = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in tags)
    file = b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + table + bytes(4)
    pixels = np.asarray(open_image(file))[..., 0]
    assert np.array_equal(pixels, np.floor(values / 4095 * 255 + 0.5).astype(np.uint8))


def test_channels_of_a_microscope_are_refused_with_a_cure() -> None:
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 5), (278, 4, 8)]
    table = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in tags)
    file = b"II*\0" + struct.pack("<I", 8 + 640) + bytes(640) + struct.pack("<H", len(tags)) + table + bytes(4)
    with pytest.raises(ValueError, match="TIFF whose pixels are stored in a way that is not supported; save it as RGB"):
        open_image(file)


@pytest.mark.parametrize("tags", [{50706: b"\1\4\0\0"}, {254: 1}])
def test_the_preview_in_a_raw_photograph_of_a_drone_is_not_taken_for_the_photograph(tags: dict[int, object]) -> None:
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        ifd[number] = value
    with pytest.raises(ValueError, match=r"^image: the first picture in this TIFF file is only a preview"):
        open_image(save(Image.new("RGB", (W, H)), "TIFF", tiffinfo=ifd))


def test_an_image_that_is_refused_is_not_called_corrupt(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(save(Image.fromarray(noise(H, W).astype(np.float32)), "TIFF"))
    with pytest.raises(UnsupportedImageError, match=r"a\.tif: float pixel values have no standard range; save"):
        open_image(tmp_path / "a.tif")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(FileNotFoundError, match=r"loop\.png does not exist"):
        open_image(tmp_path / "loop.png")


def test_the_number_of_pixels_is_read_from_the_header() -> None:
    assert num_pixels(huge_png(9000, 9000, 1)) == 81_000_000
    assert num_pixels(b"no image") == num_pixels(b"") == num_pixels(huge_png(60000, 60000, 1)) == 0


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
