"""Sends a picture of any size through an image tokenizer and says how close it came back.

A picture larger than the tokenizer's square is cut into tiles, each tokenized for itself; the last row and column are
padded by repeating the border, and cut off again. Knows nothing of generators or files.

Shapes: H W pixels, n tiles, S the side of the tokenizer's pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenloom import media
from tokenloom.evaluation.metrics import psnr
from tokenloom.tokenizers.image_vq import ImageVQTokenizer

_TILES_AT_ONCE = 64


@dataclass(frozen=True)
class Reconstruction:
    """A picture after the tokenizer.

    Attributes:
        original: What was tokenized, as RGB.
        image: What came back, of the same size.
        psnr: Peak signal-to-noise ratio in dB over all pixels and channels, of the 8-bit pictures; inf if equal.
        tiles: How many squares were tokenized.
        bits: Bits of all codes.
    """

    original: Image.Image
    image: Image.Image
    psnr: float
    tiles: int
    bits: float

    @property
    def bits_per_pixel(self) -> float:
        """Bits of all codes, divided by the pixels of the picture."""
        return self.bits / (self.original.width * self.original.height)

    def __str__(self) -> str:
        squares = "1 tile" if self.tiles == 1 else f"{self.tiles} tiles"
        return (
            f"PSNR {self.psnr:.2f} dB at {self.bits_per_pixel:.3f} bits per pixel "
            f"({self.original.width}x{self.original.height} pixels, {squares}, {self.bits:,.0f} bits)"
        )


def reconstruct_image(
    tokenizer: ImageVQTokenizer, image: Image.Image, *, fit: bool = False
) -> Reconstruction:
    """Encodes and decodes a picture.

    Args:
        tokenizer: The image tokenizer.
        image: Any PIL image; transparency is put on white.
        fit: Shrink the largest centred square of the picture to one tile, instead of cutting the picture into tiles.

    Returns:
        The picture after the round trip, and its figures.

    Example:
        >>> reconstruct_image(tokenizer, Image.open("cat.jpg")).psnr  # doctest: +SKIP
    """
    size = tokenizer.image_size
    original = media.to_rgb(image)
    if fit:
        side = min(original.size)
        left, top = (original.width - side) // 2, (original.height - side) // 2
        box = (left, top, left + side, top + side)
        original = original.crop(box).resize((size, size), Image.Resampling.LANCZOS)
    tiles, rows, columns = _cut(media.to_pixels(original), size)
    weight = next(tokenizer.parameters())
    done = [
        tokenizer.reconstruct(part.to(weight.device, weight.dtype)).float().cpu()
        for part in tiles.split(_TILES_AT_ONCE)
    ]
    pixels = _join(torch.cat(done), rows, columns)[..., : original.height, : original.width]
    result = media.to_pil(pixels)[0]
    quality = psnr((media.to_pixels(result) + 1) / 2, (media.to_pixels(original) + 1) / 2)
    return Reconstruction(original, result, float(quality), len(tiles), len(tiles) * tokenizer.bits_per_image)


def _cut(pixels: Tensor, size: int) -> tuple[Tensor, int, int]:
    """Cuts (1, 3, H, W) into tiles (n, 3, S, S) in raster order; returns also the rows and columns of tiles."""
    height, width = pixels.shape[-2:]
    rows, columns = -(-height // size), -(-width // size)
    padding = (0, columns * size - width, 0, rows * size - height)
    padded = F.pad(pixels, padding, mode="replicate")
    tiles = padded.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # (1, 3, rows, S, columns, S)
    return tiles[0].permute(1, 3, 0, 2, 4).flatten(0, 1), rows, columns


def _join(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `_cut`, with the padding still there: (1, 3, rows * S, columns * S)."""
    grid = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)  # (3, rows, S, columns, S)
    return grid.flatten(1, 2).flatten(2, 3)[None]
