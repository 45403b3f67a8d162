"""The recipe of the Flare sprites: clips of 3-D rendered creatures in eight directions. Share-alike: ask for it by name.

Reads the frame tables of the game Flare (Debian package flare-game, art under CC-BY-SA-3.0 or later). Knows the package and
its text format. Knows nothing of tokens.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tokenloom.data.building import building
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.emoji import SOURCES_FILE, BuildReport
from tokenloom.data.moving import with_article
from tokenloom.data.other_packages import (
    Fetch,
    fetch_package,
    permission_of,
    read_copyright,
    unpack_package,
)
from tokenloom.data.splits import TRAIN, VAL, hash_fraction
from tokenloom.errors import TokenloomError
from tokenloom.media_video import save_clip

PACKAGE, VERSION = "flare-game", "1.14-1"
LICENCE = "CC-BY-SA-3.0+"
DIRECTIONS = ("west", "north-west", "north", "north-east", "east", "south-east", "south", "south-west")
ACTIONS = {
    "stance": "standing idle facing",
    "run": "running",
    "swing": "swinging a weapon facing",
    "melee": "attacking facing",
    "shoot": "shooting facing",
    "cast": "casting a spell facing",
    "ment": "casting a spell facing",
    "block": "blocking facing",
    "hit": "being hit facing",
    "die": "dying facing",
    "critdie": "dying facing",
}
_HELD_OUT = 0.08  # of the pairs of a creature and an action
_FPS = 12.0
_MODS = "usr/share/games/flare/mods"


@dataclass
class Animation:
    """One action of a frame table.

    Attributes:
        name: The action.
        frames: (frame, direction) -> (x, y, width, height, offset x, offset y) in the sheet.
    """

    name: str
    frames: dict[tuple[int, int], tuple[int, int, int, int, int, int]] = field(default_factory=dict)

    def length(self) -> int:
        """Frames a direction."""
        return 1 + max((frame for frame, _ in self.frames), default=-1)


def read_animations(text: str) -> tuple[str | None, list[Animation]]:
    """The sheet that a frame table names, and its actions.

    Raises:
        TokenloomError: If a line of a frame is not eight whole numbers.
    """
    image, found = None, []
    for line in text.splitlines():
        key, _, value = line.strip().partition("=")
        if line.startswith("["):
            found.append(Animation(line.strip("[] \r")))
        elif key == "image" and image is None:
            image = value.partition(",")[0].strip()
        elif key == "frame" and found:
            try:
                frame, direction, *box = (int(part) for part in value.split(",")[:8])
                x, y, width, height, across, down = box
            except ValueError as error:
                raise TokenloomError(
                    f"Expected eight whole numbers a frame, got {line.strip()!r}."
                ) from error
            found[-1].frames[frame, direction] = (x, y, width, height, across, down)
    return image, found


def build_flare(
    out: str | os.PathLike[str],
    *,
    size: int = 64,
    ground: str = "white",
    cache_dir: str | os.PathLike[str] | None = None,
    fetch: Fetch = fetch_package,
) -> BuildReport:
    """Downloads the package and writes a folder of clips with captions.

    Args:
        out: The folder to make; it must not exist or be empty.
        size: Side of the frames in pixels.
        ground: Colour behind the creatures.
        cache_dir: Where the package is kept for the next time; `None` keeps nothing.
        fetch: Replaces the client of the registry.

    Returns:
        A `BuildReport`; its pictures are clips, its styles the actions.

    Raises:
        TokenloomError: If an argument is wrong, `out` is not empty, or the download fails. `out` is then as it was before.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 16 <= size <= 256:
        raise TokenloomError(f"Expected a size of 16 to 256 pixels, got {size!r}.")
    started, captions = time.monotonic(), []
    with building(out) as work:
        cache = Path(cache_dir) if cache_dir is not None else work / "packages"
        cache.mkdir(parents=True, exist_ok=True)
        kept = sorted(cache.glob(f"{PACKAGE}_*.deb"))
        root = unpack_package(
            kept[-1] if kept else fetch("debian", PACKAGE, VERSION, cache), work / "unpacked"
        )
        rights = read_copyright((root / f"usr/share/doc/{PACKAGE}/copyright").read_text(encoding="utf-8"))
        permission = permission_of("mods/fantasycore/images/enemies/x.png", rights)
        if permission is None or permission.licence != LICENCE:
            raise TokenloomError(
                f"{PACKAGE} was expected under {LICENCE}, but says {permission}. Use version {VERSION}."
            )
        for table in sorted((root / _MODS).glob("*/animations/enemies/*.txt")):
            os.utime(work)
            captions += list(_clips(table, work / "set", size, ground))
        if not captions:
            raise TokenloomError(f"{PACKAGE} holds no frame tables of creatures; use version {VERSION}.")
        write_captions(work / "set", captions)
        (work / "set" / SOURCES_FILE).write_text(_sources(permission.holder), encoding="utf-8")
    return BuildReport.of(out, captions, started)


def _clips(table: Path, target: Path, size: int, ground: str) -> Iterator[Caption]:
    """Writes the clips of a frame table; gives their records."""
    image, animations = read_animations(table.read_text(encoding="utf-8"))
    mods = table.parents[3]
    sheet = next((path for path in sorted(mods.glob(f"*/{image}")) if path.is_file()), None)
    if sheet is None:
        return
    creature = re.sub(r"[_\d]+", " ", table.stem).strip()
    with Image.open(sheet) as opened:
        picture = opened.convert("RGBA")
    wanted = [item for item in animations if item.name in ACTIONS and item.length() > 1]
    scene = _scene(wanted)
    for animation in wanted:
        for direction, side in enumerate(DIRECTIONS):
            boxes = [animation.frames.get((frame, direction)) for frame in range(animation.length())]
            if any(box is None for box in boxes):
                continue
            file = f"{table.parents[2].name}/{table.stem}-{animation.name}-{direction}.webp"
            frames = [_draw(picture, box, scene, size, ground) for box in boxes if box is not None]
            save_clip(frames, target / file, _FPS)
            held = hash_fraction(f"{creature}/{animation.name}") < _HELD_OUT
            yield Caption(
                file=file,
                text=f"{with_article(creature)} {ACTIONS[animation.name]} {side}",
                label=creature,
                style=animation.name,
                group=side,
                licence=LICENCE,
                source=f"{PACKAGE}@{VERSION}",
                split=VAL if held else TRAIN,
            )


def _scene(animations: list[Animation]) -> tuple[float, float, int]:
    """Where the middle of a square that holds all frames lies from the point they stand on (right, down), and its side."""
    boxes = [box for item in animations for box in item.frames.values()]
    if not boxes:
        return 0.0, 0.0, 1
    left, top = min(-box[4] for box in boxes), min(-box[5] for box in boxes)
    right = max(box[2] - box[4] for box in boxes)
    bottom = max(box[3] - box[5] for box in boxes)
    return (left + right) / 2, (top + bottom) / 2, 2 + max(right - left, bottom - top)


def _draw(
    sheet: Image.Image,
    box: tuple[int, int, int, int, int, int],
    scene: tuple[float, float, int],
    size: int,
    ground: str,
) -> Image.Image:
    """A frame of a sheet; the point that it stands on is at the same place in all frames of a creature."""
    x, y, width, height, across, down = box
    right, below, side = scene
    canvas, layer = Image.new("RGBA", (side, side), ground), Image.new("RGBA", (side, side))
    place = (round(side / 2 - right) - across, round(side / 2 - below) - down)
    layer.paste(sheet.crop((x, y, x + width, y + height)), place)
    canvas.alpha_composite(layer)
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def _sources(holder: str) -> str:
    return (
        f"# Sources of these clips\n\nSprites of the game Flare (https://flarerpg.org/), {holder}, from the Debian package "
        f"{PACKAGE} {VERSION}.\n\nLicence: {LICENCE} (https://creativecommons.org/licenses/by-sa/3.0/). Whoever shares these "
        "clips, or work made of them, has to name the authors and to use the same licence.\n\nChanges: the frames of each action "
        "and direction were laid on one colour, resized and stored as animated WebP.\n"
    )
