"""Training pictures in memory: one uint8 tensor, floats and changes made a batch at a time."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from tokenloom.data.dataset import ImageCaptionFolder
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.registry import load_tokenizer
from tokenloom.tokenizers.video import VideoTokenizer
from tokenloom.training.config import DataConfig

K = TypeVar("K")


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


def open_model(folder: str, kind: type[K]) -> K:
    """The tokenizer of a kind that a training or `save_pretrained` wrote, with float32 weights.

    Raises:
        TokenloomError: If the folder holds another one.
    """
    found = load_tokenizer(folder)
    if not isinstance(found, kind):
        raise TokenloomError(
            f"{folder!r} holds a {type(found).__name__}; expected an {kind.__name__}. Name the folder of one, as its training wrote it."
        )
    return found


def open_tokenizer(folder: str) -> ImageTokenizer:
    """The image tokenizer of whichever class in a folder."""
    return open_model(folder, ImageTokenizer)


def square_side(tokenizer: ImageTokenizer | VideoTokenizer) -> int:
    """Side of the square pictures that a tokenizer trains on.

    Raises:
        TokenloomError: If its pictures are not square.
    """
    if not isinstance(tokenizer.image_size, int):
        raise TokenloomError(
            f"Training pictures are square, but this tokenizer has image_size {tokenizer.image_size}; make its two sides equal."
        )
    return tokenizer.image_size
