"""Small images on disk, whose colour gives their class away."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}
SIDE = 16


def picture(rng: random.Random, name: str, side: int = SIDE) -> Image.Image:
    """One colour and noise."""
    noise = np.random.default_rng(rng.randrange(2**31)).integers(-20, 20, (side, side, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def class_folders(root: Path, *, each: int = 12, seed: int = 0) -> Path:
    """`root/red/3.png` and so on."""
    rng = random.Random(seed)
    for name in COLOURS:
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(rng, name).save(root / name / f"{i:02}.png")
    return root
