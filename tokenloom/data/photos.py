"""The recipe of the photographs: 68 pictures of permissive licences out of Debian packages and Python wheels.

Few, but real: enough for a tokenizer that learns from crops, and for backgrounds. Knows where each photograph lies and
under which licence; whole photographs are held out as split "val". Needs the extra [data].
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from tokenloom.data.building import building
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.emoji import SOURCES_FILE, BuildReport
from tokenloom.data.other_packages import (
    Fetch,
    fetch_package,
    permission_of,
    read_copyright,
    read_rcc,
    unpacked_package,
)
from tokenloom.errors import TokenloomError
from tokenloom.media import to_rgb

PERMISSIVE = ("CC0-1.0", "public-domain", "CC-BY-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0")
HELD_OUT = 0.15  # of the photographs, chosen by a hash of their names
_WALLPAPERS = ("lomiri-wallpapers-16.04", "20.04.0-2")
_GAME = ("gcompris-qt-data", "3.1-2")
_RESOURCES = ("categorization", "erase", "explore_world_animals")
_WHEELS = {
    ("scikit-learn", "1.7.2"): (
        "sklearn/datasets/images",
        {"china.jpg": "CC-BY-2.0", "flower.jpg": "CC-BY-2.0"},
    ),
    ("scikit-image", "0.25.2"): (
        "skimage/data",
        {"coffee.png": "CC0-1.0", "rocket.jpg": "CC0-1.0", "chelsea.png": "CC0-1.0"},
    ),
}
_SCALES = (1.0, 0.75, 0.5, 0.35, 0.25)  # of a photograph's shorter side, for the crops


@dataclass(frozen=True)
class Photo:
    """A photograph in memory.

    Attributes:
        name: Its file name without ending.
        picture: RGB.
        licence: Name of the licence.
        holder: Whom to credit.
        source: "package@version".
    """

    name: str
    picture: Image.Image
    licence: str
    holder: str
    source: str

    @property
    def split(self) -> str:
        """ "val" for about one photograph in seven, by its name alone."""
        share = int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) / 2**32
        return "val" if share < HELD_OUT else "train"


def build_photos(
    out: str | os.PathLike[str],
    *,
    crops: int = 0,
    size: int = 64,
    longest: int = 1024,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    fetch: Fetch = fetch_package,
) -> BuildReport:
    """Downloads the packages and writes the photographs, or crops of them, into a captioned folder.

    Args:
        out: The folder to make; it must not exist or be empty. It gets NAME.webp, captions.jsonl and SOURCES.md.
        crops: Square crops a photograph, of several scales and places; 0 writes the whole photographs.
        size: Side of the crops in pixels.
        longest: Longest side of a photograph in pixels; larger ones are shrunk, also before crops are taken.
        cache_dir: Where downloaded packages are kept for the next time; None keeps nothing.
        seed: Decides the crops.
        fetch: Replaces the registries' clients.

    Returns:
        A `BuildReport` with the counts.

    Raises:
        TokenloomError: If an argument is wrong, `out` is not empty, or a download fails. `out` is then as it was before.
    """
    started = time.monotonic()
    if crops < 0 or not 1 <= size <= longest:
        raise TokenloomError(
            f"Expected crops of at least 0 and a size of 1 to {longest} pixels, got crops={crops} and size={size}."
        )
    captions: list[Caption] = []
    with building(out) as work:
        cache = Path(cache_dir) if cache_dir is not None else work / "packages"
        cache.mkdir(parents=True, exist_ok=True)
        photos = sorted(_photos(cache, work, fetch, longest), key=lambda photo: photo.name)
        for photo in photos:
            os.utime(work)  # shows other runs that this one is alive
            for index, picture in enumerate(_pictures(photo, crops, size, seed)):
                file = f"{photo.name}-{index}.webp" if crops else f"{photo.name}.webp"
                picture.save(work / "set" / file, quality=95, method=4)
                captions.append(_caption(photo, file))
        write_captions(work / "set", captions)
        (work / "set" / SOURCES_FILE).write_text(_sources(photos), encoding="utf-8")
    return BuildReport.of(out, captions, started)


def _photos(cache: Path, work: Path, fetch: Fetch, longest: int) -> Iterator[Photo]:
    for package, version in (_WALLPAPERS, _GAME):
        folder = unpacked_package("debian", package, version, cache, work / "unpacked", fetch)
        permissions = read_copyright(
            (folder / f"usr/share/doc/{package}/copyright").read_text(encoding="utf-8")
        )
        for path, name, content in _pictures_of(folder):
            permission = permission_of(path, permissions)
            if permission is not None and permission.licence in PERMISSIVE:
                yield Photo(
                    name,
                    _open(content, longest),
                    permission.licence,
                    permission.holder,
                    f"{package}@{version}",
                )
    for (package, version), (place, files) in _WHEELS.items():
        folder = unpacked_package("pypi", package, version, cache, work / "unpacked", fetch)
        for name, licence in files.items():
            content = (folder / place / name).read_bytes()
            yield Photo(Path(name).stem, _open(content, longest), licence, package, f"{package}@{version}")


def _pictures_of(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(path as the copyright file writes it, name, content) of the photographs of an unpacked Debian package."""
    for file in sorted(folder.glob("usr/share/backgrounds/*.jpg")):
        yield f"16.04/{file.name}", file.stem, file.read_bytes()
    for resource in _RESOURCES:
        for file in folder.glob(f"usr/share/*/rcc/{resource}.rcc"):
            for name, content in read_rcc(file.read_bytes()):
                path = PurePosixPath(name)
                if path.suffix == ".webp":  # the sources are listed with the endings they had before
                    for ending in (".jpg", ".png"):
                        yield str(path.with_suffix(ending)).partition("/")[2], path.stem, content


def _open(content: bytes, longest: int) -> Image.Image:
    with Image.open(io.BytesIO(content)) as opened:
        picture = to_rgb(opened)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return picture


def _pictures(photo: Photo, crops: int, size: int, seed: int) -> Iterator[Image.Image]:
    if not crops:
        yield photo.picture
        return
    rng = random.Random(f"{seed} {photo.name}")
    width, height = photo.picture.size
    for index in range(crops):
        side = max(min(size, width, height), round(min(width, height) * _SCALES[index % len(_SCALES)]))
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        box = (left, top, left + side, top + side)
        yield photo.picture.resize((size, size), Image.Resampling.LANCZOS, box=box)


def _caption(photo: Photo, file: str) -> Caption:
    text = photo.name.replace("_", " ")
    return Caption(
        file=file,
        text=text,
        group="photographs",
        concept=photo.name,
        licence=photo.licence,
        source=photo.source,
        split=photo.split,
    )


def _sources(photos: list[Photo]) -> str:
    rows = [f"| {photo.name} | {photo.holder} | {photo.licence} | {photo.source} |" for photo in photos]
    head = "# Photographs\n\n| photograph | credit | licence | package |\n| :-- | :-- | :-- | :-- |\n"
    return head + "\n".join(rows) + "\n"
