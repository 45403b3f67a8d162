"""Scenes of the referring set: cut-outs on a photograph, with exact masks of what stays visible.

A scene is a function of (pool, split, settings, seed). The finished composite is blurred, noised and JPEG-coded as a whole,
so that the seams of what was pasted say nothing. Knows pictures; knows nothing of phrases, networks or torch.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from tokenloom.data.referring_names import COLOURS, LIVING, colour_of
from tokenloom.data.referring_pool import Background, CutOut, Pool
from tokenloom.errors import TokenloomError

_COUNTS = (0.2, 0.3, 0.3, 0.2)  # of 1, 2, 3 and 4 objects
_SAME_NAME, _SAME_CATEGORY = 0.3, 0.3
_TRIES = 12  # places tried for an object before it is left out
_VISIBLE = 0.6  # of its pixels that must stay visible
_LEAST = 0.004  # of the scene's pixels
_INSIDE = 0.9  # of an object's sides inside the scene


@dataclass(frozen=True)
class SceneConfig:
    """How scenes are made.

    Attributes:
        size: Side of a scene in pixels.
        categories: Only objects of these categories of the pool; empty for all.
        most: Most objects, 1 to 4.
        smallest: Least side of an object, as a share of the scene's.
        largest: Largest side of an object.
        rotate: Largest rotation in degrees.
        shadow: Chance of a shadow.
        blur: Largest radius of the blur over the whole scene.
        noise: Largest standard deviation of the noise over the whole scene, in levels of 255.
        jpeg: Lowest JPEG quality of the whole scene; 100 leaves it uncoded.
    """

    size: int = 128
    categories: tuple[str, ...] = ()
    most: int = 4
    smallest: float = 0.2
    largest: float = 0.6
    rotate: float = 25.0
    shadow: float = 0.5
    blur: float = 0.8
    noise: float = 6.0
    jpeg: int = 55

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
        right = self.size >= 16 and 1 <= self.most <= len(_COUNTS) and 0 < self.smallest <= self.largest <= 1
        if not right or not 1 <= self.jpeg <= 100 or min(self.blur, self.noise, self.rotate) < 0:
            raise TokenloomError(
                f"Scenes need a size of at least 16, 1 to {len(_COUNTS)} objects, 0 < smallest <= largest <= 1, a JPEG quality "
                f"of 1 to 100 and no negative strengths, got {self}."
            )


@dataclass(frozen=True)
class Thing:
    """An object of a scene.

    Attributes:
        name: What it is called.
        category: Its category, or `None`.
        colour: A colour word, or `None`.
        area: Its visible pixels, as a share of the scene.
        x: Centre of its visible pixels, 0 at the left to 1.
        y: The same, 0 at the top.
    """

    name: str
    category: str | None
    colour: str | None
    area: float = 0.0
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A scene.

    Attributes:
        picture: uint8 (S, S, 3).
        instances: uint8 (S, S): 0 is background, i + 1 is visible object i.
        things: Its objects.
        quiet: Whether it is known what the background shows.
        shows: Words for what it shows; nothing that they name is asked for.
    """

    picture: np.ndarray
    instances: np.ndarray
    things: tuple[Thing, ...]
    quiet: bool
    shows: tuple[str, ...] = ()

    def mask(self, targets: tuple[int, ...]) -> np.ndarray:
        """Bool (S, S) of the visible pixels of some objects; empty for none."""
        return np.isin(self.instances, [target + 1 for target in targets])


@dataclass(frozen=True)
class _Placed:
    patch: Image.Image
    at: tuple[int, int]
    thing: Thing


class SceneMaker:
    """Makes the scenes of one split of a pool.

    Args:
        pool: A pool; its pictures are read when they are first needed and kept.
        split: "train", "val_style" or "val".
        config: How.
    """

    def __init__(self, pool: Pool, split: str = "train", config: SceneConfig | None = None) -> None:
        self.split, self.config = split, config or SceneConfig()
        self.pool = pool.part(split, self.config.categories)
        self._strange_names: dict[tuple[bool, tuple[str, ...]], tuple[str, ...]] = {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the split's cut-outs, each once."""
        return tuple(sorted({item.name for item in self.pool.cut_outs}))

    def absent_names(self, scene: Scene) -> tuple[str, ...]:
        """Names of the split that the background of a scene cannot show by chance."""
        key = scene.quiet, scene.shows
        if key not in self._strange_names:
            kinds = (None, "building", *scene.shows, *(() if scene.quiet else LIVING))
            hidden = {item.name for item in self.pool.cut_outs if item.category in kinds}
            hidden |= {name for name in self.names if set(name.split()) & set(scene.shows)}
            self._strange_names[key] = tuple(name for name in self.names if name not in hidden)
        return self._strange_names[key]

    @cached_property
    def _by_name(self) -> dict[str, list[CutOut]]:
        return _group(self.pool.cut_outs, "name")

    @cached_property
    def _by_category(self) -> dict[str, list[CutOut]]:
        return _group(self.pool.cut_outs, "category")

    def scene(self, seed: int) -> Scene:
        """The scene of a seed; at least one object is in it."""
        rng = random.Random(f"scene {seed}")
        ground, item = self._ground(rng)
        placed, instances = self._place(rng)
        canvas = np.asarray(ground, dtype=np.float32)
        for one in placed:
            canvas = self._paste(canvas, one, rng)
        size = self.config.size
        things = []
        for index, one in enumerate(placed):
            rows, columns = np.nonzero(instances == index + 1)
            middle = ((columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size)
            things.append(replace(one.thing, area=len(rows) / size**2, x=middle[0], y=middle[1]))
        return Scene(self._finish(canvas, rng), instances, tuple(things), item.quiet, tuple(item.shows))

    def masks(self, seed: int) -> np.ndarray:
        """uint8 (S, S) instances of a scene of a seed, without painting the picture: for mask tokenizers."""
        return self._place(random.Random(f"masks {seed}"))[1]

    def _ground(self, rng: random.Random) -> tuple[Image.Image, Background]:
        item = rng.choice(self.pool.backgrounds)
        picture, size = self.pool.picture(item.file, "RGB"), self.config.size
        side = min(picture.size) * rng.uniform(0.4, 1.0)
        left, top = rng.uniform(0, picture.width - side), rng.uniform(0, picture.height - side)
        box = (left, top, left + side, top + side)
        ground = picture.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        if rng.random() < 0.5:
            ground = ground.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return ImageEnhance.Brightness(ground).enhance(rng.uniform(0.7, 1.2)), item

    def _choose(self, rng: random.Random, before: list[tuple[CutOut, bool]]) -> tuple[CutOut, bool]:
        """The next cut-out, and whether its hue is turned."""
        draw = rng.random()
        model = rng.choice(before)[0] if before else None
        if model is not None and draw < _SAME_NAME:
            plain = not set(model.name.split()) & set(COLOURS)
            return rng.choice(self._by_name[model.name]), plain and rng.random() < 0.5
        if model is not None and model.category is not None and draw < _SAME_NAME + _SAME_CATEGORY:
            return rng.choice(self._by_category[model.category]), False
        return rng.choice(self.pool.cut_outs), False

    def _place(self, rng: random.Random) -> tuple[list[_Placed], np.ndarray]:
        """Objects at places where all stay visible, and the map (S, S) of visible pixels."""
        config, size = self.config, self.config.size
        count = rng.choices(range(1, config.most + 1), _COUNTS[: config.most])[0]
        chosen: list[tuple[CutOut, bool]] = []
        for _ in range(count):
            chosen.append(self._choose(rng, chosen))
        instances = np.zeros((size, size), dtype=np.uint8)
        placed: list[_Placed] = []
        areas: list[int] = []
        for cut_out, turned in chosen:
            patch, colour = self._patch(cut_out, turned, count, rng)
            solid = np.asarray(patch.getchannel("A")) > 127
            for _ in range(_TRIES):
                at = (_offset(patch.width, size, rng), _offset(patch.height, size, rng))
                trial, whole = _stamp(instances, solid, at, len(placed) + 1)
                seen = [int((trial == index + 1).sum()) for index in range(len(placed))]
                kept = all(now >= _VISIBLE * was for now, was in zip(seen, areas, strict=True))
                if whole >= max(8, _LEAST * size**2) and kept:
                    instances = trial
                    areas.append(whole)
                    thing = Thing(cut_out.name, cut_out.category, colour)
                    placed.append(_Placed(patch, at, thing))
                    break
        if not placed:
            return self._place(rng)
        return placed, instances

    def _patch(
        self, cut_out: CutOut, turned: bool, count: int, rng: random.Random
    ) -> tuple[Image.Image, str | None]:
        config = self.config
        picture, colour = self.pool.picture(cut_out.file, "RGBA"), cut_out.colour
        if turned:
            picture = _turn_hue(picture, rng.randint(40, 215))
            colour = colour_of(picture)
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        largest = config.largest if count < 3 else max(config.smallest, 0.75 * config.largest)
        side = config.size * rng.uniform(config.smallest, largest)
        factor = side / max(picture.size)
        shape = (max(3, round(picture.width * factor)), max(3, round(picture.height * factor)))
        picture = picture.convert("RGBa").resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0)
        if config.rotate and rng.random() < 0.6:
            angle = rng.uniform(-config.rotate, config.rotate)
            picture = picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        return picture.convert("RGBA"), colour

    def _paste(self, canvas: np.ndarray, item: _Placed, rng: random.Random) -> np.ndarray:
        size = self.config.size
        layer = Image.new("RGBA", (size, size))
        layer.paste(item.patch, item.at)
        values = np.asarray(layer, dtype=np.float32)
        if rng.random() < self.config.shadow:
            reach = max(1, round(size * 0.03))
            move = (rng.randint(-reach, reach), rng.randint(0, reach))
            dark = Image.new("L", (size, size))
            dark.paste(item.patch.getchannel("A"), (item.at[0] + move[0], item.at[1] + move[1]))
            dark = dark.filter(ImageFilter.GaussianBlur(size * 0.02))
            canvas = canvas * (1 - rng.uniform(0.2, 0.6) * np.asarray(dark, np.float32)[..., None] / 255)
        alpha = values[..., 3:] / 255
        bright = np.clip(values[..., :3] * rng.uniform(0.75, 1.2), 0, 255)
        return canvas * (1 - alpha) + bright * alpha

    def _finish(self, canvas: np.ndarray, rng: random.Random) -> np.ndarray:
        """Blur, noise and JPEG over the whole scene: uint8 (S, S, 3)."""
        config = self.config
        picture = Image.fromarray(np.clip(canvas, 0, 255).round().astype(np.uint8))
        if config.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, config.blur)))
        values = np.asarray(picture, dtype=np.float32)
        if config.noise:
            noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(values.shape, dtype=np.float32)
            values = values + rng.uniform(0, config.noise) * noise
        picture = Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8))
        if config.jpeg < 100:
            coded = io.BytesIO()
            picture.save(coded, "JPEG", quality=rng.randint(config.jpeg, 95))
            with Image.open(coded) as opened:
                picture = opened.convert("RGB")
        return np.array(picture)


def _offset(side: int, size: int, rng: random.Random) -> int:
    """Where a side begins, so that at most a small share of it lies outside."""
    return rng.randint(round(-side * (1 - _INSIDE)), max(0, round(size - _INSIDE * side)))


def _group(items: tuple[CutOut, ...], key: str) -> dict[str, list[CutOut]]:
    groups: dict[str, list[CutOut]] = {}
    for item in items:
        if (value := getattr(item, key)) is not None:
            groups.setdefault(value, []).append(item)
    return groups


def _stamp(
    instances: np.ndarray, solid: np.ndarray, at: tuple[int, int], number: int
) -> tuple[np.ndarray, int]:
    """The map with an object on top, and how many pixels of it lie inside; it is cut at the border."""
    height, width = instances.shape
    left, top = at
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + solid.shape[1], width), min(top + solid.shape[0], height)
    result = instances.copy()
    if x0 >= x1 or y0 >= y1:
        return result, 0
    part = solid[y0 - top : y1 - top, x0 - left : x1 - left]
    result[y0:y1, x0:x1][part] = number
    return result, int(part.sum())


def _turn_hue(picture: Image.Image, by: int) -> Image.Image:
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    turned = Image.merge("HSV", (hue.point(lambda old: (old + by) % 256), saturation, value)).convert("RGB")
    turned.putalpha(picture.getchannel("A"))
    return turned
