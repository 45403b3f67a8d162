"""A small image tokenizer: transformer encoder, quantizer on a grid, transformer decoder.

Pictures are cut into patches (`patch` pixels), encoded with full attention and 2-D rotary positions, merged 2x2 (or
more) to the token grid, quantized, and decoded the same way back; a 3x3 convolution paints the pixels so that patches
meet without seams. Knows nothing of generators, captions or files.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.layers import Block, BlockConfig, make_norm, rope_table
from tokenloom.layouts import Layout
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import Size
from tokenloom.tokenizers.quantizers import make_quantizer


class _Trunk(nn.Module):
    """Transformer blocks with full attention over a square grid."""

    def __init__(self, grid: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        config = BlockConfig(width=width, heads=heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = make_norm("rms", width, config.norm_eps, True)
        cos, sin = rope_table(Layout.grid(grid, grid).coords, config.head_size, base=100.0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, rope=(self.cos, self.sin))
        return self.norm(x)


class ImageVQTokenizer(ImageTokenizer):
    """Square RGB pictures in [-1, 1] to a grid of codes and back.

    Args:
        image_size: Side of the pictures in pixels.
        patch: Side of a patch in pixels; the transformers run on image_size / patch squared patches.
        merge: Patches per token and side; the token grid has image_size / (patch * merge) rows.
        width: Width of the transformers.
        encoder_depth: Blocks in the encoder.
        decoder_depth: Blocks in the decoder.
        heads: Attention heads.
        quantizer_type: "fsq", "vq" or another quantizer with one code a vector.
        quantizer_options: Keyword options of the quantizer, for instance {"levels": [8, 8, 8, 8]}.
    """

    image_size: int
    parts = {  # noqa: RUF012  (a constant of the class)
        "encoder": ("stem", "encoder", "to_code"),
        "quantizer": ("quantizer",),
        "decoder": ("from_code", "decoder", "paint"),
    }

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch: int = 4,
        merge: int = 2,
        width: int = 128,
        encoder_depth: int = 4,
        decoder_depth: int = 5,
        heads: int = 4,
        quantizer_type: str = "fsq",
        quantizer_options: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        if min(image_size, patch, merge) < 1 or image_size % (patch * merge):
            raise TokenloomError(
                f"image_size {image_size} must be a multiple of patch * merge = {patch * merge}."
            )
        self.image_size, self.merge, self.patches = image_size, merge, image_size // patch
        self.grid = self.patches // merge
        self.layout = Layout.grid(self.grid, self.grid)
        if quantizer_options is None and quantizer_type == "fsq":
            quantizer_options = {"levels": [8, 8, 8, 8]}
        self.quantizer = make_quantizer(quantizer_type, dict(quantizer_options or {}))
        if self.quantizer.codebooks > 1:
            raise TokenloomError(
                f"ImageVQTokenizer needs one code a place, but {quantizer_type} gives {self.quantizer.codebooks}."
            )
        self.vocab_size = self.quantizer.codebook_size
        dim = self.quantizer.dim
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        self.encoder = _Trunk(self.patches, width, encoder_depth, heads)
        self.to_code = nn.Linear(width * merge * merge, dim)
        self.from_code = nn.Linear(dim, width * merge * merge)
        self.decoder = _Trunk(self.patches, width, decoder_depth, heads)
        self.paint = nn.Conv2d(width, 3 * patch * patch, 3, padding=1)
        self.unshuffle = nn.PixelShuffle(patch)

    @property
    def last_layer(self) -> Tensor:
        """The weight that paints pixels."""
        return self.paint.weight

    def features(self, pixels: Tensor) -> Tensor:
        """Continuous vectors (B, N, d) before quantization of pixels (B, 3, H, W)."""
        pixels = pixels.to(self.stem.weight.dtype)
        x = self.encoder(self.stem(pixels).flatten(2).transpose(1, 2))  # (B, P, D)
        side, merge = self.grid, self.merge
        x = x.unflatten(1, (side, merge, side, merge)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return self.to_code(x)

    def paint_vectors(self, z_q: Tensor, size: Size | None = None) -> Tensor:
        """Pixels (B, 3, H, W) of quantized vectors (B, N, d); not clamped."""
        side, merge = self.grid, self.merge
        x = self.from_code(z_q).unflatten(-1, (merge, merge, -1)).unflatten(1, (side, side))
        x = x.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)  # (B, P, D)
        x = self.decoder(x).transpose(1, 2).unflatten(2, (self.patches, self.patches))
        return self.unshuffle(self.paint(x))
