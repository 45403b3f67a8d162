"""Boxes to codes and back, and the boxes of masks.

A box is x0, y0, x1, y1 in pixels from the upper left corner of a picture; x1 and y1 lie behind the last pixel. Its codes are
the four coordinates on a scale of 0 to `bins` - 1 over the width or height, as language models write them. Rounding moves
a coordinate by at most half a step: `box_error(size, bins)`. Knows numbers; knows nothing of networks or words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError

Size = tuple[int, int]

BINS = 1000
"""Steps of the scale of published models (InternVL, Qwen-VL): codes 0 to 999."""

_SLACK = 0.5  # pixels outside the picture that rounding may have made


def _scale(size: Size, bins: int) -> Tensor:
    """Float64 (4,): pixels a code of each coordinate."""
    if len(size) != 2 or min(size) < 1 or bins < 2:
        raise TokenloomError(
            f"Boxes need a picture of (height, width), each at least 1, and at least 2 bins; got size={size!r}, bins={bins}."
        )
    height, width = size
    return torch.tensor([width, height, width, height], dtype=torch.float64) / (bins - 1)


def box_error(size: Size, bins: int = BINS) -> tuple[float, float]:
    """How far a coordinate of a decoded box may lie from the original, in pixels: (vertical, horizontal)."""
    steps = _scale(size, bins)
    return float(steps[1]) / 2, float(steps[0]) / 2


def boxes_to_codes(boxes: Tensor, size: Size, bins: int = BINS) -> Tensor:
    """Codes of boxes.

    Args:
        boxes: (..., 4) x0, y0, x1, y1 in pixels, x0 <= x1 and y0 <= y1.
        size: Height and width of the picture.
        bins: Number of codes.

    Returns:
        LongTensor (..., 4), 0 to `bins` - 1, in the same order.

    Raises:
        TokenloomError: For anything else, among it NaN and boxes that leave the picture.
    """
    scale = _scale(size, bins)
    if not isinstance(boxes, Tensor) or boxes.ndim < 1 or boxes.shape[-1] != 4 or boxes.is_complex():
        given = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes)
        raise TokenloomError(f"Boxes must be a tensor (..., 4) of x0, y0, x1, y1, got {given}.")
    values = boxes.detach().double().cpu()
    limits = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float64)
    inside = (values >= -_SLACK) & (values <= limits + _SLACK)  # also false for NaN
    right = inside.all(-1) & (values[..., :2] <= values[..., 2:]).all(-1)
    if not bool(right.all()):
        bad = values[~right][0].tolist()
        raise TokenloomError(
            f"Boxes are x0, y0, x1, y1 with x0 <= x1 <= {size[1]} and y0 <= y1 <= {size[0]}, got {bad}; a box given as x, y, "
            "width, height needs the corner x + width, y + height."
        )
    return (values / scale).round().clamp(0, bins - 1).long().to(boxes.device)


def codes_to_boxes(codes: Tensor, size: Size, bins: int = BINS) -> Tensor:
    """Boxes of codes, the inverse of `boxes_to_codes` up to `box_error`.

    Args:
        codes: Integers (..., 4), 0 to `bins` - 1.
        size: Height and width of the picture, which may be another than the one of the codes.
        bins: Number of codes.

    Returns:
        Float32 (..., 4) x0, y0, x1, y1 in pixels.

    Raises:
        TokenloomError: For codes of another kind or outside the scale.
    """
    scale = _scale(size, bins)
    whole = isinstance(codes, Tensor) and not codes.is_floating_point() and codes.dtype != torch.bool
    if not whole or codes.ndim < 1 or codes.shape[-1] != 4:
        given = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes)
        raise TokenloomError(f"Codes of boxes must be integers (..., 4), got {given}.")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= bins):
        raise TokenloomError(
            f"Codes of boxes must lie in 0..{bins - 1}, got {int(codes.min())}..{int(codes.max())}."
        )
    return (codes.cpu().double() * scale).float().to(codes.device)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The smallest boxes around masks.

    Args:
        masks: Bool (B, H, W); other dtypes count where they are above 0.5.

    Returns:
        Float32 (B, 4) x0, y0, x1, y1; zeros for an empty mask.
    """
    if not isinstance(masks, Tensor) or masks.ndim != 3 or 0 in masks.shape[1:]:
        given = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks)
        raise TokenloomError(f"Masks must be (B, H, W), H and W at least 1, got {given}.")
    inside = masks if masks.dtype == torch.bool else masks > 0.5
    sides = []
    for line in (inside.any(1), inside.any(2)):  # (B, W) and (B, H)
        first, last = line.float().argmax(1), line.shape[1] - line.flip(1).float().argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    boxes = torch.stack([x0, y0, x1, y1], dim=1).float()
    return boxes * inside.flatten(1).any(1)[:, None]
