"""Balls of plain colours, drawn here, for pools whose drawings hold no ball of one colour: "a red ball" names one.

Knows how a lit ball looks and the files of a pool. Knows nothing of clips.

Shapes: S side of a drawing in pixels.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import numpy as np
from PIL import Image

from tokenloom.data.emoji import SOURCES_FILE
from tokenloom.data.referring_pool import POOL_FILE, CutOut, Pool
from tokenloom.data.splits import TRAIN, VAL_STYLE, hash_fraction
from tokenloom.errors import TokenloomError, unknown_name

BALL = "ball"
"""Name and category of the balls."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 36),
    "orange": (242, 132, 24),
    "yellow": (248, 216, 44),
    "green": (44, 164, 62),
    "blue": (38, 92, 222),
    "purple": (128, 58, 190),
    "pink": (246, 122, 178),
    "brown": (132, 78, 42),
    "white": (248, 248, 248),
    "gray": (150, 150, 150),
    "black": (34, 34, 34),
}
"""Colour word -> its middle tone in sRGB."""

KINDS = ("matt", "glossy", "banded")
"""Matt and lit from the upper left; with a spot of light; with a lighter band."""

_LIGHT = (-0.42, -0.56, 0.714)  # from the ball, right down near
_LICENCE, _SOURCE = "CC0-1.0", "drawn by tokenloom"
_UNSEEN = 0.15
_FINER = 4  # drawn so much larger, then reduced


def draw_ball(colour: str, kind: str = "matt", size: int = 96) -> Image.Image:
    """An RGBA drawing (S, S) of a ball that touches all four borders.

    Args:
        colour: One of `COLOURS`.
        kind: One of `KINDS`.
        size: Side S in pixels.

    Raises:
        TokenloomError: For an unknown colour or kind, or a side below 8 pixels.
    """
    if colour not in COLOURS:
        raise unknown_name("colour of a ball", colour, COLOURS)
    if kind not in KINDS:
        raise unknown_name("kind of ball", kind, KINDS)
    if size < 8:
        raise TokenloomError(f"A ball is drawn on at least 8 pixels, got {size}.")
    line = (np.arange(size * _FINER) + 0.5) / (size * _FINER) * 2 - 1
    x, y = np.meshgrid(line, line)
    inside = x**2 + y**2 <= 1
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    lit = np.clip(x * _LIGHT[0] + y * _LIGHT[1] + z * _LIGHT[2], 0, 1)
    tone = np.broadcast_to(np.array(COLOURS[colour], dtype=np.float64), (*x.shape, 3)).copy()
    if kind == "banded":
        band = np.abs(x * 0.5 + y * 0.866) < 0.17
        tone[band] += 0.6 * (255 - tone[band]) if colour != "white" else -40
    shaded = tone * (0.68 + 0.4 * lit[..., None])
    if kind == "glossy":
        shaded += 200 * (lit[..., None] ** 30)
    pixels = np.concatenate([np.clip(shaded, 0, 255), 255.0 * inside[..., None]], axis=2)
    drawn = Image.fromarray(pixels.round().astype(np.uint8), "RGBA").convert(
        "RGBa"
    )  # edges keep their colour
    return drawn.resize((size, size), Image.Resampling.BOX).convert("RGBA")


def add_balls(folder: str | os.PathLike[str], size: int = 96) -> int:
    """Draws balls of every colour and kind into a pool, where it has none yet, and returns how many.

    About one drawing in seven is held out as "val_style"; every colour keeps one for training.

    Args:
        folder: Folder of a pool; its pool.json is written anew.
        size: Side of the drawings in pixels.

    Raises:
        TokenloomError: If the folder is no pool.
    """
    pool = Pool.open(folder)
    if any(item.category == BALL for item in pool.cut_outs):
        return 0
    made = []
    for colour in COLOURS:
        for kind in KINDS:
            file = f"cut/ball-{colour}-{kind}.webp"
            (pool.folder / file).parent.mkdir(exist_ok=True)
            draw_ball(colour, kind, size).save(pool.folder / file, lossless=True)
            unseen = kind != "matt" and hash_fraction(f"cut/{BALL}/{colour}/{kind}") < _UNSEEN
            made.append(
                CutOut(
                    file=file,
                    name=BALL,
                    category=BALL,
                    colour=colour,
                    split=VAL_STYLE if unseen else TRAIN,
                    licence=_LICENCE,
                    source=_SOURCE,
                )
            )
    content = {
        "cut_outs": [asdict(item) for item in (*pool.cut_outs, *made)],
        "backgrounds": [asdict(item) for item in pool.backgrounds],
    }
    scratch = pool.folder / f".{POOL_FILE}-{os.getpid()}"
    scratch.write_text(json.dumps(content, indent=0), encoding="utf-8")
    scratch.replace(pool.folder / POOL_FILE)
    with (pool.folder / SOURCES_FILE).open("a", encoding="utf-8") as credits:
        credits.write(f"\n# Balls\n\nBalls of {len(COLOURS)} colours: {_SOURCE}, {_LICENCE}.\n")
    return len(made)
