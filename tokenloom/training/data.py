"""Training pictures in memory: one uint8 tensor, floats and changes made a batch at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenloom import tokenizers
from tokenloom.data.dataset import ImageCaptionFolder
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.base import Tokenizer
from tokenloom.tokenizers.image_vq import ImageVQTokenizer
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


def open_tokenizer(folder: str) -> Any:
    """The image tokenizer of a folder, of whichever class its configuration names, with float32 weights."""
    path = Path(folder) / ImageVQTokenizer.config_name
    if not path.is_file():
        raise TokenloomError(
            f"There is no image tokenizer in {folder!r}: it has no {path.name}. Give the folder "
            '"model" that `tokenloom train-tokenizer` writes, or "tokenizer" of a saved pipeline.'
        )
    name = json.loads(path.read_text(encoding="utf-8")).get("_class_name", "ImageVQTokenizer")
    kind = getattr(tokenizers, name, None) if name in tokenizers.__all__ else None
    if not isinstance(kind, type) or not issubclass(kind, Tokenizer) or kind.modality != "image":
        raise TokenloomError(f"{folder!r} holds {name!r}, which is no image tokenizer of this version.")
    return kind.from_pretrained(folder).float()
