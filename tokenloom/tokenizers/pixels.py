"""What image tokenizers take: float pixels, bytes, or PIL pictures, checked and brought to one form.

Knows pictures and ranges of pixels. Knows nothing of tokenizers or codes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.media import to_pixels

Size = tuple[int, int]
Range = tuple[float, float]

_SLACK = 0.05  # of the range: how far resampling may overshoot before a warning


def as_size(size: int | Sequence[int]) -> Size:
    """(height, width) of one number or two.

    Raises:
        TokenloomError: For anything but one or two whole numbers of at least 1.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise TokenloomError(
            f"A picture's size is one number or (height, width), each at least 1; got {size!r}."
        )
    return int(sides[0]), int(sides[1])


def as_pixels(media: Any, bounds: Range, who: str, device: torch.device | None = None) -> Tensor:
    """Float pixels (B, 3, H, W) of whatever an image tokenizer may be given.

    Args:
        media: Float pixels (B, 3, H, W) in `bounds`; uint8 pixels (B, 3, H, W); a PIL picture of any mode, or a list
            of them of one size (transparent parts are put on white, 16 bits and grey become RGB).
        bounds: Lowest and highest value of a pixel.
        who: Name of the tokenizer, for messages.
        device: Where pixels of PIL pictures are put; tensors stay where they are.

    Raises:
        TokenloomError: For another kind of object, another shape, no pixels, or pictures of several sizes.
    """
    if isinstance(media, Image.Image):
        media = [media]
    if isinstance(media, (list, tuple)) and media and all(isinstance(item, Image.Image) for item in media):
        return rescale(_from_pictures(media, who).to(device), (-1.0, 1.0), bounds)
    if not isinstance(media, Tensor):
        raise _unexpected(media, bounds, who, "open a file with tokenloom.media.open_image(path)")
    if media.ndim != 4 or media.shape[1] != 3:
        raise _unexpected(media, bounds, who, _advice(media))
    if 0 in media.shape[2:]:
        raise _unexpected(media, bounds, who, "a picture needs at least one pixel")
    if media.dtype == torch.uint8:
        return rescale(media.float(), (0.0, 255.0), bounds)
    if not media.is_floating_point():
        raise _unexpected(media, bounds, who, "convert values of 0 to 255 with .to(torch.uint8)")
    return media


def check_values(pixels: Tensor, bounds: Range) -> None:
    """Raises for NaN and infinity, and warns of values outside the range.

    Args:
        pixels: Float pixels (B, 3, H, W).
        bounds: Lowest and highest value of a pixel.
    """
    if not pixels.numel():
        return
    low, high = bounds
    least, most = (float(value) for value in pixels.detach().aminmax())
    if not math.isfinite(least) or not math.isfinite(most):
        raise TokenloomError(
            "The pixels contain NaN or infinity; look for a division by zero before the tokenizer."
        )
    slack = _SLACK * (high - low)
    if least < low - slack or most > high + slack:
        warnings.warn(
            f"Pixels lie in [{least:.3g}, {most:.3g}], but this tokenizer expects [{low:g}, {high:g}].",
            stacklevel=4,
        )


def rescale(pixels: Tensor, source: Range, target: Range) -> Tensor:
    """Pixels in the range `source` brought to the range `target`; the same tensor where they are equal."""
    if source == target:
        return pixels
    return target[0] + (target[1] - target[0]) * (pixels - source[0]) / (source[1] - source[0])


def pad_to(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels (B, 3, H, W) with the lower and right edge repeated up to a size of at least theirs."""
    below, right = height - pixels.shape[2], width - pixels.shape[3]
    return F.pad(pixels, (0, right, 0, below), mode="replicate") if below or right else pixels


def _from_pictures(pictures: Sequence[Image.Image], who: str) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1]."""
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes[:4])
        raise TokenloomError(
            f"{who} takes pictures of one size a batch, got {shown}; encode them one by one or resize them."
        )
    if 0 in sizes[0]:
        raise TokenloomError(
            f"{who} needs pictures with at least one pixel, got {sizes[0][0]}x{sizes[0][1]}."
        )
    return torch.cat([to_pixels(picture) for picture in pictures])


def _advice(media: Tensor) -> str:
    if media.ndim == 4 and media.shape[1] == 4:
        return "drop an alpha channel with pixels[:, :3]"
    if media.ndim == 4 and media.shape[1] == 1:
        return "repeat a grey channel with pixels.expand(-1, 3, -1, -1)"
    if media.ndim == 4 and media.shape[3] == 3:
        return "move the channels forward with pixels.permute(0, 3, 1, 2)"
    if media.ndim == 3 and media.shape[0] == 3:
        return "add the batch axis with pixels[None]"
    return "stack pictures to a batch of three channels"


def _unexpected(media: Any, bounds: Range, who: str, advice: str) -> TokenloomError:
    given = f"{media.dtype} {tuple(media.shape)}" if isinstance(media, Tensor) else repr(type(media))
    return TokenloomError(
        f"{who} expects float pixels of shape (B, 3, H, W) in [{bounds[0]:g}, {bounds[1]:g}], uint8 pixels of that shape, or "
        f"PIL pictures; got {given}; {advice}."
    )
