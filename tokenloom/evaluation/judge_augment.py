"""Random changes to the judge's training pictures: moderate ones that keep what is shown, slight ones that
keep the style.

Knows pixels and a source of randomness. Knows nothing of networks, names or data folders.

Shapes: B pictures, H rows, W columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def concept_view(pixels: Tensor, flippable: Tensor, random: torch.Generator, scale: float = 1.0) -> Tensor:
    """Changes size, place, angle, mirror, colours and sharpness, and covers a small part; what is shown
    stays.

    Args:
        pixels: uint8 (B, 3, H, W).
        flippable: bool (B,); pictures that may be mirrored (with a chance of one half).
        random: The source of all draws.
        scale: Size of the result, relative to the pictures.

    Returns:
        float32 (B, 3, scale H, scale W), about [-1, 1].
    """
    images = _move(pixels.float().div_(127.5).sub_(1), flippable, random, scale)
    images = _recolour(_soften(images, -0.4, 1.0, random), random)
    return _cover(images, random)


def style_view(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Cuts a random part of five eighths of the side and softens it slightly; how it is drawn stays visible.

    All pictures of the batch are cut at one place. A part shows less of what is drawn, which a style must not
    be guessed from.

    Args:
        pixels: uint8 (B, 3, H, W).
        random: The source of all draws.

    Returns:
        float32 (B, 3, 5 H / 8, 5 W / 8), about [-1, 1].
    """
    height, width = pixels.shape[-2] * 5 // 8, pixels.shape[-1] * 5 // 8
    top = int(torch.randint(pixels.shape[-2] - height + 1, (), generator=random))
    left = int(torch.randint(pixels.shape[-1] - width + 1, (), generator=random))
    images = pixels[..., top : top + height, left : left + width].float().div_(127.5).sub_(1)
    if bool(torch.rand((), generator=random) < 0.5):
        images = images.flip(3)
    images = _soften(images, -0.5, 0.5, random)
    return images + _uniform(len(images), -0.05, 0.05, random)


def _uniform(batch: int, low: float, high: float, random: torch.Generator) -> Tensor:
    """One number a picture, (B, 1, 1, 1)."""
    return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=random)


def _move(images: Tensor, flippable: Tensor, random: torch.Generator, scale: float) -> Tensor:
    """Size, place, angle and mirror; what comes into view continues the border."""
    batch = len(images)
    draws = [_uniform(batch, low, high, random).flatten() for low, high in _MOVES]
    coin, zoom_x, zoom_y, turn, right, down = draws
    mirror = torch.where(flippable & (coin < 0.5), -1.0, 1.0)
    matrix = torch.stack(
        [
            torch.stack([zoom_x * turn.cos() * mirror, -zoom_y * turn.sin(), right], dim=1),
            torch.stack([zoom_x * turn.sin() * mirror, zoom_y * turn.cos(), down], dim=1),
        ],
        dim=1,
    )
    size = [batch, 3, *(round(side * scale) for side in images.shape[2:])]
    grid = F.affine_grid(matrix, size, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


_MOVES = ((0.0, 1.0), (0.85, 1.25), (0.85, 1.25), (-0.2, 0.2), (-0.12, 0.12), (-0.12, 0.12))


def _soften(images: Tensor, low: float, high: float, random: torch.Generator) -> Tensor:
    """Mixes in a 3 x 3 blur; the share is drawn from [low, high], and a negative share is none."""
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return torch.lerp(images, blurred, _uniform(len(images), low, high, random).clamp(min=0))


def _recolour(images: Tensor, random: torch.Generator) -> Tensor:
    """Contrast, brightness, saturation and tint; white stays near white."""
    batch = len(images)
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey, images, _uniform(batch, 0.4, 1.4, random))
    images = (images - 1) * _uniform(batch, 0.7, 1.3, random) + 1 + _uniform(batch, -0.1, 0.1, random)
    return images + 0.06 * torch.randn(batch, 3, 1, 1, generator=random)


def _cover(images: Tensor, random: torch.Generator) -> Tensor:
    """Covers a square of a quarter of the side with white in half of the pictures."""
    batch, _, height, width = images.shape
    top, left = _uniform(batch, 0, 0.75, random) * height, _uniform(batch, 0, 0.75, random) * width
    rows, columns = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + height / 4) & (columns >= left) & (columns < left + width / 4)
    return images.masked_fill(inside & (_uniform(batch, 0, 1, random) < 0.5), 1.0)
