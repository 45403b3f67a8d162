"""The generators of codec frames that can be trained by name, and how one is built from the options of a config.

Knows layouts and sizes of codebooks. Knows nothing of sound or loops. A new generator joins by one line of
`FRAME_FAMILIES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.generators.base import Generator
from tokenloom.generators.two_level import TwoLevelGenerator
from tokenloom.layouts import Layout
from tokenloom.training.families import build_generator

_SHORT = {"transformer": "transformer_config", "encoder": "encoder_config", "decoder": "decoder_config"}


@dataclass(frozen=True)
class Frames:
    """What a generator models: `layout`, a `Layout.frames(T, K)`, and the codes of each codebook."""

    layout: Layout
    codebook_sizes: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """The largest codebook."""
        return max(self.codebook_sizes)


def _two_level(frames: Frames, options: Mapping[str, Any], condition: Mapping[str, Any]) -> TwoLevelGenerator:
    """Options are those of `TwoLevelGenerator`, with "transformer", "encoder" and "decoder" for its configs."""
    given = {_SHORT.get(key, key): value for key, value in options.items()}
    shape = {
        "frames": int(frames.layout.shape[0]),  # type: ignore[arg-type]
        "codebook_sizes": list(frames.codebook_sizes),
        "condition_config": dict(condition),
    }
    for key in shape:
        if key in given:
            raise TokenloomError(
                f"model.{key} follows from the codec, from `frames` and from `text`; take it away."
            )
    check_options(TwoLevelGenerator, shape | given, "model option")
    return TwoLevelGenerator(**shape, **given)


def _planned(
    name: str, frames: Frames, options: Mapping[str, Any], condition: Mapping[str, Any]
) -> Generator:
    if len(set(frames.codebook_sizes)) > 1:
        raise TokenloomError(
            f"{name} has one vocabulary, but the codebooks have {frames.codebook_sizes} codes; take two_level."
        )
    return build_generator(name, frames, dict(condition), options)  # type: ignore[arg-type]


Build = Callable[[Frames, Mapping[str, Any], Mapping[str, Any]], Generator | TwoLevelGenerator]

FRAME_FAMILIES: dict[str, Build] = {
    "two_level": _two_level,
    "next_block": functools.partial(_planned, "next_block"),
    "next_token": functools.partial(_planned, "next_token"),
}


def build_frames(
    name: str,
    frames: Frames,
    options: Mapping[str, Any],
    condition: Mapping[str, Any] | None = None,
) -> Generator | TwoLevelGenerator:
    """A generator of codec frames.

    Args:
        name: One of `FRAME_FAMILIES`.
        frames: Layout and codebooks.
        options: Options of the generator; of those with a plan as for `tokenloom.training.families.build_generator`.
        condition: As for `tokenloom.generators.conditions.make_condition`; `None` for none.

    Raises:
        TokenloomError: For an unknown name or option, or if the generator does not fit the frames.
    """
    if name not in FRAME_FAMILIES:
        raise unknown_name("generator of codec frames", name, FRAME_FAMILIES)
    return FRAME_FAMILIES[name](frames, options, condition or {"kind": "none"})
