"""Sends a picture of any size through an image tokenizer and says how close it came back.

A picture larger than the square of a tokenizer that takes one size is cut into tiles, each tokenized for itself; the last
row and column are padded by repeating the border, and cut off again. A tokenizer for any size gets the whole picture, or
large tiles that overlap, unless it has the same number of codes for a picture of any size. Knows nothing of generators or files.

Shapes: H W pixels, n tiles, S the side of the tokenizer's pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from tokenloom import media
from tokenloom.evaluation.metrics import psnr
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import as_size, rescale
from tokenloom.tokenizers.tiling import decode_tiled, encode_tiled

_LARGEST_TILE = 512  # pixels of a side that a tokenizer for any size is given at once
_OVERLAP = 64


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
    tokenizer: ImageTokenizer, image: Image.Image, *, fit: bool = False, num_tokens: int | None = None
) -> Reconstruction:
    """Encodes and decodes a picture.

    Args:
        tokenizer: The image tokenizer.
        image: Any PIL image; transparency is put on white.
        fit: Shrink the largest centred square of the picture to one tile, instead of cutting the picture into tiles.
        num_tokens: Codes kept of each tile, one of `tokenizer.lengths`; `None` = all.

    Returns:
        The picture after the round trip, and its figures.

    Raises:
        TokenloomError: If the tokenizer does not decode so many codes.

    Example:
        >>> reconstruct_image(tokenizer, Image.open("cat.jpg")).psnr  # doctest: +SKIP
    """
    own = as_size(tokenizer.image_size)
    original = media.to_rgb(image)
    if fit:
        side = min(original.size)
        left, top = (original.width - side) // 2, (original.height - side) // 2
        box = (left, top, left + side, top + side)
        original = original.crop(box).resize((own[1], own[0]), Image.Resampling.LANCZOS)
    tile, overlap = own, 0
    if num_tokens is None and _grows(tokenizer):
        tile = min(_LARGEST_TILE, original.height), min(_LARGEST_TILE, original.width)
        overlap = (
            0 if tile == (original.height, original.width) else min(_OVERLAP, *(side - 1 for side in tile))
        )
    tiled = encode_tiled(tokenizer, original, tile, overlap, num_tokens=num_tokens)
    output = rescale(decode_tiled(tokenizer, tiled).float().cpu(), tokenizer.pixel_range, (-1.0, 1.0))
    result = media.to_pil(output)[0]
    quality = psnr((media.to_pixels(result) + 1) / 2, (media.to_pixels(original) + 1) / 2)
    bits = tiled.codes.numel() * math.log2(tokenizer.vocab_size)
    return Reconstruction(original, result, float(quality), tiled.tiling.count, bits)


def _grows(tokenizer: ImageTokenizer) -> bool:
    """Whether a larger picture has more codes."""
    height, width = as_size(tokenizer.image_size)
    return tokenizer.any_size and tokenizer.lengths_of((2 * height, 2 * width))[-1] > tokenizer.layout.size
