"""Sends a picture of any size through an image tokenizer and says how close it came back.

A picture larger than the tokenizer's square is cut into tiles, each tokenized for itself; the last row and column are
padded by repeating the border, and cut off again. Knows nothing of generators or files.

Shapes: H W pixels, n tiles, S the side of the tokenizer's pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from tokenloom import media
from tokenloom.evaluation.metrics import psnr
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import as_size, rescale
from tokenloom.tokenizers.tiling import Tiling

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


def reconstruct_image(tokenizer: ImageTokenizer, image: Image.Image, *, fit: bool = False) -> Reconstruction:
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
    height, width = as_size(tokenizer.image_size)
    original = media.to_rgb(image)
    if fit:
        side = min(original.size)
        left, top = (original.width - side) // 2, (original.height - side) // 2
        box = (left, top, left + side, top + side)
        original = original.crop(box).resize((width, height), Image.Resampling.LANCZOS)
    tiling = Tiling((original.height, original.width), (height, width))
    tiles = tiling.cut(media.to_pixels(original))[0]
    weight = next(tokenizer.parameters())
    done = []
    for part in tiles.split(_TILES_AT_ONCE):
        given = rescale(part.to(weight.device, weight.dtype), (-1.0, 1.0), tokenizer.pixel_range)
        output = tokenizer.reconstruct(given).float().cpu()
        done.append(rescale(output, tokenizer.pixel_range, (-1.0, 1.0)))
    result = media.to_pil(tiling.join(torch.cat(done)[None]))[0]
    quality = psnr((media.to_pixels(result) + 1) / 2, (media.to_pixels(original) + 1) / 2)
    return Reconstruction(original, result, float(quality), len(tiles), len(tiles) * tokenizer.bits_per_image)
