"""The stamps of Tux Paint as cut-outs: photographs and drawings cut out by hand, each with a caption. They are under the GPL.

Knows the folders and captions of the Debian package tuxpaint-stamps-default; which of them name one thing, and in which
category. Knows nothing of pools, scenes or downloads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tokenloom.data.referring_names import OTHER
from tokenloom.errors import TokenloomError

PACKAGE, VERSION = "tuxpaint-stamps-default", "2022.06.04-1"
LICENCE = "GPL-2"
CREDIT = f"""
# Stamps

The pictures cut/stamp-*.webp: Tux Paint stamps, copyright 2002-2022 by Bill Kendrick and contributors, under the GNU General
Public License, version 2 ({PACKAGE}@{VERSION}). Changes: cropped, reduced and stored as webp. Whoever passes on this pool passes
it on under the same licence.
"""
"""What SOURCES.md of a pool says of them."""

_PLACE = "usr/share/tuxpaint/stamps"
_LEFT_OUT = ("symbols", "people", "military", "naturalforces", "town/roadsigns", "animals/birds/cartoon")
_CATEGORIES = {  # the longest beginning of a folder counts
    "animals": "animal",
    "animals/mammals/bears/cartoon": None,  # teddy bears
    "animals/mammals/bears/toys": None,
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "food/nuts": "food",
    "food/dessert": "food",
    "plants/trees": "plant",
    "plants/flowers": "plant",
    "plants/flowers/plastic": None,
    "hobbies/music": "instrument",
    "household/tools": "tool",
    "clothes": OTHER,
    "sports": OTHER,
    "town/flags": OTHER,
    "town/houses": "building",
    "vehicles": "vehicle",
}
_UNCATEGORISED = frozenset(
    "wheel tire sign mushroom pinecone pepper corn core cement mixer cave mine".split()
)
_CAPTION = re.compile(r"(?:an?|some) (.+)", re.IGNORECASE)
_COUNTED = re.compile(r"(?:very |pair of |bunch of |cluster of |head of |set of )+", re.IGNORECASE)
_NOT_A_NAME = frozenset(
    "and or with without for from in on at to is are the by that which your who eating playing couple flowers".split()
)
_LONGEST_NAME = 3  # words


@dataclass(frozen=True)
class Stamp:
    """A stamp that shows one thing.

    Attributes:
        key: Its place in the package, "animals/birds/crow".
        name: What it is called.
        category: Its category, or `None` where people would disagree.
        picture: RGBA, cropped to what is drawn.
    """

    key: str
    name: str
    category: str | None
    picture: Image.Image


def stamp_name(caption: str) -> str | None:
    """The name in a caption ("A pair of open scissors." names "open scissors"), or `None` if it says something else."""
    sentence = re.split(r"[.!?]", caption.strip())[0]
    found = _CAPTION.fullmatch(sentence)
    if found is None:
        return None
    text = _COUNTED.sub("", found.group(1).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower())
    words = re.sub(r"['\"\u201c\u201d](\w+(?: \w+)*)['\"\u201c\u201d]", r"\1", text).replace("-", " ").split()
    plain = all(re.fullmatch(r"[a-z]+(?:'s)?", word) for word in words)
    return " ".join(words) if plain and len(words) <= _LONGEST_NAME and not _NOT_A_NAME & set(words) else None


def stamp_category(folder: str, name: str) -> str | None:
    """The category of a thing in a folder of the package."""
    if _UNCATEGORISED & set(name.split()):
        return None
    parts = folder.split("/")
    for count in range(len(parts), 0, -1):
        key = "/".join(parts[:count])
        if key in _CATEGORIES:
            return _CATEGORIES[key]
    return None


def read_stamps(package: Path, size: int) -> Iterator[Stamp]:
    """The stamps that show one named thing.

    Args:
        package: The unpacked package.
        size: Longest side of a picture in pixels; smaller ones stay as they are.

    Raises:
        TokenloomError: If the package holds no stamps, or one cannot be read.
    """
    root = package / _PLACE
    if not root.is_dir():
        raise TokenloomError(f"The package {PACKAGE} holds no folder {_PLACE}; expected version {VERSION}.")
    for caption in sorted(root.rglob("*.txt")):
        folder = caption.parent.relative_to(root).as_posix()
        if any(folder == one or folder.startswith(f"{one}/") for one in _LEFT_OUT):
            continue
        name = stamp_name(caption.read_text(encoding="utf-8", errors="replace").partition("\n")[0])
        file = caption.with_suffix(".png")
        if name is None or not file.is_file():  # some are SVG drawings, which the emoji have enough of
            continue
        picture = _cut_out(file, size)
        if picture is not None:
            yield Stamp(f"{folder}/{caption.stem}", name, stamp_category(folder, name), picture)


def _cut_out(file: Path, size: int) -> Image.Image | None:
    """RGBA of a stamp file, cropped to its solid pixels; `None` if it has no transparency or nothing solid."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
    except OSError as error:
        raise TokenloomError(f"The stamp {file.name!r} of {PACKAGE} cannot be read ({error}).") from error
    alpha = picture.getchannel("A")
    box = alpha.point(lambda value: 255 * (value > 127)).getbbox()
    if box is None or alpha.getextrema()[0] > 127:  # one band: two numbers
        return None
    picture = picture.crop(box)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture
