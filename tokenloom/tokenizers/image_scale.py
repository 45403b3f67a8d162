"""A multi-scale image tokenizer: one picture as maps of codes from 1x1 up, each of which refines the ones before.

VAR's multi-scale VQVAE (Tian et al. 2024), Infinity's bitwise one (Han et al. 2024), and your own. Every prefix of scales
decodes to a picture, coarse to fine. Knows pixels, a convolutional encoder and decoder, and a multi-scale quantizer. Knows
nothing of generators, captions or files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.layouts import Layout
from tokenloom.pyramid import ResidualPyramid
from tokenloom.tokenizers.cnn import CNNConfig, CNNDecoder, CNNEncoder
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import Size, as_size, check_values, pad_to
from tokenloom.tokenizers.quantizers import MultiScale, make_quantizer
from tokenloom.tokenizers.quantizers.binary import LFQ

_MOST_CODES = 1 << 16  # of a codebook that is written out as a table


class ImageScaleTokenizer(ImageTokenizer):
    """RGB pictures in [-1, 1] to codes of several scales and back, by convolutions.

    The finest scale is the grid of the encoder; `layout` is `Layout.scales(scales)`. Pictures of other sizes work as well:
    they are padded to a multiple of the stride, and every scale keeps its share of the finest one, rounded up.

    Args:
        scales: Side, or (height, width), of every scale, coarse to fine.
        channels: Width at full resolution.
        multipliers: Width of every level as a multiple of `channels`; each level after the first halves the resolution.
        blocks: Residual blocks a level.
        latent_channels: Channels between the convolutions and the quantizer.
        norm_groups: Groups of the group norms.
        form: "taming", "flux" or "maskgit", see `tokenloom.tokenizers.cnn`.
        project: Side of the convolutions between latent channels and codes; 0 for none, which needs equal widths.
        quantizer_type: "vq", "bsq", "fsq" or another quantizer with one code a vector, which all scales share.
        quantizer_options: Its keyword options; by default a Euclidean codebook of 4,096 codes of `latent_channels`.
        pyramid_options: Keyword options of `tokenloom.tokenizers.quantizers.MultiScale`: phis, ratio, kernel, up,
            commitment, prefix_dropout.
        patch: Side of the squares of pixels that count as channels, see `tokenloom.tokenizers.cnn.CNNConfig`.

    Example:
        >>> tokenizer = ImageScaleTokenizer((1, 2, 4, 8), channels=32)
        >>> tokenizer.lengths
        (1, 5, 21, 85)
    """

    any_size = True
    quantizer: MultiScale

    @register_to_config
    def __init__(
        self,
        scales: Sequence[int | Sequence[int]] = (1, 2, 3, 4, 6, 8),
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
        latent_channels: int = 32,
        norm_groups: int = 32,
        form: str = "taming",
        project: int = 3,
        quantizer_type: str = "vq",
        quantizer_options: dict[str, object] | None = None,
        pyramid_options: dict[str, Any] | None = None,
        patch: int = 1,
    ) -> None:
        super().__init__()
        shape = CNNConfig(channels, tuple(multipliers), blocks, latent_channels, norm_groups, form, patch)
        self.stride = shape.stride
        self.layout = Layout.scales(side if isinstance(side, int) else (side[0], side[1]) for side in scales)
        rows, columns = self.layout.maps[-1]
        height, width = rows * self.stride, columns * self.stride
        self.image_size: int | Size = height if height == width else (height, width)
        if quantizer_options is None and quantizer_type == "vq":
            quantizer_options = {"codebook_size": 4096, "dim": latent_channels, "normalize": False}
        inner = make_quantizer(quantizer_type, dict(quantizer_options or {}))
        options = dict(pyramid_options or {})
        check_options(MultiScale, {"inner", "maps", *options}, "pyramid option")
        self.quantizer = MultiScale(inner, self.layout.maps, **options)
        self.vocab_size, dim = inner.codebook_size, inner.dim
        if project < 0 or (project and project % 2 == 0) or (not project and latent_channels != dim):
            raise TokenloomError(
                f"project must be an odd side, or 0 where latent_channels is the quantizer's width {dim}; got "
                f"project={project} and latent_channels={latent_channels}."
            )
        self.encoder = CNNEncoder(shape)
        self.to_code, self.from_code = (
            nn.Conv2d(*pair, project, padding=project // 2) if project else nn.Identity()
            for pair in ((latent_channels, dim), (dim, latent_channels))
        )
        self.decoder = CNNDecoder(shape)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of codes with which a scale ends."""
        return self.lengths_of(as_size(self.image_size))

    def grid_of(self, size: Size) -> Size:
        """Rows and columns of the finest scale of a picture of (height, width) pixels."""
        return math.ceil(size[0] / self.stride), math.ceil(size[1] / self.stride)

    def maps_of(self, size: Size) -> tuple[Size, ...]:
        """(height, width) of every scale of a picture of (height, width) pixels."""
        (rows, columns), (tall, wide) = self.grid_of(size), self.layout.maps[-1]
        return tuple((-(-h * rows // tall), -(-w * columns // wide)) for h, w in self.layout.maps)

    def lengths_of(self, size: Size) -> tuple[int, ...]:
        """Numbers of codes with which a scale ends, for a picture of (height, width) pixels."""
        return tuple(itertools.accumulate(h * w for h, w in self.maps_of(size)))

    def _map_features(self, pixels: Tensor) -> Tensor:
        rows, columns = self.grid_of((pixels.shape[2], pixels.shape[3]))
        pixels = pad_to(pixels.to(self.last_layer.dtype), rows * self.stride, columns * self.stride)
        return self.to_code(self.encoder(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """Continuous vectors (B, H W, d) of the finest scale, in raster order, of pixels (B, 3, H, W)."""
        return self._map_features(pixels).flatten(2).transpose(1, 2)

    def quantize(self, media: Any) -> Any:
        """Codes of all scales, vectors of the finest, losses and statistics of pictures."""
        pixels = self.pixels(media)
        maps = self.maps_of((pixels.shape[2], pixels.shape[3]))
        return self.quantizer.encode(self.features(pixels), maps)

    def vectors_of(self, codes: Tensor, size: Size) -> Tensor:
        """Vectors (B, H W, d) of codes (B, N) or of their first scales."""
        return self.quantizer.decode(codes, self.maps_of(size))

    def paint_vectors(self, z_q: Tensor, size: Size | None = None) -> Tensor:
        """Pixels (B, 3, H, W), not clamped, of vectors (B, H W, d) of a picture of `size`."""
        height, width = as_size(self.image_size) if size is None else size
        latent = z_q.transpose(1, 2).unflatten(2, self.grid_of((height, width)))
        return self.decoder(self.from_code(latent))[..., :height, :width]

    def previews(self, codes: Tensor, size: int | Sequence[int] | None = None) -> list[Tensor]:
        """What each prefix of scales of codes (B, N) decodes to, coarse to fine: S tensors (B, 3, H, W)."""
        place = as_size(self.image_size if size is None else size)
        self.check_codes(codes, self.lengths_of(place)[-1])
        return [self.decode(codes[:, :length], place) for length in self.lengths_of(place)]

    def residual_pyramid(self) -> ResidualPyramid:
        """A copy of the codebook and convolutions, as `NextScaleGenerator` feeds back what codes add up to.

        Raises:
            TokenloomError: If the codebook is too large to be written out.
        """
        if self.vocab_size > _MOST_CODES:
            raise TokenloomError(
                f"A table of {self.vocab_size} codes is too large, at most {_MOST_CODES}; take quantizer.views(codes)."
            )
        mine = self.quantizer.pyramid
        pyramid = ResidualPyramid(
            mine.maps,
            self.vocab_size,
            mine.channels,
            len(mine.phis),
            mine.ratio,
            mine.kernel,
            up=mine.up,
        )
        table = self.quantizer.inner.decode(torch.arange(self.vocab_size, device=self.device)[None])[0]
        pyramid.load_state_dict({"codes.weight": table.detach(), **mine.state_dict()})
        return pyramid.to(self.device)

    def _binary(self) -> LFQ:
        if not isinstance(self.quantizer.inner, LFQ):
            raise TokenloomError(
                f"Only a tokenizer with a binary quantizer (bsq, lfq) has bits, not {self.config['quantizer_type']}."
            )
        return self.quantizer.inner

    @torch.no_grad()
    def encode_bits(self, media: Any) -> Tensor:
        """Bits (B, N, d) uint8 of pictures under a binary quantizer of any width, the most significant bit of a code first."""
        inner, pixels = self._binary(), self.pixels(media)
        check_values(pixels, self.pixel_range)
        return inner.bits(self.quantize(pixels).codes).to(torch.uint8)

    @torch.no_grad()
    def decode_bits(self, bits: Tensor, size: int | Sequence[int] | None = None) -> Tensor:
        """Pixels (B, 3, H, W) of bits (B, N, d) of all scales or the first of them; the inverse of `encode_bits`."""
        inner = self._binary()
        if bits.ndim != 3 or bits.shape[2] != inner.dim or bool(((bits != 0) & (bits != 1)).any()):
            raise TokenloomError(
                f"Expected bits of shape (B, N, {inner.dim}) that are 0 or 1, got {bits.dtype} {tuple(bits.shape)}."
            )
        return self.decode((bits.long() * inner.powers).sum(-1), size)
