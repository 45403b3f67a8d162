"""Checks of pictures given to tokenizers: kind, shape, range.

Knows tensors of pixels; knows nothing of networks or codes.
"""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from tokenloom.errors import TokenloomError

_SLACK = 0.05  # of the range: resampled pictures overshoot a little


def check_pixels(
    owner: str, pixels: Tensor, pixel_range: tuple[float, float], size: tuple[int, int] | None = None
) -> None:
    """Raises a clear error unless `pixels` is a float tensor (B, 3, H, W) that is not empty.

    Args:
        owner: Name of the tokenizer, for the message.
        pixels: What shall be encoded.
        pixel_range: Lowest and highest value, for the message.
        size: The one height and width that works; `None` = any.
    """
    low, high = pixel_range
    given = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else repr(type(pixels))
    if (
        not isinstance(pixels, Tensor)
        or not pixels.is_floating_point()
        or pixels.ndim != 4
        or pixels.shape[1] != 3
        or 0 in pixels.shape[2:]
        or (size is not None and tuple(pixels.shape[2:]) != size)
    ):
        sides, advice = ("H, W", "") if size is None else (f"{size[0]}, {size[1]}", "resize the picture, ")
        raise TokenloomError(
            f"{owner} expects float pixels of shape (B, 3, {sides}) in [{low:g}, {high:g}], got {given}; {advice}"
            "drop an alpha channel with pixels[:, :3] and scale bytes to the range."
        )


def check_values(pixels: Tensor, pixel_range: tuple[float, float]) -> None:
    """Raises for NaN and infinity, and warns of pixels outside the range."""
    if not pixels.numel():
        return
    low, high = pixel_range
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
