"""The packages behind the emoji data set: which drawings, under which licence, and how they map to code
points.

Knows the published packages and their files. Knows nothing of rendering, folders on disk or splits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenloom.data.render import icon_names
from tokenloom.data.splits import concept_id
from tokenloom.errors import TokenloomError

ICON_FILES = ("icons.json", "chars.json", "info.json")


@dataclass(frozen=True, kw_only=True)
class StyleSource:
    """One set of drawings.

    Attributes:
        style: The style word used in captions and as the folder name.
        package: npm package of an Iconify icon set.
        version: Its exact version.
        chars_of: The package whose chars.json (code point -> icon name) fits this set's names; None where the
            names are the emoji's English names run together ("admissiontickets").
        share_alike: Whether the licence asks that adaptations carry the same licence.
    """

    style: str
    package: str
    version: str
    chars_of: str | None
    share_alike: bool = False


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What an emoji shows, in words.

    Attributes:
        label: Its English name.
        tags: Further words.
        group: A coarse subject ("animals & nature").
    """

    label: str
    tags: tuple[str, ...]
    group: str


_FLAT, _NOTO = "@iconify-json/fluent-emoji-flat", "@iconify-json/noto"
_TWEMOJI, _OPENMOJI = "@iconify-json/twemoji", "@iconify-json/openmoji"

STYLE_SOURCES: tuple[StyleSource, ...] = (
    StyleSource(style="flat", package=_FLAT, version="1.2.6", chars_of=_FLAT),
    StyleSource(style="3d", package="@iconify-json/fluent-emoji", version="1.2.7", chars_of=_FLAT),
    StyleSource(style="detailed", package=_NOTO, version="1.2.9", chars_of=_NOTO),
    StyleSource(style="blob", package="@iconify-json/noto-v1", version="1.2.5", chars_of=_NOTO),
    StyleSource(style="muted", package="@iconify-json/fxemoji", version="1.2.2", chars_of=None),
    StyleSource(style="simple", package=_TWEMOJI, version="1.2.5", chars_of=_TWEMOJI),
    StyleSource(style="glossy", package="@iconify-json/emojione", version="1.2.3", chars_of=_NOTO),
    StyleSource(style="outlined", package=_OPENMOJI, version="1.2.29", chars_of=_OPENMOJI, share_alike=True),
)
NAMES_PACKAGE, NAMES_VERSION = "emojibase-data", "17.0.0"
NAMES_FILES = ("en/data.json", "meta/groups.json", "package.json", "LICENSE")
_COMPONENT_GROUP = "component"  # skin tones and hair as such


def read_concepts(emoji: Sequence[Mapping[str, Any]], groups: Mapping[str, str]) -> dict[str, Concept]:
    """Reads what every emoji shows; skin tone variants and components are left out.

    Args:
        emoji: en/data.json of emojibase-data. Skin tone variants are nested inside their base there.
        groups: "groups" of its meta/groups.json: number -> "animals-nature".

    Returns:
        Code point key (see `concept_id`) -> `Concept`.

    Raises:
        TokenloomError: If the data holds no emoji.
    """
    concepts: dict[str, Concept] = {}
    for entry in emoji:
        group = groups.get(str(entry.get("group")))
        if group is None or group == _COMPONENT_GROUP:
            continue
        concept = Concept(
            label=entry["label"], tags=tuple(entry.get("tags") or ()), group=group.replace("-", " & ")
        )
        concepts.setdefault(concept_id(entry["hexcode"]), concept)
    if not concepts:
        raise TokenloomError(f"{NAMES_PACKAGE} holds no emoji in any group. Is it version {NAMES_VERSION}?")
    return concepts


def match_icons(
    source: StyleSource,
    icons: Mapping[str, Any],
    chars: Mapping[str, Mapping[str, str]],
    concepts: Mapping[str, Concept],
) -> dict[str, str]:
    """Finds which icon draws which emoji.

    Args:
        source: The set of drawings.
        icons: Its icons.json.
        chars: chars.json of every package that has one, by package name.
        concepts: What `read_concepts` returned.

    Returns:
        Code point key -> icon name, sorted by code point key.

    Raises:
        TokenloomError: If no icon matches, so that a changed package is not taken for an empty one.
    """
    names = icon_names(icons)
    if source.chars_of is None:
        matched = _match_by_name(names, concepts)
    else:
        matched = {}
        for hexcode, name in chars[source.chars_of].items():
            key = concept_id(hexcode)
            if key in concepts and name in names:
                matched.setdefault(key, name)
    if not matched:
        raise TokenloomError(
            f"No icon of {source.package}@{source.version} matches an emoji; expected hundreds."
        )
    return dict(sorted(matched.items()))


def _match_by_name(names: set[str], concepts: Mapping[str, Concept]) -> dict[str, str]:
    """Matches icons named like "admissiontickets" to labels; labels that run together alike match nothing."""
    keys: dict[str, list[str]] = {}
    for key, concept in concepts.items():
        keys.setdefault(re.sub(r"[^a-z0-9]", "", concept.label.lower()), []).append(key)
    return {found[0]: name for name, found in keys.items() if len(found) == 1 and name in names}


def licence_of(info: Mapping[str, Any], source: StyleSource) -> str:
    """Returns the SPDX name of a set's licence from its info.json, or raises if it states none."""
    licence = info.get("license")
    spdx = licence.get("spdx") if isinstance(licence, Mapping) else None
    if not isinstance(spdx, str) or not spdx:
        raise TokenloomError(
            f"info.json of {source.package}@{source.version} states no licence; its pictures are not used."
        )
    return spdx


def sources_text(
    credits: Sequence[tuple[StyleSource, Mapping[str, Any], int]],
    names_licence: str,
    size: int,
    encoding: str,
) -> str:
    """Writes SOURCES.md: who drew the pictures, under which licence, and what was changed.

    Args:
        credits: Each used set with its info.json and its number of pictures.
        names_licence: The LICENSE file of emojibase-data.
        size: Side of the pictures in pixels.
        encoding: How they are stored ("webp, quality 92").

    Returns:
        Markdown text.
    """
    rows = []
    for source, info, count in credits:
        author, licence = info.get("author", {}), info.get("license", {})
        rows.append(
            f"| {source.style} | {count:,} "
            f"| {info.get('name', source.package)} by {author.get('name', 'unknown')} "
            f"({author.get('url', '')}) | {licence.get('spdx')} ({licence.get('url', '')}) "
            f"| {source.package}@{source.version} |"
        )
    share_alike = [source.style for source, _, _ in credits if source.share_alike]
    note = (
        f"Share-alike styles ({', '.join(share_alike)}): adaptations must carry the same licence.\n\n"
        if share_alike
        else ""
    )
    return (
        "# Sources of these pictures\n\n"
        "| style | pictures | work | licence | package |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Changes: each drawing was rendered on white at {size} x {size} pixels and stored as {encoding}. "
        "Skin tone variants were left out. "
        "The licence of each picture stands in its line of captions.jsonl.\n\n"
        f"{note}"
        f"Labels, tags and groups: {NAMES_PACKAGE}@{NAMES_VERSION}, whose texts come from the Unicode CLDR. "
        "Its licence:\n\n"
        f"```\n{names_licence.strip()}\n```\n"
    )
