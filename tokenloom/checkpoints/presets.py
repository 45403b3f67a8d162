"""Published checkpoint files: family, official constructor arguments, sampling settings, licence.

A preset is found by the official file name, or by the name of the repository or folder where files are called
`model.safetensors` or the like. Settings are those of the official scripts, in their own terms. Data only: knows no weights.
"""

from __future__ import annotations

from pathlib import Path

from tokenloom.checkpoints._preset import Preset as Preset
from tokenloom.checkpoints.presets_generators import GENERATORS
from tokenloom.checkpoints.presets_tokenizers import TOKENIZERS
from tokenloom.errors import unknown_name

NUCLEUS = {"mimo_audio_patch": "ascending", "mvar": "ascending", "var": "ascending"}
"""Where top-p cuts, as `Sampling.nucleus` calls it; families that are not here cut "descending"."""

PRESETS: dict[str, Preset] = {**GENERATORS, **TOKENIZERS}
"""Official file name, or name of the repository, folder or model where files have no telling names -> preset."""


def preset(name: str) -> Preset:
    """The preset of an official file name or model.

    Raises:
        TokenloomError: For an unknown name, with the closest matches.

    Example:
        >>> preset("var_d16.pth").config["depth"]
        16
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def find_preset(path: Path) -> str | None:
    """The name of the preset that a file is called after: by its name, its name without ending, or its folder's."""
    found = (name for name in (path.name, path.stem, path.absolute().parent.name) if name in PRESETS)
    return next(found, None)
