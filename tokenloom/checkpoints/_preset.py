"""What is known of a published file: the record that both tables of presets are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]
UNSTATED = "none stated by the publisher: ask before you use or pass on these weights"
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_VAE = "vae_ch160v4096z32.pth"


@dataclass(frozen=True)
class Preset:
    """What is known of a published file.

    Attributes:
        family: Name that `from_official` takes.
        config: The official constructor's arguments.
        licence: Of the weights.
        sampling: Settings of the official sampler, in its own terms; `official_guidance` translates them.
        parameters: Number of parameters as published or computed from the official code ("310.3M"); "" if not known.
        pixel_range: Lowest and highest value of a pixel that a tokenizer takes.
        beside: Another official file that is needed with it.
        note: What else to know.
    """

    family: str
    config: Mapping[str, Any]
    licence: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    parameters: str = ""
    pixel_range: tuple[float, float] | None = None
    beside: str = ""
    note: str = ""
