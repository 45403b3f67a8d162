"""What all image tokenizers share: the pictures they take, prefixes, sizes, and their parts.

Knows pixels, codes and a quantizer. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.base import Tokenizer
from tokenloom.tokenizers.pixels import Size, as_pixels, as_size, check_values
from tokenloom.tokenizers.quantizers import Quantized, Quantizer


class ImageTokenizer(Tokenizer):
    """Base class of image tokenizers with an encoder, a quantizer and a decoder.

    A subclass sets the attributes and defines `features` and `paint_vectors`. Pictures may be float pixels (B, 3, H, W)
    in `pixel_range`, uint8 pixels, PIL pictures or lists of them; see `tokenloom.tokenizers.pixels.as_pixels`.

    Attributes:
        image_size: Side of the pictures that `layout` describes, or (height, width).
        pixel_range: Lowest and highest value of a pixel.
        clamp: Whether `decode` clamps to `pixel_range`.
        any_size: Whether pictures of other sizes work as well; `decode` is then told their size.
        quantizer: The quantizer.
        parts: Names of parameters (or what they begin with) that "encoder", "quantizer" and "decoder" stand for.
    """

    modality = "image"
    image_size: int | Size
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    clamp: bool = True
    any_size: bool = False
    quantizer: Quantizer
    parts: dict[str, tuple[str, ...]] = {  # noqa: RUF012  (a constant of the class)
        "encoder": ("encoder", "to_code"),
        "quantizer": ("quantizer",),
        "decoder": ("from_code", "decoder"),
    }

    @property
    def bits_per_image(self) -> float:
        """Bits of the codes of one picture of `image_size`."""
        return self.bits_per_sample

    @property
    def last_layer(self) -> Tensor:
        """The weight that paints pixels, at which losses are weighed against each other."""
        return self.decoder.conv_out.weight

    def lengths_of(self, size: Size) -> Sequence[int]:
        """Like `lengths`, for a picture of (height, width) pixels."""
        return self.lengths

    def features(self, pixels: Tensor) -> Tensor:
        """Continuous vectors (B, P, d) before quantization of pixels (B, 3, H, W)."""
        raise TokenloomError(f"{type(self).__name__} does not define features(); override it.")

    def paint_vectors(self, z_q: Tensor, size: Size | None = None) -> Tensor:
        """Pixels (B, 3, H, W), not clamped, of quantized vectors (B, P, d) of a picture of `size`."""
        raise TokenloomError(f"{type(self).__name__} does not define paint_vectors(); override it.")

    def any_pixels(self, media: Any) -> Tensor:
        """Float pixels (B, 3, H, W) in `pixel_range` of pictures of any accepted kind and any size."""
        return as_pixels(media, self.pixel_range, type(self).__name__, next(self.parameters()).device)

    def pixels(self, media: Any) -> Tensor:
        """Float pixels (B, 3, H, W) of pictures of any accepted kind; their values are not looked at.

        Raises:
            TokenloomError: For another kind of object, or a size that this tokenizer does not take.
        """
        pixels = self.any_pixels(media)
        height, width = as_size(self.image_size)
        if not self.any_size and pixels.shape[2:] != (height, width):
            raise TokenloomError(
                f"{type(self).__name__} expects float pixels of shape (B, 3, {height}, {width}) or pictures of that size, "
                f"got {tuple(pixels.shape)}; resize the picture, or cut it into tiles: reconstruct(picture, "
                f"tile={self.image_size}), tokenloom.tokenizers.tiling.encode_tiled."
            )
        return pixels

    def quantize(self, media: Any) -> Quantized:
        """Codes, vectors, losses and statistics of pictures."""
        return self.quantizer.encode(self.features(self.pixels(media)))

    @torch.no_grad()
    def encode(self, media: Any, *, num_tokens: int | None = None) -> Tensor:
        """Codes (B, N) in layout order.

        Args:
            media: Pictures, see the class.
            num_tokens: Number of codes k, one of `lengths`; the first k codes are returned. `None` = all.

        Raises:
            TokenloomError: For media of a wrong kind, NaN, or a number of tokens that does not decode. A wrong range is a
                warning that says which range was seen.
        """
        pixels = self.pixels(media)
        check_values(pixels, self.pixel_range)
        if num_tokens is not None:
            self.check_num_tokens(num_tokens, self.lengths_of((pixels.shape[2], pixels.shape[3])))
        return self.quantize(pixels).codes[:, :num_tokens]

    def vectors_of(self, codes: Tensor, size: Size) -> Tensor:
        """Quantized vectors (B, P, d) of LongTensor codes of a picture of `size`."""
        return self.quantizer.decode(codes)

    @torch.no_grad()
    def decode(self, codes: Tensor, size: int | Sequence[int] | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in `pixel_range` of codes (B, N), or of the first k codes where `lengths` says so.

        Args:
            codes: Integer codes in layout order.
            size: Height and width of the picture, where `any_size` holds; `None` = `image_size`.

        Raises:
            TokenloomError: If the codes are not those of such a picture.
        """
        place = as_size(self.image_size if size is None else size)
        if not self.any_size and place != as_size(self.image_size):
            raise TokenloomError(
                f"{type(self).__name__} decodes pictures of {as_size(self.image_size)} pixels, not {place}; cut larger "
                "ones into tiles, see tokenloom.tokenizers.tiling."
            )
        self.check_codes(codes, self.lengths_of(place))
        vectors = self.vectors_of(codes.long(), place).to(self.last_layer.dtype)
        pixels = self.paint_vectors(vectors, place)
        return pixels.clamp(*self.pixel_range) if self.clamp else pixels

    @torch.no_grad()
    def reconstruct(
        self,
        media: Any,
        *,
        num_tokens: int | None = None,
        tile: int | Sequence[int] | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """Pixels (B, 3, H, W) after encoding and decoding, of the size of the pictures.

        Args:
            media: Pictures, see the class.
            num_tokens: Codes kept of each picture or tile, see `encode`.
            tile: Side or (height, width) of tiles; `None` = the picture at once.
            overlap: Pixels that neighbouring tiles share and blend; `None` = a quarter of a tile.
        """
        if tile is not None:
            from tokenloom.tokenizers.tiling import decode_tiled, encode_tiled

            return decode_tiled(self, encode_tiled(self, media, tile, overlap, num_tokens=num_tokens))
        pixels = self.pixels(media)
        options = {} if num_tokens is None else {"num_tokens": num_tokens}
        codes = self.encode(pixels, **options)
        return self.decode(codes, (pixels.shape[2], pixels.shape[3])) if self.any_size else self.decode(codes)

    def forward(self, media: Any) -> tuple[Tensor, Quantized]:
        """Differentiable reconstruction (B, 3, H, W), not clamped, and what the quantizer returned."""
        pixels = self.pixels(media)
        quantized = self.quantize(pixels)
        return self.paint_vectors(quantized.z_q, (pixels.shape[2], pixels.shape[3])), quantized
