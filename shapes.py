"""The toy data set `shapes`: ten classes that the program draws, so that a first run downloads nothing.

python -c "from shapes import draw_shape; draw_shape(0, 'val', 4, 96)[0].save('square.png')"
"""

import random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SHAPES = ("circle", "ring", "half", "triangle", "square", "bar", "plus", "star", "arrow", "ell")


def outline(shape: str) -> np.ndarray:
    """The corners (n, 2) of a shape centered on the origin, reaching to about 1."""
    polygons = {
        "bar": [(-1.1, -0.35), (1.1, -0.35), (1.1, 0.35), (-1.1, 0.35)],
        "plus": [(-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3),
                 (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)],
        "arrow": [(-1.1, -0.25), (0.1, -0.25), (0.1, -0.85), (1.1, 0), (0.1, 0.85), (0.1, 0.25),
                  (-1.1, 0.25)],
        "ell": [(-0.8, -1), (-0.2, -1), (-0.2, 0.4), (0.8, 0.4), (0.8, 1), (-0.8, 1)],
    }  # fmt: skip
    if shape in polygons:
        return np.array(polygons[shape])
    count, radius = {"triangle": (3, 1.1), "square": (4, 1.1), "star": (10, 1.15)}.get(shape, (24, 1.0))
    turn = np.pi if shape == "half" else 2 * np.pi
    angles = np.linspace(0, turn, 24) if count == 24 else np.arange(count) / count * turn
    corners = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "star":
        corners[1::2] *= 0.45 / 1.15
    return corners - (0, 0.4 if shape == "half" else 0)


OUTLINES = {shape: outline(shape) for shape in SHAPES}
CUES = 0.6  # the share of images that have their class's color; and, separately, its texture


def draw_shape(seed: int, split: str, index: int, size: int) -> tuple[Image.Image, int]:
    """Image `index` of a split: RGB (size, size) and its label, index mod 10; always the same.

    Its color and its texture (solid, stripes or dots) are its class's more often than not, else any class's.
    Its outline is always its class's, under shift, scale, a little rotation and clutter.
    """
    rng, label = random.Random(f"{seed}/{split}/{index}"), index % 10
    side = 3 * size  # drawn large and reduced, for smooth edges

    def color(hue: float, low: float, high: float) -> tuple[int, int, int]:
        hsv = (int(hue * 256) % 256, rng.randint(120, 255), int(255 * rng.uniform(low, high)))
        return Image.new("HSV", (1, 1), hsv).convert("RGB").getpixel((0, 0))

    image = Image.new("RGB", (side, side), color(rng.random(), 0.05, 0.3))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 3)):  # clutter: dim blobs and lines behind the shape
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.03, 0.12) * side
        shade = color(rng.random(), 0.2, 0.5)
        if rng.random() < 0.5:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=shade)
        else:
            end = (rng.uniform(0, side), rng.uniform(0, side))
            draw.line((x, y, *end), fill=shade, width=max(1, int(r / 3)))

    class_hue = (label + rng.gauss(0, 0.25)) / 10
    hue = class_hue if rng.random() < CUES else rng.random()
    texture = label % 3 if rng.random() < CUES else rng.randrange(3)
    fill = Image.new("RGB", (side, side), color(hue, 0.65, 1.0))
    pattern, second = ImageDraw.Draw(fill), color(hue + 0.08, 0.45, 0.6)
    step = max(3, int(side * rng.uniform(0.09, 0.13)))
    for i in range(0, side, step):
        if texture == 1:
            pattern.rectangle((0, i, side, i + step // 2), fill=second)
        elif texture == 2:
            for j in range(0, side, step):
                pattern.ellipse((i, j, i + step // 2, j + step // 2), fill=second)

    angle, radius = rng.uniform(-1, 1) * np.pi / 36, rng.uniform(0.38, 0.43) * side
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    center = np.array([rng.uniform(0.47, 0.53) * side, rng.uniform(0.47, 0.53) * side])
    corners = OUTLINES[SHAPES[label]] @ turn
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in corners * radius + center], fill=255)
    if SHAPES[label] == "ring":
        ImageDraw.Draw(mask).polygon([tuple(p) for p in corners * radius * 0.55 + center], fill=0)
    image.paste(fill, mask=mask)
    return image.reduce(3), label


def draw_shapes(split: str, count: int, size: int) -> tuple[Tensor, Tensor]:
    """The first `count` shapes of a split: images uint8 (count, 3, size, size) and labels int64 (count,)."""
    images, labels = zip(*(draw_shape(0, split, index, size) for index in range(count)), strict=True)
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images]))  # (count, size, size, 3)
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
