"""Emblems and scenes, drawn with Pillow, and the perceptual hash that keeps emblems apart."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw

from tapo_train.demo.world.lexicon import COLOURS

EMBLEM_SIDE = 96
"""[px] side of an emblem in the index."""
SCENE_SIDE = 256
"""[px] side of a scene; its four panels are half as wide."""
MIN_HASH_DISTANCE = 14
"""[bits of 64] two emblems of one world differ by at least this much."""

_TILE = (232, 228, 220)
_INKS = ((20, 20, 20), (90, 20, 20), (20, 60, 30), (25, 35, 95))
_GRID = 5


def draw_emblem(rng: random.Random) -> PilImage.Image:
    """A framed tile with a random pattern of discs, squares, diamonds and triangles."""
    image = PilImage.new("RGB", (EMBLEM_SIDE, EMBLEM_SIDE), _TILE)
    draw = ImageDraw.Draw(image)
    cell = EMBLEM_SIDE / _GRID
    for row in range(_GRID):
        for column in range(_GRID):
            if rng.random() < 0.45:
                _draw_charge(draw, rng, column * cell, row * cell, cell)
    draw.rectangle((0, 0, EMBLEM_SIDE - 1, EMBLEM_SIDE - 1), outline=(0, 0, 0), width=3)
    return image


def _draw_charge(
    draw: ImageDraw.ImageDraw, rng: random.Random, x: float, y: float, cell: float
) -> None:
    ink = rng.choice(_INKS)
    box = (x, y, x + cell, y + cell)
    shape = rng.randrange(4)
    if shape == 0:
        draw.ellipse(box, fill=ink)
    elif shape == 1:
        draw.rectangle(box, fill=ink)
    elif shape == 2:
        half = cell / 2
        points = [(x + half, y), (x + cell, y + half), (x + half, y + cell), (x, y + half)]
        draw.polygon(points, fill=ink)
    else:
        draw.polygon([(x, y + cell), (x + cell, y + cell), (x + cell / 2, y)], fill=ink)


def draw_distinct_emblems(seed: int, count: int) -> list[PilImage.Image]:
    """`count` emblems whose hashes differ pairwise by at least MIN_HASH_DISTANCE bits."""
    rng = random.Random(f"emblems/{seed}")
    emblems: list[PilImage.Image] = []
    hashes: list[int] = []
    while len(emblems) < count:
        emblem = draw_emblem(rng)
        code = perceptual_hash(emblem)
        if all((code ^ other).bit_count() >= MIN_HASH_DISTANCE for other in hashes):
            emblems.append(emblem)
            hashes.append(code)
    return emblems


def perceptual_hash(image: PilImage.Image) -> int:
    """64 bits: which low frequencies (DCT) of the brightness are above their median."""
    small = image.convert("L").resize((32, 32), PilImage.Resampling.LANCZOS)
    place = (np.arange(32) + 0.5) * np.pi / 32
    waves = np.cos(np.outer(np.arange(8), place))
    low = waves @ np.asarray(small, dtype=np.float64) @ waves.T
    bits = (low > np.median(low)).flatten().tolist()
    return int("".join("01"[bit] for bit in bits), 2)


def draw_scene(rng: random.Random, panels: list[tuple[str, PilImage.Image]]) -> PilImage.Image:
    """Four coloured panels in reading order, an emblem somewhere on each.

    Place and size of an emblem vary within its panel; it keeps a margin of 6 % of
    the scene's side to the panel's edges, so a box anywhere between the emblem and
    the panel's edge isolates it.
    """
    scene = PilImage.new("RGB", (SCENE_SIDE, SCENE_SIDE))
    half, margin = SCENE_SIDE // 2, round(0.06 * SCENE_SIDE)
    for index, (colour, emblem) in enumerate(panels):
        left, top = half * (index % 2), half * (index // 2)
        scene.paste(COLOURS[colour], (left, top, left + half, top + half))
        side = rng.randint(round(0.45 * half), half - 2 * margin)
        x = left + rng.randint(margin, half - margin - side)
        y = top + rng.randint(margin, half - margin - side)
        scene.paste(emblem.resize((side, side), PilImage.Resampling.LANCZOS), (x, y))
    return scene
