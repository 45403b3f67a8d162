"""Moving cut-outs: clips of one thing that moves on a plain colour or a photograph, with captions and exact tracks.

A clip is a function of (pool, split, settings, seed). The motion is synthetic and the pictures are real. Held out are the
names and pictures that the pool holds out, and pairs of a known name with a known motion. Knows pictures; knows nothing of
files of clips, tokens or torch.

Shapes: T frames, S side of a frame in pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tokenloom.data.referring_names import COLOURS
from tokenloom.data.referring_pool import Background, CutOut, Pool
from tokenloom.data.splits import TRAIN, hash_fraction
from tokenloom.errors import TokenloomError, unknown_name

VAL_PAIR = "val_pair"
"""Split of known things that do what they were never seen to do."""

_UNSEEN_PAIRS = 0.1

MOTIONS: dict[str, tuple[str, ...]] = {
    "right": ("moving left to right", "moving right", "moving to the right"),
    "left": ("moving right to left", "moving left", "moving to the left"),
    "up": ("moving up", "rising", "moving upwards"),
    "down": ("moving down", "sinking", "moving downwards"),
    "bouncing": ("bouncing",),
    "circling": ("moving in a circle", "circling"),
    "growing": ("growing", "getting larger"),
    "shrinking": ("shrinking", "getting smaller"),
    "turning": ("turning", "spinning"),
    "still": ("standing still",),
}
"""Motion -> how captions say it; the first is the usual one."""


@dataclass(frozen=True)
class MotionConfig:
    """How clips are made.

    Attributes:
        size: Side of a frame in pixels.
        frames: Frames of a clip; the whole motion happens in them.
        smallest: Least longest side of a thing, as a share of the frame.
        largest: Largest longest side.
        plain: Chance of a plain colour behind the thing; otherwise a photograph.
        motions: Some of `MOTIONS`; empty for all.
        categories: Only things of these categories of the pool; empty for all.
        colour: Chance that a caption begins with the colour of the thing, where it has one.
        vary: Chance that a caption says the motion in other words than the usual ones.
    """

    size: int = 64
    frames: int = 17
    smallest: float = 0.3
    largest: float = 0.5
    plain: float = 0.7
    motions: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    colour: float = 0.5
    vary: float = 0.3

    def __post_init__(self) -> None:
        for name in self.motions:
            if name not in MOTIONS:
                raise unknown_name("motion", name, MOTIONS)
        if self.size < 16 or self.frames < 2 or not 0 < self.smallest <= self.largest <= 0.7:
            raise TokenloomError(
                "Clips need a size of at least 16 pixels, at least 2 frames, and 0 < smallest <= largest <= 0.7, got "
                f"{self}."
            )
        for name in ("plain", "colour", "vary"):
            if not 0 <= getattr(self, name) <= 1:
                raise TokenloomError(f"{name} is a chance between 0 and 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class MovingClip:
    """A clip.

    Attributes:
        frames: uint8 (T, S, S, 3).
        text: Its caption.
        thing: Name of what moves.
        motion: One of `MOTIONS`.
        track: float64 (T, 3): centre of the visible pixels (x, y), 0 at the upper left to 1, and their share of the frame.
        plain: Whether it moves on a plain colour.
        source: Licences and sources of the pictures in it.
    """

    frames: np.ndarray
    text: str
    thing: str
    motion: str
    track: np.ndarray
    plain: bool
    source: tuple[tuple[str, str], ...]


class MotionMaker:
    """Makes the clips of one split of a pool.

    Args:
        pool: A pool of cut-outs and photographs; its pictures are read when they are first needed and kept.
        split: "train"; "val": held-out names; "val_style": held-out pictures of known names; "val_pair": held-out pairs of
            a known name and a motion.
        config: How.

    Raises:
        TokenloomError: If the split has no pictures, or none of the categories.
    """

    def __init__(self, pool: Pool, split: str = TRAIN, config: MotionConfig | None = None) -> None:
        self.config = config or MotionConfig()
        self.split = split
        self.pool = pool.part(TRAIN if split == VAL_PAIR else split, self.config.categories)
        motions = self.config.motions or tuple(MOTIONS)
        choices = [(item, [m for m in motions if self._allowed(item.name, m)]) for item in self.pool.cut_outs]
        self.choices = [(item, allowed) for item, allowed in choices if allowed]
        if not self.choices:
            raise TokenloomError(
                f"The pool {str(pool.folder)!r} has no cut-outs for clips of the split {split!r}; take more motions or "
                "categories, or a larger pool."
            )

    def _allowed(self, name: str, motion: str) -> bool:
        if self.split not in (TRAIN, VAL_PAIR):
            return True
        return is_unseen_motion(name, motion) == (self.split == VAL_PAIR)

    @property
    def things(self) -> tuple[str, ...]:
        """The names of this split, each once."""
        return tuple(sorted({item.name for item, _ in self.choices}))

    def texts(self) -> list[str]:
        """Texts that together hold every word of the captions of this split."""
        colours = sorted({item.colour for item, _ in self.choices if item.colour})
        said = [words for motion in self.config.motions or MOTIONS for words in MOTIONS[motion]]
        return [*(with_article(name) for name in self.things), *said, *colours, "a an"]

    def clip(self, seed: int) -> MovingClip:
        """The clip of a seed."""
        rng = random.Random(f"clip {seed}")
        thing, allowed = rng.choice(self.choices)
        motion = rng.choice(allowed)
        ground, photograph = self._ground(rng)
        places = _path(motion, self.config, rng)  # (T, 4)
        layers = self._layers(self.pool.picture(thing.file, "RGBA"), places, rng)
        alpha = layers[..., 3:] / np.float32(255)
        frames = ground * (1 - alpha) + layers[..., :3]  # premultiplied
        made: list[CutOut | Background] = [thing, *([photograph] if photograph else [])]
        return MovingClip(
            frames=np.clip(frames, 0, 255).round().astype(np.uint8),
            text=caption_of(thing, motion, self.config, rng),
            thing=thing.name,
            motion=motion,
            track=_track(alpha[..., 0]),
            plain=photograph is None,
            source=tuple((item.licence, item.source) for item in made),
        )

    def _ground(self, rng: random.Random) -> tuple[np.ndarray, Background | None]:
        """Background float32 (S, S, 3) or (1, 1, 3), and the photograph that it is a part of."""
        if rng.random() < self.config.plain:
            colour = [rng.uniform(0, 255) for _ in range(3)] if rng.random() < 0.8 else [255.0] * 3
            return np.array([[colour]], dtype=np.float32), None
        item = rng.choice(self.pool.backgrounds)
        picture, size = self.pool.picture(item.file, "RGB"), self.config.size
        side = min(picture.size) * rng.uniform(0.4, 1.0)
        left, top = rng.uniform(0, picture.width - side), rng.uniform(0, picture.height - side)
        box = (left, top, left + side, top + side)
        ground = picture.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        return np.asarray(ground, dtype=np.float32), item

    def _layers(self, picture: Image.Image, places: np.ndarray, rng: random.Random) -> np.ndarray:
        """The thing alone in every frame: float32 (T, S, S, 4), colours multiplied by alpha."""
        size = self.config.size
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        longest = float(places[:, 2].max()) * size
        factor = longest / max(picture.size)
        shape = (max(2, round(picture.width * factor)), max(2, round(picture.height * factor)))
        patch = picture.convert("RGBa").resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0)
        rim = Image.new(
            "RGBa", (patch.width + 2, patch.height + 2)
        )  # so that edges fade when they move by parts of pixels
        rim.paste(patch, (1, 1))
        middle = (rim.width / 2, rim.height / 2)
        layers = []
        for x, y, side, angle in places:
            shrink = longest / (side * size)  # pixels of the patch a pixel of the frame, at least 1
            cos, sin = math.cos(angle) * shrink, math.sin(angle) * shrink
            left, top = -x * size, -y * size
            across = (cos, sin, middle[0] + cos * left + sin * top)
            down = (-sin, cos, middle[1] - sin * left + cos * top)
            drawn = rim.transform(
                (size, size), Image.Transform.AFFINE, across + down, Image.Resampling.BILINEAR
            )
            layers.append(np.asarray(drawn, dtype=np.float32))
        return np.stack(layers)


def is_unseen_motion(name: str, motion: str) -> bool:
    """Whether a pair of a name and a motion is held out (about 10 % of pairs)."""
    return hash_fraction(f"{name}/{motion}") < _UNSEEN_PAIRS


def caption_of(thing: CutOut, motion: str, config: MotionConfig, rng: random.Random) -> str:
    """A caption such as "a red apple moving left to right"."""
    words = MOTIONS[motion]
    said = rng.choice(words) if rng.random() < config.vary else words[0]
    named = set(thing.name.split()) & set(COLOURS)
    coloured = thing.colour and not named and rng.random() < config.colour
    return f"{with_article(f'{thing.colour} {thing.name}' if coloured else thing.name)} {said}"


def with_article(name: str) -> str:
    """A name as it stands in a sentence: "an apple", "a bus", "grapes"."""
    if name.endswith("s") and not name.endswith(("ss", "us")):
        return name
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _track(alpha: np.ndarray) -> np.ndarray:
    """Centre and share (T, 3) of what is visible in alpha (T, S, S)."""
    size = alpha.shape[1]
    mass = alpha.sum(axis=(1, 2), dtype=np.float64)
    place = (np.arange(size) + 0.5) / size
    x = (alpha.sum(axis=1) * place).sum(axis=1) / np.maximum(mass, 1e-6)
    y = (alpha.sum(axis=2) * place).sum(axis=1) / np.maximum(mass, 1e-6)
    return np.stack([x, y, mass / size**2], axis=1)


# ---- paths: (T, 4) of x, y, side and angle; shares of the frame and radians


def _path(motion: str, config: MotionConfig, rng: random.Random) -> np.ndarray:
    """Where the thing is, how large, and how far turned, in every frame."""
    part = np.linspace(0.0, 1.0, config.frames)
    side = rng.uniform(config.smallest, config.largest)
    edge = side / 2 + 0.02  # how near its middle may come to the border
    x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
    values: dict[str, Any] = {"x": x, "y": y, "side": side, "angle": 0.0}
    values.update(_PATHS[motion](part, edge, side, rng))
    return np.stack([np.broadcast_to(values[key], part.shape) for key in ("x", "y", "side", "angle")], axis=1)


_Path = Callable[[np.ndarray, float, float, random.Random], dict[str, Any]]


def _across(axis: str, forward: bool) -> _Path:
    """From near one border to near the other."""

    def path(part: np.ndarray, edge: float, side: float, rng: random.Random) -> dict[str, Any]:
        room = 1 - 2 * edge
        line = edge + rng.uniform(0, 0.15) * room + part * rng.uniform(0.8, 0.85) * room
        return {axis: line if forward else 1 - line}

    return path


def _bounce(part: np.ndarray, edge: float, side: float, rng: random.Random) -> dict[str, Any]:
    jumps, start = rng.choice((2, 3)), rng.random()
    fall = np.abs(np.sin(math.pi * (jumps * part + start)))
    return {"y": 1 - edge - fall * rng.uniform(0.7, 1.0) * (1 - 2 * edge)}


def _circle(part: np.ndarray, edge: float, side: float, rng: random.Random) -> dict[str, Any]:
    radius = rng.uniform(0.6, 1.0) * (0.5 - edge)
    turn = 2 * math.pi * (rng.choice((-1, 1)) * part + rng.random())
    return {"x": 0.5 + radius * np.cos(turn), "y": 0.5 + radius * np.sin(turn)}


def _scale(grows: bool) -> _Path:
    def path(part: np.ndarray, edge: float, side: float, rng: random.Random) -> dict[str, Any]:
        least = side * rng.uniform(0.4, 0.55)
        line = least + (side - least) * part
        return {"side": line if grows else line[::-1]}

    return path


def _turn(part: np.ndarray, edge: float, side: float, rng: random.Random) -> dict[str, Any]:
    room = max(edge, min(0.5, 0.75 * side))  # its corners stick out
    angle = 2 * math.pi * rng.choice((-1, 1)) * rng.uniform(0.75, 1.25) * part
    return {"x": rng.uniform(room, 1 - room), "y": rng.uniform(room, 1 - room), "angle": angle}


def _still(part: np.ndarray, edge: float, side: float, rng: random.Random) -> dict[str, Any]:
    return {}


_PATHS: dict[str, _Path] = {
    "right": _across("x", True),
    "left": _across("x", False),
    "up": _across("y", False),
    "down": _across("y", True),
    "bouncing": _bounce,
    "circling": _circle,
    "growing": _scale(True),
    "shrinking": _scale(False),
    "turning": _turn,
    "still": _still,
}
