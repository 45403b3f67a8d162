"""Convolutional encoder and decoder of image tokenizers: residual blocks at falling and rising resolution.

Three published forms are built from the same parts. "taming" (Esser et al. 2021, as used by LlamaGen and VAR) has biases,
attention at the lowest resolution and strided convolutions; "flux" (as used by Infinity) is the same without attention;
"maskgit" (Chang et al. 2022) has none of the three. Knows feature maps;
knows nothing of codes, quantizers or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, unknown_name

_EPS = 1e-6


@dataclass(frozen=True)
class Form:
    """What distinguishes one published form from the other.

    Attributes:
        bias: Whether convolutions of residual blocks have biases.
        attention: Whether the lowest resolution has attention.
        strided: Whether resolution is halved by a convolution, padded below and to the right, instead of averaging.
        late_shortcut: Where a block changes its width: whether the skip connection projects the block's output
            instead of its input.
        extra_decoder_block: Whether the decoder has one block a level more than the encoder.
        wide_output: Whether the encoder ends with a 3x3 convolution instead of a 1x1.
        deep_middle: Whether the middle has as many blocks as a level of the encoder, instead of two.
    """

    bias: bool
    attention: bool
    strided: bool
    late_shortcut: bool
    extra_decoder_block: bool
    wide_output: bool
    deep_middle: bool


FORMS = {
    "taming": Form(True, True, True, False, True, True, False),
    "flux": Form(True, False, True, False, True, True, False),
    "maskgit": Form(False, False, False, True, False, False, True),
}


@dataclass(frozen=True)
class CNNConfig:
    """Shape of an encoder or decoder.

    Args:
        channels: Width at full resolution.
        multipliers: Width of every level as a multiple of `channels`, from full to lowest resolution.
        blocks: Residual blocks a level of the encoder.
        latent: Channels of the encoder's output and the decoder's input.
        groups: Groups of the group norms.
        form: A key of `FORMS`.
        patch: Side of the squares of pixels that the first convolution takes as channels, and the last one gives; above 1,
            full resolution means one place a square, which makes small networks several times cheaper.
    """

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 2
    latent: int = 64
    groups: int = 32
    form: str = "taming"
    patch: int = 1

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            TokenloomError: For sizes below 1, widths that the groups do not divide, or an unknown form.
        """
        if self.form not in FORMS:
            raise unknown_name("form of a convolutional tokenizer", self.form, FORMS)
        if (
            not self.multipliers
            or min(self.channels, self.blocks, self.latent, self.patch, *self.multipliers) < 1
        ):
            raise TokenloomError(
                "channels, blocks, latent, patch and every one of multipliers must be at least 1, got "
                f"{self.channels}, {self.blocks}, {self.latent}, {self.patch} and {list(self.multipliers)}."
            )
        odd = [width for width in self.widths if self.groups < 1 or width % self.groups]
        if odd:
            raise TokenloomError(
                f"Every width must be a multiple of groups={self.groups}, but {odd[0]} is not; pass fewer groups."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, from full to lowest resolution."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels per latent place and side."""
        return self.patch << (len(self.multipliers) - 1)


class ResidualBlock(nn.Module):
    """Norm, swish, 3x3 convolution, twice, with a skip connection: (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, width: int, out: int, groups: int, form: Form) -> None:
        super().__init__()
        self.late = form.late_shortcut
        self.norm1 = nn.GroupNorm(groups, width, eps=_EPS)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=form.bias)
        self.norm2 = nn.GroupNorm(groups, out, eps=_EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=form.bias)
        if width != out:
            self.shortcut = nn.Conv2d(out if self.late else width, out, 1, bias=form.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        if hasattr(self, "shortcut"):
            x = self.shortcut(y if self.late else x)
        return x + y


class SpatialAttention(nn.Module):
    """Attention with one head over all places of a feature map (B, C, H, W)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=_EPS)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, N, C)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """The blocks of one resolution and the step to the next.

    Args:
        widths: Channels in and out.
        count: Number of residual blocks.
        config: Shape of the network.
        attention: Whether each block is followed by attention.
        step: "down", "up" or "" (the last level).
    """

    def __init__(
        self, widths: tuple[int, int], count: int, config: CNNConfig, attention: bool, step: str
    ) -> None:
        super().__init__()
        form, (width, out) = FORMS[config.form], widths
        self.step, self.strided = step, form.strided
        inputs = [width] + [out] * (count - 1)
        self.blocks = nn.ModuleList(ResidualBlock(size, out, config.groups, form) for size in inputs)
        self.attentions = nn.ModuleList(
            SpatialAttention(out, config.groups) for _ in range(count if attention else 0)
        )
        if step == "up":
            self.resample = nn.Conv2d(out, out, 3, padding=1)
        elif step == "down" and form.strided:
            self.resample = nn.Conv2d(out, out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[index](x)
        if self.step == "up":
            return self.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        if self.step == "down":
            return self.resample(F.pad(x, (0, 1, 0, 1))) if self.strided else F.avg_pool2d(x, 2)
        return x


def _middle(width: int, config: CNNConfig) -> nn.Sequential:
    form = FORMS[config.form]
    count = config.blocks if form.deep_middle else 2
    first, *rest = (ResidualBlock(width, width, config.groups, form) for _ in range(count))
    attention = [SpatialAttention(width, config.groups)] if form.attention else []
    return nn.Sequential(first, *attention, *rest)


class CNNEncoder(nn.Module):
    """Pixels (B, 3, H, W) to a latent map (B, latent, H / stride, W / stride)."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        form, widths, last = FORMS[config.form], config.widths, len(config.widths) - 1
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.channels, 3, padding=1, bias=form.bias)
        self.levels = nn.ModuleList(
            Level(
                ((config.channels, *widths)[index], width),
                config.blocks,
                config,
                form.attention and index == last,
                "down" if index < last else "",
            )
            for index, width in enumerate(widths)
        )
        self.middle = _middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=_EPS)
        kernel = 3 if form.wide_output else 1
        self.conv_out = nn.Conv2d(widths[-1], config.latent, kernel, padding=kernel // 2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(pixels, self.patch))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class CNNDecoder(nn.Module):
    """A latent map (B, latent, h, w) to pixels (B, 3, h stride, w stride). Its levels begin at the lowest resolution."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        form, widths = FORMS[config.form], config.widths[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], config)
        self.levels = nn.ModuleList(
            Level(
                ((widths[0], *widths)[index], width),
                config.blocks + form.extra_decoder_block,
                config,
                form.attention and index == 0,
                "up" if index < last else "",
            )
            for index, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=_EPS)
        self.patch = config.patch
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latent))
        for level in self.levels:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)
