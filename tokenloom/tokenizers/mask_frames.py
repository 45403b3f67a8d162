"""Frames of masks: the box of a mask in a few codes, coarse to fine, and masks cut out of their frames and put back.

The sides of a box lie on a scale of n steps. The first code holds a few steps of all four sides; each further code divides the
steps of each side again. So any prefix says where the box is, and a network has to code the shape inside alone. Knows boxes and
resampling; knows nothing of networks or quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.boxes import masks_to_boxes

_LEAST = 16  # codes that can divide all four sides


@dataclass(frozen=True)
class MaskFrame:
    """How boxes become codes.

    Attributes:
        codes: Codes of a frame, at least 1.
        side: Pixels a side that the inside of a frame is resampled to.
        vocabulary: Number of codes, at least 16.
    """

    codes: int
    side: int
    vocabulary: int

    def __post_init__(self) -> None:
        if self.codes < 1 or self.side < 1 or self.vocabulary < _LEAST:
            raise TokenloomError(
                f"A frame needs at least 1 code, a side of at least 1 pixel and {_LEAST} codes to choose from, got {self}."
            )

    @property
    def coarse(self) -> int:
        """Steps of a side in the first code: as many as pairs of sides leave room for."""
        steps = 1
        while _pairs(steps + 1) ** 2 <= self.vocabulary:
            steps += 1
        return steps

    @property
    def finer(self) -> int:
        """Parts that each further code divides a step into."""
        parts = 1
        while (parts + 1) ** 4 <= self.vocabulary:
            parts += 1
        return parts

    @property
    def steps(self) -> int:
        """Steps of the whole scale, n."""
        return self.coarse * self.finer ** (self.codes - 1)

    def encode(self, boxes: Tensor, size: int) -> Tensor:
        """Codes LongTensor (B, codes) of boxes (B, 4), x0, y0, x1, y1 in pixels of a square of `size` pixels.

        Sides are moved to the nearest step, and a box is at least one step wide and high.
        """
        edges = (boxes.double() * self.steps / size).round().long()
        low = edges[:, :2].clamp(0, self.steps - 1)
        high = torch.maximum(edges[:, 2:].clamp(1, self.steps) - 1, low)
        sides = torch.stack((low[:, 0], high[:, 0], low[:, 1], high[:, 1]), dim=1)  # x, x, y, y
        unit = self.finer ** (self.codes - 1)
        first = sides // unit
        pair = first[:, ::2] + first[:, 1::2] * (first[:, 1::2] + 1) // 2
        codes = [pair[:, 0] * _pairs(self.coarse) + pair[:, 1]]
        powers = self.finer ** torch.arange(3, -1, -1, device=boxes.device)
        for _ in range(self.codes - 1):
            unit //= self.finer
            codes.append((sides // unit % self.finer * powers).sum(1))
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor, size: int, kept: Tensor | None = None) -> Tensor:
        """Boxes (B, 4) float in pixels of a square of `size` pixels of codes (B, n), n <= `codes`, or of their first few.

        Where finer codes are missing, sides lie a quarter of a step inside what is known. Codes that no box has count as
        the nearest that one has.

        Args:
            codes: Integers (B, n), n at least 1.
            size: Pixels a side.
            kept: LongTensor (B,) of how many codes of each row count, at least 1; `None` = all.
        """
        known = codes.shape[1] if kept is None else kept[:, None]
        first = codes[:, 0].clamp(0, _pairs(self.coarse) ** 2 - 1)
        pair = torch.stack((first // _pairs(self.coarse), first % _pairs(self.coarse)), dim=1)
        upper = ((8 * pair.double() + 1).sqrt() / 2 - 0.5 + 1e-9).floor().long()
        sides = torch.stack((pair - upper * (upper + 1) // 2, upper), dim=2).flatten(1)  # x, x, y, y
        sides, unit = sides.double(), 1.0
        last = torch.full_like(
            sides[:, :1], unit
        )  # the step of the last known code, as a share of a coarse one
        powers = self.finer ** torch.arange(3, -1, -1, device=codes.device)
        for index in range(1, codes.shape[1]):
            unit /= self.finer
            there = torch.as_tensor(known, device=codes.device) > index
            digits = codes[:, index : index + 1].clamp(0, self.finer**4 - 1) // powers % self.finer
            sides = torch.where(there, sides + digits * unit, sides)
            last = torch.where(there, unit, last)
        margin = torch.where(last > 1.5 * self.coarse / self.steps, 0.25 * last, 0.0)
        low, high = sides[:, ::2] + margin, sides[:, 1::2] + last - margin
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        return (torch.cat((low, high), dim=1) * size / self.coarse).float()

    def boxes(self, masks: Tensor) -> Tensor:
        """Boxes (B, 4) of masks (B, S, S) in [0, 1]: of what is at least half as bright as the brightest pixel."""
        return masks_to_boxes(masks > 0.5 * masks.amax((1, 2), keepdim=True))

    def cut(self, masks: Tensor, boxes: Tensor) -> Tensor:
        """The insides (B, side, side) of boxes (B, 4) in pixels of masks (B, S, S); differentiable."""
        size = masks.shape[-1]
        place = (torch.arange(self.side, device=masks.device) + 0.5) / self.side
        x, y = (boxes[:, i, None] + place * (boxes[:, i + 2] - boxes[:, i])[:, None] for i in (0, 1))
        return _sample(masks, 2 * x / size - 1, 2 * y / size - 1, "zeros")

    def paste(self, logits: Tensor, boxes: Tensor, size: int, outside: float) -> Tensor:
        """Logits (B, S, S) whose inside of boxes (B, 4) is that of logits (B, side, side), and `outside` elsewhere."""
        place = torch.arange(size, device=logits.device) + 0.5
        x, y = (
            (place - boxes[:, i, None]) / (boxes[:, i + 2] - boxes[:, i]).clamp(min=1e-3)[:, None]
            for i in (0, 1)
        )
        inside = ((x >= 0) & (x <= 1))[:, None, :] & ((y >= 0) & (y <= 1))[:, :, None]
        return torch.where(inside, _sample(logits, 2 * x - 1, 2 * y - 1, "border"), outside)


def _pairs(steps: int) -> int:
    """Pairs of a lower and an upper side on a scale of so many steps."""
    return steps * (steps + 1) // 2


def _sample(maps: Tensor, x: Tensor, y: Tensor, padding: str) -> Tensor:
    """Maps (B, h, w) at x (B, W) and y (B, H), -1 to 1 across the map: (B, H, W)."""
    shape = (len(maps), y.shape[1], x.shape[1])
    grid = torch.stack((x[:, None].expand(shape), y[:, :, None].expand(shape)), dim=3).to(maps.dtype)
    return F.grid_sample(maps[:, None], grid, mode="bilinear", padding_mode=padding, align_corners=False)[
        :, 0
    ]
