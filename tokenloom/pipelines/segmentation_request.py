"""What is asked of a segmentation pipeline: pictures, and the phrases or boxes of each, checked before anything runs.

Knows pictures, phrases and boxes. Knows nothing of networks or codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from tokenloom import media
from tokenloom.errors import TokenloomError
from tokenloom.pipelines import inputs

Picture = Image.Image | str | Path
_PADDING = (128, 128, 128)


@dataclass(frozen=True)
class EncodedPicture:
    """A picture after the encoder, for further phrases.

    Attributes:
        features: (1, P, F).
        size: (H, W) of the picture.
    """

    features: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """What is asked about one picture.

    Attributes:
        image: The picture.
        phrases: The phrases; `None` where only boxes are given.
        boxes: Corners of a box a phrase, or `None`.
    """

    image: Picture | EncodedPicture
    phrases: list[str] | None
    boxes: list[list[float]] | None


def ask(image: Any, prompt: Any, boxes: Any) -> Asked:
    """Checks what is asked about one picture.

    Raises:
        TokenloomError: Neither phrases nor boxes are given, they are of another kind, or not as many.
    """
    given = None if boxes is None else _as_boxes(boxes).tolist()
    if prompt is None and given is None:
        raise TokenloomError("Expected a phrase (prompt) or boxes, got neither.")
    phrases = None if prompt is None else inputs.check_prompts(prompt)
    if given is not None and phrases is not None and len(given) != len(phrases):
        raise TokenloomError(f"Expected one box a phrase, got {len(given)} boxes and {len(phrases)} phrases.")
    return Asked(image, phrases, given)


def ask_each(images: Sequence[Any], prompt: Any, boxes: Any) -> list[Asked]:
    """Checks what is asked about each of several pictures: one phrase for all, or a list with what is asked of each.

    Raises:
        TokenloomError: For no pictures, lists of another length, or anything wrong about one of them, which is named.
    """
    if not images:
        raise TokenloomError("Expected at least one picture, got an empty list.")
    prompts = [prompt] * len(images) if prompt is None or isinstance(prompt, str) else prompt
    given = [None] * len(images) if boxes is None else boxes
    for name, values in (("phrases", prompts), ("boxes", given)):
        if not isinstance(values, (list, tuple)) or len(values) != len(images):
            count = f"{len(values)}" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
            raise TokenloomError(
                f"For {len(images)} pictures there must be a list with the {name} of each, got {count}."
            )
    asked = []
    for index, one in enumerate(zip(images, prompts, given, strict=True)):
        try:
            asked.append(ask(*one))
        except TokenloomError as error:
            raise TokenloomError(f"Picture {index}: {error}") from None
    if len({one.boxes is None for one in asked}) > 1:
        raise TokenloomError("Either all pictures come with boxes or none; make two calls.")
    return asked


def padded_square(image: Picture, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """An upright RGB picture padded to a square below and to the right, at a side in pixels; and the size (H, W) before.

    Raises:
        TokenloomError: If it cannot be read, or has no pixels.
    """
    picture = inputs.load_picture("image", image)
    if isinstance(image, Image.Image):
        picture = media.to_rgb(ImageOps.exif_transpose(picture))
    if min(picture.size) < 1:
        raise TokenloomError(f"The picture has no pixels: {picture.size[0]}x{picture.size[1]}. Give another.")
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), _PADDING)
    square.paste(picture, (0, 0))
    return square.resize((side, side), Image.Resampling.LANCZOS), (picture.height, picture.width)


def _as_boxes(boxes: Sequence[Sequence[float]] | Tensor) -> Tensor:
    try:
        values = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    except (TypeError, ValueError):
        values = torch.zeros(0)
    good = values.ndim == 2 and values.shape[0] > 0 and values.shape[1] == 4
    if not good or not bool((values[:, :2] < values[:, 2:]).all()):
        raise TokenloomError(
            f"Boxes must be numbers (n, 4): x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {boxes!r:.80}."
        )
    return values
