"""The pool of the referring set: cut-outs with names, and photographs to lay them on, in one folder.

    pool.json      {"cut_outs": [...], "backgrounds": [...]}, one record a picture
    cut/*.webp     RGBA, cropped to what is drawn
    bg/*.webp      RGB photographs
    SOURCES.md     credits and licences

Builds the folder from the packages of the emoji and photograph recipes (permissive licences alone), on demand also from stamps
under the GPL, and reads it. A folder made by other means reads as well. Knows nothing of scenes and phrases.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tokenloom.data import registry_packages
from tokenloom.data.building import building
from tokenloom.data.captions import read_captions
from tokenloom.data.emoji import SOURCES_FILE, BuildReport, Packages
from tokenloom.data.emoji_sources import (
    NAMES_PACKAGE,
    NAMES_VERSION,
    STYLE_SOURCES,
    StyleSource,
    licence_of,
    match_icons,
    sources_text,
)
from tokenloom.data.other_packages import Fetch, fetch_package, unpacked_package
from tokenloom.data.photos import build_photos
from tokenloom.data.referring_grounds import shown_by
from tokenloom.data.referring_names import STYLES, colour_of, nameable
from tokenloom.data.referring_stamps import CREDIT, LICENCE, PACKAGE, VERSION, read_stamps
from tokenloom.data.render import icon_svg, render_svg, require_renderer
from tokenloom.data.splits import TRAIN, VAL, VAL_STYLE, hash_fraction
from tokenloom.errors import TokenloomError, unknown_name

POOL_FILE = "pool.json"
SPLITS = (TRAIN, VAL_STYLE, VAL)
_UNSEEN_NAMES, _UNSEEN_PICTURES = 0.1, 0.15


@dataclass(frozen=True, kw_only=True)
class CutOut:
    """One cut-out of a pool.

    Attributes:
        file: Path of the RGBA picture inside the pool.
        name: What it is called.
        category: "animal", "vehicle", ..., or `None` where people would disagree.
        colour: A colour word, or `None` if it has no main colour.
        split: "train"; "val_style": a held-out picture of a name that training knows; "val": a held-out name.
        licence: SPDX name.
        source: "package@version".
    """

    file: str
    name: str
    category: str | None = None
    colour: str | None = None
    split: str = TRAIN
    licence: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Background:
    """One photograph of a pool.

    Attributes:
        file: Path of the picture inside the pool.
        quiet: Whether it is known what it shows, so that phrases of other categories are unambiguous.
        shows: Words for what it shows, categories and names: no phrase means any of it, present or absent.
        split: "train" or "val".
        licence: SPDX name.
        source: "package@version".
    """

    file: str
    quiet: bool = False
    shows: Sequence[str] = ()
    split: str = TRAIN
    licence: str = ""
    source: str = ""


@dataclass(frozen=True)
class Pool:
    """A pool on the disk.

    Attributes:
        folder: Where it lies.
        cut_outs: Its cut-outs.
        backgrounds: Its photographs.
    """

    folder: Path
    cut_outs: tuple[CutOut, ...]
    backgrounds: tuple[Background, ...]
    _pictures: dict[tuple[str, str], Image.Image] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Pool:
        """Reads pool.json and checks that every picture is there.

        Raises:
            TokenloomError: Names the record at fault.
        """
        root = Path(folder)
        try:
            content = json.loads((root / POOL_FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise TokenloomError(
                f"{str(root)!r} holds no {POOL_FILE} ({error.strerror}). Build a pool with: tokenloom data referring FOLDER."
            ) from None
        except ValueError as error:
            raise TokenloomError(
                f"{str(root / POOL_FILE)!r} is not JSON ({error}); build the pool again."
            ) from None
        if not isinstance(content, dict):
            raise TokenloomError(
                f"{str(root / POOL_FILE)!r} must hold an object with cut_outs and backgrounds."
            )
        cut_outs = _records(CutOut, content.get("cut_outs"), root, "cut_outs")
        backgrounds = _records(Background, content.get("backgrounds"), root, "backgrounds")
        return cls(root, tuple(cut_outs), tuple(backgrounds))

    def picture(self, file: str, mode: str) -> Image.Image:
        """A picture of the pool in a Pillow mode; it is read once.

        Raises:
            TokenloomError: If it cannot be read.
        """
        if (file, mode) not in self._pictures:
            try:
                with Image.open(self.folder / file) as picture:
                    self._pictures[file, mode] = picture.convert(mode)
            except OSError as error:
                raise TokenloomError(
                    f"The picture {file!r} of the pool {str(self.folder)!r} cannot be read ({error}); build the pool again."
                ) from error
        return self._pictures[file, mode]

    def licences(self) -> dict[str, int]:
        """How many cut-outs and photographs there are under each licence, the most frequent first."""
        licences = [item.licence for item in self.cut_outs] + [item.licence for item in self.backgrounds]
        return dict(Counter(licence or "unknown" for licence in licences).most_common())

    def of(self, categories: Sequence[str]) -> Pool:
        """The pool with the cut-outs of some categories alone; without categories the pool itself.

        Raises:
            TokenloomError: For an unknown category.
        """
        known = {item.category for item in self.cut_outs if item.category}
        for name in categories:
            if name not in known:
                raise unknown_name("category of cut-outs", name, sorted(known))
        if not categories:
            return self
        return replace(self, cut_outs=tuple(item for item in self.cut_outs if item.category in categories))

    def part(self, split: str, categories: Sequence[str] = ()) -> Pool:
        """The cut-outs of one split, all or those of some categories, on the backgrounds of "train" or of "val".

        Raises:
            TokenloomError: For an unknown split or category, or one without pictures.
        """
        if split not in SPLITS:
            raise unknown_name("split of the pool", split, SPLITS)
        ground = TRAIN if split == TRAIN else VAL
        cut_outs = tuple(item for item in self.of(categories).cut_outs if item.split == split)
        backgrounds = tuple(item for item in self.backgrounds if item.split == ground)
        if not cut_outs or not backgrounds:
            raise TokenloomError(
                f"The pool {str(self.folder)!r} has {len(cut_outs)} cut-outs of the split {split!r} and {len(backgrounds)} "
                f"backgrounds of {ground!r}; scenes need at least one of each. Build a larger pool."
            )
        return Pool(self.folder, cut_outs, backgrounds)


def _records(kind: type, values: Any, root: Path, key: str) -> list[Any]:
    if not isinstance(values, list):
        raise TokenloomError(f'{str(root / POOL_FILE)!r}: "{key}" must be a list of objects.')
    records = []
    for index, value in enumerate(values):
        try:
            record = kind(**value)
        except TypeError as error:
            raise TokenloomError(f"{str(root / POOL_FILE)!r}, {key}[{index}]: {error}.") from None
        if not (root / record.file).is_file():
            raise TokenloomError(f"{str(root / POOL_FILE)!r}, {key}[{index}]: there is no {record.file!r}.")
        records.append(record)
    return records


def split_of(name: str, style: str, drawn: Sequence[str]) -> str:
    """The split of a cut-out by its name and style, where the name is drawn in the styles `drawn`."""
    if hash_fraction(f"name/{name}") < _UNSEEN_NAMES:
        return VAL
    held = [one for one in sorted(drawn) if hash_fraction(f"cut/{name}/{one}") < _UNSEEN_PICTURES]
    return VAL_STYLE if style in held and len(held) < len(drawn) else TRAIN


def build_referring(
    out: str | os.PathLike[str],
    *,
    size: int = 128,
    longest: int = 512,
    gpl_stamps: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    download: registry_packages.Download | None = None,
    fetch: Fetch = fetch_package,
) -> BuildReport:
    """Downloads the packages and writes the pool.

    Args:
        out: The folder to make; it must not exist or be empty.
        size: Longest side that a drawing is rendered at, in pixels.
        longest: Longest side of a photograph in pixels.
        gpl_stamps: Whether to add the stamps of Tux Paint, most of them photographs cut out by hand. They are under the GPL, so
            that a pool with them is as well; the splits of the other pictures stay as they are without them.
        cache_dir: Where downloaded packages are kept for the next time; None keeps nothing.
        download: Replaces `npm pack`.
        fetch: Replaces the clients of the other registries.

    Returns:
        A `BuildReport`; its pictures are cut-outs and backgrounds, its groups the categories; it counts licences.

    Raises:
        TokenloomError: If an argument is wrong, `out` is not empty, a tool is missing or a download fails. `out` is then as
            it was before.
    """
    if not 16 <= size <= 512 or longest < size:
        raise TokenloomError(
            f"Expected a size of 16 to 512 pixels and longest of at least the size, got size={size}, longest={longest}."
        )
    started = time.monotonic()
    require_renderer()
    with building(out) as work:
        cache = Path(cache_dir) if cache_dir is not None else work / "packages"
        cache.mkdir(parents=True, exist_ok=True)
        target = work / "set"
        cut_outs, credits = _draw(target, work, Packages(cache, work / "unpacked", download), size)
        os.utime(work)
        if gpl_stamps:
            package = unpacked_package("debian", PACKAGE, VERSION, cache, work / "stamps", fetch)
            cut_outs += _stamps(target, package, size)
            credits += CREDIT
            os.utime(work)
        backgrounds, photo_credits = _photographs(target, work / "photos", cache, longest, fetch)
        content = {
            "cut_outs": [asdict(item) for item in cut_outs],
            "backgrounds": [asdict(item) for item in backgrounds],
        }
        (target / POOL_FILE).write_text(json.dumps(content, indent=0), encoding="utf-8")
        (target / SOURCES_FILE).write_text(f"{credits}\n{photo_credits}", encoding="utf-8")
    return BuildReport(
        folder=Path(out).resolve(),
        pictures=len(cut_outs) + len(backgrounds),
        groups=dict(Counter(item.category or "other" for item in cut_outs)),
        splits=dict(Counter(item.split for item in cut_outs)),
        licences=Pool(Path(out), tuple(cut_outs), tuple(backgrounds)).licences(),
        seconds=time.monotonic() - started,
    )


def _draw(target: Path, work: Path, loader: Packages, size: int) -> tuple[list[CutOut], str]:
    """Draws the cut-outs into `target`/cut; returns their records and the text of their sources."""
    concepts, names_licence = loader.names()
    emoji, groups = loader.words()
    names = nameable(emoji, groups.get("subgroups", {}))
    sources = [source for source in STYLE_SOURCES if source.style in STYLES]
    wanted = {source.chars_of for source in sources}
    charts = {one.package: loader.part(one, "chars.json") for one in STYLE_SOURCES if one.package in wanted}
    drawn: list[tuple[str, StyleSource, str, Any]] = []
    credits = []
    for source in sources:
        icons, info = loader.part(source, "icons.json"), loader.part(source, "info.json")
        matched = {
            key: icon for key, icon in match_icons(source, icons, charts, concepts).items() if key in names
        }
        drawn += [(key, source, icon, icons) for key, icon in matched.items()]
        credits.append((source, info, len(matched)))
    licences = {source.style: licence_of(info, source) for source, info, _ in credits}
    styles: dict[str, list[str]] = {}
    for key, source, _, _ in drawn:
        styles.setdefault(names[key][0], []).append(source.style)
    (target / "cut").mkdir()
    cut_outs = []
    for key, source, icon, icons in drawn:
        os.utime(work)
        picture = render_svg(icon_svg(icons, icon), size, transparent=True)
        box = picture.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox()
        if box is None:
            continue
        picture = picture.crop(box)
        name, category = names[key]
        file = f"cut/{source.style}-{key}.webp"
        picture.save(target / file, quality=90, method=4)
        cut_outs.append(
            CutOut(
                file=file,
                name=name,
                category=category,
                colour=colour_of(picture),
                split=split_of(name, source.style, styles[name]),
                licence=licences[source.style],
                source=f"{source.package}@{source.version}",
            )
        )
    if not cut_outs:
        raise TokenloomError(
            f"{NAMES_PACKAGE}@{NAMES_VERSION} names no drawing that can be cut out; expected about a thousand."
        )
    return cut_outs, sources_text(credits, names_licence, size, "webp with alpha, quality 90")


def _stamps(target: Path, package: Path, size: int) -> list[CutOut]:
    """Writes the stamps of an unpacked package into `target`/cut; returns their records."""
    stamps = list(read_stamps(package, size))
    of_name: dict[str, list[str]] = {}
    for stamp in stamps:
        of_name.setdefault(stamp.name, []).append(stamp.key)
    cut_outs = []
    for stamp in stamps:
        file = f"cut/stamp-{stamp.key.replace('/', '-')}.webp"
        stamp.picture.save(target / file, quality=90, method=4)
        cut_outs.append(
            CutOut(
                file=file,
                name=stamp.name,
                category=stamp.category,
                colour=colour_of(stamp.picture),
                split=split_of(stamp.name, stamp.key, of_name[stamp.name]),
                licence=LICENCE,
                source=f"{PACKAGE}@{VERSION}",
            )
        )
    return cut_outs


def _photographs(
    target: Path, scratch: Path, cache: Path, longest: int, fetch: Fetch
) -> tuple[list[Background], str]:
    """Moves the photographs into `target`/bg; returns their records and the text of their sources."""
    build_photos(scratch, longest=longest, size=1, cache_dir=cache, fetch=fetch)
    backgrounds = []
    (target / "bg").mkdir()
    for caption in read_captions(scratch):
        file, shown = f"bg/{caption.file}", shown_by(str(caption.concept))
        with Image.open(scratch / caption.file) as picture:
            picture.convert("RGB").save(target / file, quality=92, method=4)
        backgrounds.append(
            Background(
                file=file,
                quiet=shown is not None,
                shows=tuple(shown or ()),
                split=str(caption.split),
                licence=str(caption.licence),
                source=str(caption.source),
            )
        )
    return backgrounds, (scratch / SOURCES_FILE).read_text(encoding="utf-8")
