"""Large pictures in tiles that overlap and are blended, so that neighbouring tiles meet without a seam.

Works with every image tokenizer, also with one that takes pictures of a single size. Knows pixels and tiles. Knows
nothing of how a tile becomes codes.

Shapes: B pictures, T tiles a picture, h x w pixels of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import Size, as_size, check_values, pad_to

_TILES_AT_ONCE = 64


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut into tiles.

    Attributes:
        size: (height, width) of the picture.
        tile: (height, width) of a tile.
        overlap: Pixels that neighbouring tiles share.

    Raises:
        TokenloomError: If the overlap is negative or not smaller than a tile.
    """

    size: Size
    tile: Size
    overlap: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < min(self.tile):
            raise TokenloomError(
                f"Tiles of {self.tile} pixels may overlap by 0 to {min(self.tile) - 1}, not by {self.overlap}."
            )

    def _count(self, axis: int) -> int:
        step = self.tile[axis] - self.overlap
        return max(1, -(-(self.size[axis] - self.overlap) // step))

    @property
    def grid(self) -> Size:
        """Rows and columns of tiles."""
        return self._count(0), self._count(1)

    @property
    def count(self) -> int:
        """Number of tiles T of a picture."""
        rows, columns = self.grid
        return rows * columns

    def _starts(self) -> list[Size]:
        down, across = (side - self.overlap for side in self.tile)
        rows, columns = self.grid
        return [(row * down, column * across) for row in range(rows) for column in range(columns)]

    def cut(self, pixels: Tensor) -> Tensor:
        """Tiles (B, T, 3, h, w) of pixels (B, 3, H, W) in raster order; the lower and right edge is repeated."""
        (height, width), (top, left) = self.tile, self._starts()[-1]
        pixels = pad_to(pixels, top + height, left + width)
        parts = [pixels[:, :, y : y + height, x : x + width] for y, x in self._starts()]
        return torch.stack(parts, dim=1)

    def _ramp(self, axis: int, like: Tensor) -> Tensor:
        """Weight of each line of a tile: rises over the overlap like a sine squared, 1 inside, falls again."""
        side = self.tile[axis]
        edge = torch.arange(1, side + 1, device=like.device, dtype=torch.float32) / (self.overlap + 1)
        rise = (edge.clamp(max=1) * (math.pi / 2)).sin().square()
        return rise * rise.flip(0)

    def join(self, tiles: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of tiles (B, T, 3, h, w), blended where they overlap."""
        (height, width), (top, left) = self.tile, self._starts()[-1]
        weight = self._ramp(0, tiles)[:, None] * self._ramp(1, tiles)
        batch, _, channels = tiles.shape[:3]
        total = weight.new_zeros(batch, channels, top + height, left + width)
        weights = weight.new_zeros(top + height, left + width)
        for index, (y, x) in enumerate(self._starts()):
            total[:, :, y : y + height, x : x + width] += tiles[:, index].float() * weight
            weights[y : y + height, x : x + width] += weight
        return (total / weights)[..., : self.size[0], : self.size[1]].to(tiles.dtype)


@dataclass(frozen=True)
class TiledCodes:
    """Codes of tiled pictures.

    Attributes:
        codes: LongTensor (B, T, N), codes of each tile.
        tiling: How the pictures were cut.
    """

    codes: Tensor
    tiling: Tiling


@torch.no_grad()
def encode_tiled(
    tokenizer: ImageTokenizer,
    media: Any,
    tile: int | Sequence[int] | None = None,
    overlap: int | None = None,
    *,
    num_tokens: int | None = None,
) -> TiledCodes:
    """Codes of pictures of any size, tile by tile.

    Args:
        tokenizer: An image tokenizer.
        media: Pictures of any kind that the tokenizer takes, of any size.
        tile: Side of a tile or (height, width); `None` = the tokenizer's `image_size`.
        overlap: Pixels that neighbouring tiles share; `None` = a quarter of the shorter side of a tile. More overlap costs
            more codes and hides the borders better; with 0 they show.
        num_tokens: Codes kept of each tile, where the tokenizer can do so.

    Raises:
        TokenloomError: If the tokenizer does not take tiles of this size, or for wrong pictures.
    """
    sides = as_size(tokenizer.image_size if tile is None else tile)
    if not tokenizer.any_size and sides != as_size(tokenizer.image_size):
        raise TokenloomError(
            f"{type(tokenizer).__name__} takes tiles of {as_size(tokenizer.image_size)} pixels only, not {sides}."
        )
    pixels = tokenizer.any_pixels(media)
    check_values(pixels, tokenizer.pixel_range)
    tiling = Tiling(
        (pixels.shape[2], pixels.shape[3]), sides, min(sides) // 4 if overlap is None else overlap
    )
    options = {} if num_tokens is None else {"num_tokens": num_tokens}
    parts = tiling.cut(pixels).flatten(0, 1).split(_TILES_AT_ONCE)
    codes = torch.cat([tokenizer.encode(part, **options) for part in parts])
    return TiledCodes(codes.unflatten(0, (-1, tiling.count)), tiling)


@torch.no_grad()
def decode_tiled(tokenizer: ImageTokenizer, tiled: TiledCodes) -> Tensor:
    """Pixels (B, 3, H, W) of the codes of `encode_tiled`, blended where tiles overlap."""
    size = (tiled.tiling.tile,) if tokenizer.any_size else ()
    parts = tiled.codes.flatten(0, 1).split(_TILES_AT_ONCE)
    tiles = torch.cat([tokenizer.decode(part, *size) for part in parts])
    return tiled.tiling.join(tiles.unflatten(0, (-1, tiled.tiling.count)))
