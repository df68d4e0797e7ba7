"""Generated pictures: random patterns that replace the many photographs that Python packages do not contain.

Every pattern is a function of a random generator and a size (width, height). The arithmetic uses whole numbers, or
rounds to whole numbers, so that one seed gives identical bytes on every machine.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from onediff.data.synthesis.edits.photographs import augment, draw_window
from onediff.data.synthesis.edits.pictures import Picture, Pixels, Size, draw_uniform, to_pixels
from onediff.data.synthesis.phrases import pick

SAMPLES = 2  # Shapes are drawn in this multiple of the size and then reduced, which makes their outlines smooth.
Color = tuple[int, int, int]


def draw_generated(rng: Generator, split: str, folder: str | None, *, size: Size) -> Picture:
    """Draw a random pattern, or a collage of windows of the photographs of the split."""
    name = pick(rng, (*PATTERNS, "collage"))
    pixels = collage(rng, split, folder, size=size) if name == "collage" else PATTERNS[name](rng, size)
    return Picture(name, pixels, "generated")


def draw_palette(rng: Generator, count: int) -> list[Color]:
    """Draw colors around a random mean color; saturation and contrast differ from palette to palette."""
    mean = float(rng.uniform(50, 205)) + float(rng.uniform(0, 100)) * rng.uniform(-1, 1, 3)
    light, colorful = draw_uniform(rng, (30, 140), (5, 100))
    values = mean + light * rng.uniform(-1, 1, (count, 1)) + colorful * rng.uniform(-1, 1, (count, 3))
    values = np.clip(values, 5, 250)
    return [(int(red), int(green), int(blue)) for red, green, blue in values]


def dead_leaves(rng: Generator, size: Size) -> Pixels:
    """Draw overlapping ellipses and polygons; like objects in photographs, small ones are much more frequent.

    A random part of the shapes has a weak texture.
    """
    width, height = (SAMPLES * side for side in size)
    palette = draw_palette(rng, int(rng.integers(4, 12)))
    image = Image.new("RGB", (width, height), palette[0])
    draw = ImageDraw.Draw(image)
    count, largest = int(rng.integers(25, 90)), float(rng.uniform(0.25, 0.5))
    for radius in np.sort(largest / (1 + rng.uniform(0, 9, count)))[::-1] * min(width, height):
        color = palette[int(rng.integers(len(palette)))]
        _draw_shape(rng, draw, color, middle=(rng.uniform(0, width), rng.uniform(0, height)), radius=float(radius))
    return _textured(rng, image, size, strength=float(rng.uniform(0, 40)))


def _draw_shape(rng: Generator, draw: ImageDraw.ImageDraw, color: Color, *, middle: tuple[float, float],
                radius: float) -> None:
    """Draw a filled ellipse, or a polygon with three to six random corners."""
    x, y = middle
    if rng.random() < 0.5:
        stretch = float(rng.uniform(0.5, 1.0))
        draw.ellipse((x - radius, y - radius * stretch, x + radius, y + radius * stretch), fill=color)
        return
    turns = np.sort(rng.uniform(0, 2, int(rng.integers(3, 7))))
    corners = [(x + radius * float(dx), y + radius * float(dy)) for dx, dy in map(_on_square, turns)]
    draw.polygon(corners, fill=color)


def _on_square(turn: float) -> tuple[float, float]:
    """Return the point on the border of the square from -1 to 1, for a value from 0 to 2 around the border."""
    side, rest = divmod(4 * turn / 2, 1.0)
    along = 2 * rest - 1
    return [(along, -1.0), (1.0, along), (-along, 1.0), (-1.0, -along)][int(side) % 4]


def fractal_noise(rng: Generator, size: Size) -> Pixels:
    """Draw clouds: noise whose coarse parts are stronger, with colors from a random palette."""
    height = _fractal(rng, size, float(rng.uniform(0.35, 0.75)))
    return _colored(rng, height)


def _fractal(rng: Generator, size: Size, decay: float) -> NDArray[np.float64]:
    """Return noise (height, width) from 0 to 1; each octave is `decay` times as strong as the next coarser octave."""
    total, weight, cells = np.zeros((size[1], size[0])), 1.0, int(rng.integers(2, 5))
    while cells <= max(size):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        total += weight * np.array(coarse.resize(size, Image.Resampling.BICUBIC))
        weight, cells = weight * decay, cells * 2
    return (total - total.min()) / (total.max() - total.min())


def _textured(rng: Generator, image: Image.Image, size: Size, *, strength: float) -> Pixels:
    """Reduce the image to the size, and add gray noise whose values span `strength` grey levels."""
    noise = strength * (_fractal(rng, size, float(rng.uniform(0.3, 1.0))) - 0.5)
    return to_pixels(np.array(image.resize(size, Image.Resampling.BOX)) + noise[:, :, None])


def _colored(rng: Generator, values: NDArray[np.float64]) -> Pixels:
    """Map values (height, width) from 0 to 1 to colors along a random palette of three to six colors."""
    palette = np.array(draw_palette(rng, int(rng.integers(3, 7))), dtype=np.float64)
    place = values * (len(palette) - 1)
    first = np.minimum(place.astype(np.int64), len(palette) - 2)
    share = (place - first)[:, :, None]
    return to_pixels((1 - share) * palette[first] + share * palette[first + 1])


def gradients(rng: Generator, size: Size) -> Pixels:
    """Draw a color gradient, straight or around a point, with a few shapes in front of it and a weak texture."""
    width, height = size
    u, v = (np.arange(width) + 0.5)[None, :] / width, (np.arange(height) + 0.5)[:, None] / height
    x, y = draw_uniform(rng, (-1, 1), (-1, 1))
    if rng.random() < 0.5:
        values = x * u + y * v + np.zeros((height, width))
    else:
        values = np.sqrt((u - (x + 1) / 2) ** 2 + (v - (y + 1) / 2) ** 2)
    ground = _colored(rng, (values - values.min()) / (values.max() - values.min()))
    image = Image.fromarray(ground).resize((SAMPLES * width, SAMPLES * height))
    draw, palette = ImageDraw.Draw(image), draw_palette(rng, 6)
    for color in palette[: int(rng.integers(2, 7))]:
        middle = float(rng.uniform(0, image.width)), float(rng.uniform(0, image.height))
        _draw_shape(rng, draw, color, middle=middle, radius=float(rng.uniform(0.08, 0.3)) * min(image.size))
    return _textured(rng, image, size, strength=float(rng.uniform(0, 25)))


def landscape(rng: Generator, size: Size) -> Pixels:
    """Draw a sky, a ground with a texture, an uneven horizon between them, and shapes that stand on the ground."""
    width, height = size
    sky, ground = (_colored(rng, _fractal(rng, size, decay)) for decay in (0.25, 0.8))
    line = np.array(Image.fromarray(rng.integers(0, 256, (1, int(rng.integers(2, 9))), dtype=np.uint8)).resize(
        (width, 1), Image.Resampling.BICUBIC))[0]
    horizon = height * (float(rng.uniform(0.3, 0.65)) + float(rng.uniform(0.02, 0.2)) * (line / 255 - 0.5))
    fade = np.linspace(0.75, 1.15, height)[:, None, None]
    pixels = np.where(np.arange(height)[:, None, None] < horizon[None, :, None], sky, ground * fade)
    image = Image.fromarray(to_pixels(pixels)).resize((SAMPLES * width, SAMPLES * height))
    draw = ImageDraw.Draw(image)
    for color in draw_palette(rng, int(rng.integers(1, 7))):
        wide, tall = (side * float(rng.uniform(0.03, 0.25)) for side in image.size)
        left, foot = float(rng.uniform(0, image.width)), image.height * float(rng.uniform(0.5, 0.95))
        shape = draw.rectangle if rng.random() < 0.6 else draw.ellipse
        shape((left, foot - 2 * tall, left + wide, foot), fill=color)
    return np.array(image.resize(size, Image.Resampling.BOX))


def text_like(rng: Generator, size: Size) -> Pixels:
    """Draw rows of short strokes on paper, which look like text; some words have another color."""
    width, height = (SAMPLES * side for side in size)
    paper, ink, mark = draw_palette(rng, 3)
    if rng.random() < 0.7:  # Most paper is bright and most ink is dark.
        paper, ink = (255 - paper[0] // 6, 255 - paper[1] // 6, 255 - paper[2] // 6), (ink[0] // 4, ink[1] // 4,
                                                                                     ink[2] // 4)
    image = Image.new("RGB", (width, height), paper)
    draw, line = ImageDraw.Draw(image), int(rng.integers(8, 27))
    y = int(rng.integers(2, line))
    while y < height - line // 2:
        x, color = int(rng.integers(3, 20)), ink
        while x < width - 4:
            if rng.random() < 0.2:  # A word ends here.
                x, color = x + line // 2, mark if rng.random() < 0.15 else ink
            glyph = line // 2
            points = [(x + int(dx), y + int(dy)) for dx, dy in rng.integers(0, glyph, (3, 2))]
            draw.line(points, fill=color, width=max(1, line // 8))
            x += glyph
        y += line
    return _textured(rng, image, size, strength=float(rng.uniform(5, 60)))


def stripes(rng: Generator, size: Size) -> Pixels:
    """Draw bricks or tiles: rows of rectangles of changing width, with joints between them, and a texture."""
    width, height = (SAMPLES * side for side in size)
    joint, *palette = draw_palette(rng, int(rng.integers(3, 7)))
    image = Image.new("RGB", (width, height), joint)
    draw, y = ImageDraw.Draw(image), 0
    tall, wide, gap = int(rng.integers(8, 50)), int(rng.integers(10, 80)), int(rng.integers(0, 5))
    while y < height:
        x = -int(rng.integers(wide))
        while x < width:
            step = wide + int(rng.integers(wide // 2 + 1))
            color = palette[int(rng.integers(len(palette)))]
            draw.rectangle((x, y, x + step - 1 - gap, y + tall - 1 - gap), fill=color)
            x += step
        y += tall
    return _textured(rng, image, size, strength=float(rng.uniform(5, 50)))


def collage(rng: Generator, split: str, folder: str | None, *, size: Size) -> Pixels:
    """Draw a picture of two to six windows of photographs of the split, each with other colors."""
    image = Image.fromarray(augment(rng, draw_window(rng, split, folder, size=size).pixels))
    for _ in range(int(rng.integers(1, 6))):
        width, height = (max(12, int(side * float(rng.uniform(0.25, 0.7)))) for side in size)
        window = augment(rng, draw_window(rng, split, folder, size=(width, height)).pixels)
        corner = int(rng.integers(-width // 4, size[0] - width // 2)), int(rng.integers(-height // 4,
                                                                                      size[1] - height // 2))
        image.paste(Image.fromarray(window), corner)
    return np.array(image)


PATTERNS: dict[str, Callable[[Generator, Size], Pixels]] = {
    "dead_leaves": dead_leaves, "fractal_noise": fractal_noise, "gradients": gradients, "landscape": landscape,
    "text_like": text_like, "stripes": stripes,
}
