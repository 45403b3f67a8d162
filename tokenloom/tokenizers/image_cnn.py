"""A convolutional image tokenizer for pictures of any size: LlamaGen's VQ-8 and VQ-16, MaskGIT's VQGAN, and your own.

Knows pixels, a convolutional encoder and decoder, and a quantizer. Knows nothing of generators, captions or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.layouts import Layout
from tokenloom.tokenizers.cnn import CNNConfig, CNNDecoder, CNNEncoder
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import Size, as_size, pad_to
from tokenloom.tokenizers.quantizers import make_quantizer


class ImageCNNTokenizer(ImageTokenizer):
    """RGB pictures to a grid of codes and back, by convolutions.

    `layout` is the grid of pictures of `image_size`. Pictures of other sizes work as well: they are padded to a multiple of the
    stride by repeating their edge, and `decode` is told their size, to which it crops.

    Args:
        image_size: Side of the pictures in pixels, or (height, width).
        channels: Width at full resolution.
        multipliers: Width of every level as a multiple of `channels`; each level after the first halves the resolution.
        blocks: Residual blocks a level.
        latent_channels: Channels between the convolutions and the 1x1 projections to and from codes; `None`: the quantizer's
            width, without projections.
        norm_groups: Groups of the group norms.
        form: "taming" or "maskgit", see `tokenloom.tokenizers.cnn`.
        quantizer_type: "vq", "fsq" or another quantizer with one code a vector.
        quantizer_options: Keyword options of the quantizer; by default a cosine codebook of 4,096 codes of width 8.
        pixel_range: Lowest and highest value of a pixel.
        clamp: Whether `decode` clamps to `pixel_range`; official weights do not.
        patch: Side of the squares of pixels that count as channels, see `tokenloom.tokenizers.cnn.CNNConfig`.
    """

    any_size = True

    @register_to_config
    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
        latent_channels: int | None = 64,
        norm_groups: int = 32,
        form: str = "taming",
        quantizer_type: str = "vq",
        quantizer_options: dict[str, object] | None = None,
        pixel_range: Sequence[float] = (-1.0, 1.0),
        clamp: bool = True,
        patch: int = 1,
    ) -> None:
        super().__init__()
        if quantizer_options is None and quantizer_type == "vq":
            quantizer_options = {"codebook_size": 4096, "dim": 8}
        self.quantizer = make_quantizer(quantizer_type, dict(quantizer_options or {}))
        self.vocab_size, dim = self.quantizer.codebook_size, self.quantizer.dim
        if self.quantizer.codebooks > 1:
            raise TokenloomError(
                f"ImageCNNTokenizer needs one code a place, but {quantizer_type} gives {self.quantizer.codebooks}."
            )
        latent = dim if latent_channels is None else latent_channels
        shape = CNNConfig(channels, tuple(multipliers), blocks, latent, norm_groups, form, patch)
        self.stride = shape.stride
        height, width = as_size(image_size)
        self.image_size: int | Size = height if height == width else (height, width)
        rows, columns = self.grid_of((height, width))
        self.grid: int | Size = rows if rows == columns else (rows, columns)
        self.layout = Layout.grid(rows, columns)
        self.pixel_range = (float(pixel_range[0]), float(pixel_range[1]))
        self.clamp = clamp
        self.encoder = CNNEncoder(shape)
        self.to_code, self.from_code = (
            nn.Identity() if latent_channels is None else nn.Conv2d(*pair, 1)
            for pair in ((latent, dim), (dim, latent))
        )
        self.decoder = CNNDecoder(shape)

    def grid_of(self, size: Size) -> Size:
        """Rows and columns of codes of a picture of (height, width) pixels."""
        return math.ceil(size[0] / self.stride), math.ceil(size[1] / self.stride)

    def lengths_of(self, size: Size) -> tuple[int]:
        """The number of codes of a picture of (height, width) pixels."""
        rows, columns = self.grid_of(size)
        return (rows * columns,)

    def features(self, pixels: Tensor) -> Tensor:
        """Continuous vectors (B, N, d) in raster order before quantization of pixels (B, 3, H, W)."""
        pixels = pixels.to(self.encoder.conv_in.weight.dtype)
        rows, columns = self.grid_of((pixels.shape[2], pixels.shape[3]))
        pixels = pad_to(pixels, rows * self.stride, columns * self.stride)
        return self.to_code(self.encoder(pixels)).flatten(2).transpose(1, 2)

    def paint_vectors(self, z_q: Tensor, size: Size | None = None) -> Tensor:
        """Pixels (B, 3, H, W), not clamped, of quantized vectors (B, N, d) of a picture of `size`."""
        height, width = as_size(self.image_size) if size is None else size
        latent = z_q.transpose(1, 2).unflatten(2, self.grid_of((height, width)))
        return self.decoder(self.from_code(latent))[..., :height, :width]
