"""Training pictures in memory: one uint8 tensor, floats and changes made a batch at a time."""

from __future__ import annotations

from torch import Tensor

from tokenloom.data.dataset import ImageCaptionFolder
from tokenloom.errors import TokenloomError
from tokenloom.training.config import DataConfig


def open_folder(config: DataConfig, size: int) -> ImageCaptionFolder:
    """The configured part of a picture folder at `size` pixels; never empty."""
    folder = ImageCaptionFolder(
        config.root,
        split=config.split,
        size=size,
        styles=config.styles,
        groups=config.groups,
        licences=config.licences,
    )
    if not len(folder):
        raise TokenloomError(
            f"No picture of {config.root} matches split={config.split!r}, groups={config.groups}, "
            f"styles={config.styles}, licences={config.licences}; loosen data.* in the config."
        )
    return folder


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return pixels.float() / 127.5 - 1
