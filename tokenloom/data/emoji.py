"""The recipe of the emoji text-to-image set: about 9,500 captioned drawings of 1,914 things in seven styles.

Knows the order of the work: download, match, draw, split, write. Leaves each step to its own module. Nothing
but the packages named in `emoji_sources` is needed, and no picture is ever half-written: the set is built
beside its final place and renamed when it is whole.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, features
from tqdm.auto import tqdm

from tokenloom.data import registry_packages as packages
from tokenloom.data.building import building
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.emoji_sources import (
    ICON_FILES,
    NAMES_FILES,
    NAMES_PACKAGE,
    NAMES_VERSION,
    STYLE_SOURCES,
    Concept,
    StyleSource,
    licence_of,
    match_icons,
    read_concepts,
    sources_text,
)
from tokenloom.data.prompts import plain_caption
from tokenloom.data.render import icon_svg, render_svg, require_renderer
from tokenloom.data.splits import assign_splits as assign_splits
from tokenloom.errors import TokenloomError, unknown_name

FORMATS = ("webp", "png")
SOURCES_FILE = "SOURCES.md"
MAX_SIZE = 1024


@dataclass(frozen=True)
class BuildReport:
    """What a recipe has built.

    Attributes:
        folder: Where it stands.
        pictures: How many pictures.
        styles: Pictures of each style.
        groups: Pictures of each group.
        splits: Pictures of each split.
        licences: Pictures under each licence, where a recipe counts them.
        seconds: How long it took, downloads included.
    """

    folder: Path
    pictures: int
    styles: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    licences: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, out: str | os.PathLike[str], captions: Sequence[Caption], started: float) -> BuildReport:
        """Counts what was written into a folder since `started` (of `time.monotonic`)."""

        def count(key: str) -> dict[str, int]:
            return dict(Counter(value for item in captions if (value := getattr(item, key)) is not None))

        counts = {
            key: count(name) for key, name in (("styles", "style"), ("groups", "group"), ("splits", "split"))
        }
        return cls(Path(out).resolve(), len(captions), **counts, seconds=time.monotonic() - started)


def build_emoji(
    out: str | os.PathLike[str],
    *,
    size: int = 64,
    format: str = "webp",
    quality: int = 92,
    include_share_alike: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    download: packages.Download | None = None,
) -> BuildReport:
    """Downloads the packages, draws every emoji in every style and writes a captioned folder.

    Args:
        out: The folder to make; it must not exist or be empty. It gets STYLE/CODEPOINT.webp, captions.jsonl
            and SOURCES.md (credits and licences).
        size: Side of the pictures in pixels.
        format: "webp" or "png" (lossless, three times as large).
        quality: Of WebP, from 1 to 100.
        include_share_alike: Add the style "outlined" (OpenMoji, CC-BY-SA-4.0, 1,914 pictures). Off by default
            because what is made from those pictures must carry the same licence.
        cache_dir: Where downloaded packages are kept for the next time; None keeps nothing.
        progress: Show a progress bar on stderr.
        download: Replaces `npm pack`; see `tokenloom.data.registry_packages.Download`.

    Returns:
        A `BuildReport` with the counts.

    Raises:
        TokenloomError: If an argument is wrong, `out` is not empty, npm or resvg-py is missing, a download
            fails, or the disk is full. `out` is then as it was before.
    """
    started = time.monotonic()
    _check_arguments(size, format, quality)
    require_renderer()
    sources = [source for source in STYLE_SOURCES if include_share_alike or not source.share_alike]
    with building(out) as work:
        kept = Path(cache_dir) if cache_dir is not None else work / "packages"
        loader = Packages(kept, work / "unpacked", download)
        captions = _build(work, sources, loader, size=size, format=format, quality=quality, progress=progress)
    return BuildReport.of(out, captions, started)


class Packages:
    """Fetches, unpacks and parses packages on demand, each once."""

    def __init__(self, cache: Path, work: Path, download: packages.Download | None) -> None:
        self.cache = cache
        self.work = work
        self.download = download

    def names(self) -> tuple[dict[str, Concept], str]:
        """Returns what every emoji shows, and the licence text of those words."""
        emoji, groups = self.words()
        folder = self._folder(NAMES_PACKAGE, NAMES_VERSION, NAMES_FILES)
        licence = (folder / "LICENSE").read_text(encoding="utf-8", errors="replace")
        return read_concepts(emoji, groups.get("groups", {})), licence

    def words(self) -> tuple[Any, Any]:
        """Returns the list of all emoji and the names of their groups, as the package writes them."""
        folder = self._folder(NAMES_PACKAGE, NAMES_VERSION, NAMES_FILES)
        return packages.read_json(folder / "en/data.json"), packages.read_json(folder / "meta/groups.json")

    def part(self, source: StyleSource, file: str) -> Any:
        """Returns one parsed file of a set's package."""
        return packages.read_json(self._folder(source.package, source.version, ICON_FILES) / file)

    def _folder(self, package: str, version: str, wanted: tuple[str, ...]) -> Path:
        folder = self.work / package.replace("/", "-")
        if not folder.exists():
            tarball = packages.fetch(package, version, self.cache, self.download)
            packages.unpack(tarball, folder, wanted)
        return folder


def _build(
    work: Path,
    sources: list[StyleSource],
    loader: Packages,
    *,
    size: int,
    format: str,
    quality: int,
    progress: bool,
) -> list[Caption]:
    """Builds the whole set in `work`/set and returns its captions."""
    concepts, names_licence = loader.names()
    chars = {source.package: loader.part(source, "chars.json") for source in sources}
    captions: list[Caption] = []
    credits: list[tuple[StyleSource, Mapping[str, Any], int]] = []
    for source in sources:
        os.utime(work)  # shows other runs that this one is alive
        icons, info = loader.part(source, "icons.json"), loader.part(source, "info.json")
        matched = match_icons(source, icons, chars, concepts)
        folder = work / "set" / source.style
        folder.mkdir(parents=True)
        for key, name in tqdm(matched.items(), desc=source.style, unit="picture", disable=not progress):
            picture = render_svg(icon_svg(icons, name), size)
            _save(picture, folder / f"{key}.{format}", quality)
            captions.append(_caption(source, key, concepts[key], licence_of(info, source), format))
        credits.append((source, info, len(matched)))
    captions = _with_splits(captions)
    write_captions(work / "set", captions)
    encoding = f"{format}, quality {quality}" if format == "webp" else format
    (work / "set" / SOURCES_FILE).write_text(
        sources_text(credits, names_licence, size, encoding), encoding="utf-8"
    )
    return captions


def _save(picture: Image.Image, path: Path, quality: int) -> None:
    if path.suffix == ".webp":
        picture.save(path, quality=quality, method=4)
    else:
        picture.save(path)


def _caption(source: StyleSource, key: str, concept: Concept, licence: str, format: str) -> Caption:
    return Caption(
        file=f"{source.style}/{key}.{format}",
        text=plain_caption(concept.label, source.style),
        label=concept.label,
        tags=concept.tags,
        style=source.style,
        group=concept.group,
        concept=key,
        licence=licence,
        source=f"{source.package}@{source.version}",
    )


def _with_splits(captions: list[Caption]) -> list[Caption]:
    pairs = [(str(caption.concept), str(caption.style)) for caption in captions]
    splits = assign_splits(pairs)
    return [
        Caption(**{**vars(caption), "split": splits[pair]})
        for caption, pair in zip(captions, pairs, strict=True)
    ]


def _check_arguments(size: int, format: str, quality: int) -> None:
    if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
        raise TokenloomError(
            f"Expected size to be a whole number of pixels from 1 to {MAX_SIZE}, got {size!r}."
        )
    if format not in FORMATS:
        raise unknown_name("picture format", format, FORMATS)
    if format == "webp" and not features.check("webp"):
        raise TokenloomError(
            'This Pillow was built without WebP. Use format="png", or install the ordinary Pillow wheel.'
        )
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise TokenloomError(f"Expected quality to be a whole number from 1 to 100, got {quality!r}.")
