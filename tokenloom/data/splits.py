"""Which captioned drawing is for training and which is held out, decided by hashes of names alone.

Knows concepts (emoji code points) and styles as strings. Knows nothing of pictures, files or captions, and
keeps no state: the same names give the same split on every machine and in every order, so a rebuilt data set
never leaks held-out pictures into training.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

TRAIN = "train"
VAL = "val"
VAL_STYLE = "val_style"
SPLITS = (TRAIN, VAL, VAL_STYLE)

HELD_OUT_SHARE = 0.05
MIN_SEEN_STYLES = 2


def concept_id(hexcode: str) -> str:
    """Brings a code point sequence to the one spelling used as a key everywhere.

    Args:
        hexcode: Hexadecimal code points joined by "-", in any case, with or without leading zeros and the
            variation selector FE0F ("0023-FE0F-20E3").

    Returns:
        Lower-case code points without leading zeros and without FE0F ("23-20e3").
    """
    points = (point.lstrip("0") for point in hexcode.lower().split("-"))
    return "-".join(point for point in points if point != "fe0f")


def hash_fraction(text: str) -> float:
    """Maps a text to a number in [0, 1) that looks random but never changes (first 8 bytes of its SHA-1)."""
    digest = hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / float(1 << 53)


def is_unseen_concept(concept: str) -> bool:
    """Tells whether every drawing of a concept is held out (about 5 % of concepts)."""
    return hash_fraction(concept) < HELD_OUT_SHARE


def is_unseen_pair(concept: str, style: str) -> bool:
    """Tells whether one (concept, style) pair is a candidate for holding out (about 5 % of pairs)."""
    return hash_fraction(f"{concept}/{style}") < HELD_OUT_SHARE


def assign_splits(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Assigns a split to every (concept, style) pair.

    "val" holds concepts no training picture shows. "val_style" holds single pairs whose concept is in
    training in at least two other styles, which makes it the fair test of whether a model combines a known
    thing with a known style. A pair that was drawn for "val_style" but whose concept is too rarely drawn
    stays in "train".

    Args:
        pairs: Every (concept, style) of the data set; the order does not matter.

    Returns:
        The split of each pair: "train", "val" or "val_style".
    """
    styles: dict[str, set[str]] = defaultdict(set)
    for concept, style in pairs:
        styles[concept].add(style)
    splits: dict[tuple[str, str], str] = {}
    for concept, drawn in styles.items():
        unseen = is_unseen_concept(concept)
        held = set() if unseen else {style for style in drawn if is_unseen_pair(concept, style)}
        if len(drawn) - len(held) < MIN_SEEN_STYLES:
            held = set()
        for style in drawn:
            splits[concept, style] = VAL if unseen else VAL_STYLE if style in held else TRAIN
    return splits
