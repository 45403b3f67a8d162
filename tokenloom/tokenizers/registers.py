"""The transformers of one-dimensional tokenizers: a few learned registers read a picture, and paint it again.

The encoder puts K registers after the patches and keeps what they have become; the decoder puts the K vectors after one
mask token a patch and keeps what those have become (TiTok, Yu et al. 2024). With causal registers (HiMTok) a register sees
the patches and earlier registers, and patches see no register, so that the first vectors do not depend on how many follow.

Knows patches, registers and text features; knows nothing of codes, losses or files. Shapes: B batch, K registers, D width,
G patches a side, d width of a register's vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.layers import Block, BlockConfig


@dataclass(frozen=True)
class RegisterConfig:
    """Shape of one of the two transformers.

    Attributes:
        width: Model width D.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Pixels of a patch and side.
        mlp_width: Hidden width of the MLPs; `None` means 4 D.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    patch: int = 8
    mlp_width: int | None = None

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            TokenloomError: For sizes below 1.
        """
        if min(self.width, self.depth, self.heads, self.patch) < 1:
            raise TokenloomError(
                f"width, depth, heads and patch must be at least 1, got {self.width}, {self.depth}, {self.heads} and "
                f"{self.patch}."
            )

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, kind: str) -> RegisterConfig:
        """A configuration of keyword options; unknown ones are errors that say `kind`."""
        check_options(cls, options or {}, kind)
        return cls(**(options or {}))

    def grid(self, size: int) -> int:
        """Patches a side of a picture of `size` pixels.

        Raises:
            TokenloomError: If the patches do not fill the picture.
        """
        if size < 1 or size % self.patch:
            raise TokenloomError(f"The picture's side {size} must be a multiple of the patch, {self.patch}.")
        return size // self.patch

    def blocks(self) -> nn.ModuleList:
        """The blocks: pre-norm, GELU, biases everywhere."""
        config = BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp="gelu",
            mlp_width=self.mlp_width,
            norm="layer",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
        )
        return nn.ModuleList(Block(config) for _ in range(self.depth))


def causal_registers(patches: int, registers: int) -> Tensor:
    """BoolTensor (patches + registers,) squared: patches see patches, registers see patches and earlier registers."""
    seen = torch.ones(patches + registers, patches + registers, dtype=torch.bool).tril()
    seen[:, :patches] = True
    return seen


def keep_first(x: Tensor, kept: Tensor | None) -> Tensor:
    """Sets to zero what stands behind the first `kept` (B,) of the K vectors of each sample of x (B, K, D)."""
    if kept is None:
        return x
    places = torch.arange(x.shape[1], device=x.device)
    return x * (places < kept[:, None].to(x.device))[..., None]


def _learned(config: RegisterConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, config.width) * config.width**-0.5)


class RegisterEncoder(nn.Module):
    """Pixels (B, C, G patch, G patch) to the vectors (B, K, d) of K registers.

    Args:
        config: Shape of the transformer.
        grid: Patches a side G.
        registers: K.
        out: Width d of a vector.
        channels: Channels of the picture C.
        causal: Whether registers see only earlier registers, and patches none.
        scrambled: Whether the hidden states are read as if channels came before registers, as in the first TiTok
            models. Each vector then mixes all registers, so it undoes what `causal` is for.
    """

    visible: Tensor | None

    def __init__(
        self,
        config: RegisterConfig,
        grid: int,
        registers: int,
        out: int,
        channels: int = 3,
        causal: bool = False,
        scrambled: bool = False,
    ) -> None:
        super().__init__()
        if registers < 1:
            raise TokenloomError(f"There must be at least 1 register, got {registers}.")
        self.scrambled, self.count = scrambled, registers
        self.patch_embed = nn.Conv2d(channels, config.width, config.patch, stride=config.patch)
        self.class_token = _learned(config, 1)
        self.positions = _learned(config, grid * grid + 1)
        self.registers = _learned(config, registers)
        self.register_positions = _learned(config, registers)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = config.blocks()
        self.norm_out = nn.LayerNorm(config.width)
        self.head = nn.Conv2d(config.width, out, 1)
        visible = causal_registers(grid * grid + 1, registers) if causal else None
        self.register_buffer("visible", visible, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        batch = pixels.shape[0]
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        patches = torch.cat([self.class_token.expand(batch, 1, -1), patches], dim=1) + self.positions
        registers = (self.registers + self.register_positions).expand(batch, -1, -1)
        x = self.norm_in(torch.cat([patches, registers], dim=1))
        for block in self.blocks:
            x = block(x, mask=self.visible)
        x = self.norm_out(x[:, -self.count :])
        channels = x.reshape(batch, -1, self.count) if self.scrambled else x.transpose(1, 2)  # (B, D, K)
        return self.head(channels[:, :, None]).squeeze(2).transpose(1, 2)


class RegisterDecoder(nn.Module):
    """Vectors (B, n <= K, d) to a map (B, out, ...), by way of one mask token a patch.

    Args:
        config: Shape of the transformer.
        grid: Patches a side G.
        registers: K.
        dim: Width d of a vector.
        head: What makes the map of hidden states (B, D, G, G).
        text_features: Width of text features; 0 = the decoder takes no text.
        text_length: Text features a sample.
    """

    def __init__(
        self,
        config: RegisterConfig,
        grid: int,
        registers: int,
        dim: int,
        head: nn.Module,
        text_features: int = 0,
        text_length: int = 0,
    ) -> None:
        super().__init__()
        self.grid, self.count = grid, registers
        self.embed = nn.Linear(dim, config.width)
        self.class_token = _learned(config, 1)
        self.positions = _learned(config, grid * grid + 1)
        self.mask_token = _learned(config, 1, 1)
        self.register_positions = _learned(config, registers)
        if text_features:
            self.text_embed = nn.Linear(text_features, config.width)
            self.text_positions = _learned(config, text_length)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = config.blocks()
        self.norm_out = nn.LayerNorm(config.width)
        self.head = head

    def forward(self, z: Tensor, kept: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Paints.

        Args:
            z: (B, n, d) vectors, n <= K; the missing ones count as dropped.
            kept: LongTensor (B,) of how many vectors of each sample to keep; `None` = all. A dropped vector leaves only
                its position.
            text: (B, T, text_features), or `None` for no text.
        """
        batch, patches = z.shape[0], self.grid * self.grid
        x = keep_first(self.embed(z), kept)
        x = F.pad(x, (0, 0, 0, self.count - x.shape[1])) + self.register_positions
        masks = self.mask_token.expand(batch, patches, -1)
        masks = torch.cat([self.class_token.expand(batch, 1, -1), masks], dim=1) + self.positions
        parts = [masks, x]
        if text is not None:
            parts.append(self.text_embed(text) + self.text_positions)
        x = self.norm_in(torch.cat(parts, dim=1))
        for block in self.blocks:
            x = block(x)
        x = self.norm_out(x[:, 1 : 1 + patches])
        return self.head(x.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


class PixelHead(nn.Module):
    """Hidden states (B, D, G, G) to a picture (B, C, G patch, G patch); a 3x3 convolution makes patches meet."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.to_pixels = nn.Conv2d(width, patch * patch * channels, 1)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_pixels(x).unflatten(1, (self.patch, self.patch, self.channels))
        return self.smooth(x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3))


class FeatureHead(nn.Sequential):
    """Hidden states (B, D, G, G) to features (B, C, G, G) for a convolutional decoder."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, channels, 1))
