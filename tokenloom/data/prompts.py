"""Captions of drawings: "a flat picture of onion, flavoring".

Knows labels, tags and style words as plain strings. Knows nothing of the model or the words it can read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

MAX_TAGS = 2


def plain_caption(label: str, style: str | None = None) -> str:
    """Returns the caption without tags, always the same for the same label and style.

    Args:
        label: What the picture shows ("slightly frowning face").
        style: The style word ("flat"); None or "" leaves it out.

    Returns:
        "a flat picture of slightly frowning face"; the article fits the style word ("an outlined picture of
        ...").
    """
    words = f"{style} picture" if style else "picture"
    article = "an" if words[0].lower() in "aeiou" else "a"
    return f"{article} {words} of {label}"


def caption(
    label: str,
    tags: Sequence[str] = (),
    style: str | None = None,
    rng: random.Random | None = None,
    max_tags: int = MAX_TAGS,
) -> str:
    """Returns a caption with zero to `max_tags` tags drawn at random, for variety in training.

    Args:
        label: What the picture shows.
        tags: More words for it; tags equal to the label are never added.
        style: The style word, or None.
        rng: Source of randomness; None uses the `random` module. The same state gives the same caption.
        max_tags: The most tags to add; every number from 0 to the most possible is equally likely.

    Returns:
        "a flat picture of onion" or "a flat picture of onion, flavoring".
    """
    draw = random if rng is None else rng
    text = plain_caption(label, style)
    useful = [tag for tag in tags if tag != label]
    count = draw.randint(0, max(0, min(max_tags, len(useful))))
    return ", ".join([text, *draw.sample(useful, count)])
