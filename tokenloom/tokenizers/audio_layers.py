"""Causal networks over sound: convolutions and attention that can be run piece by piece.

Every layer takes an optional `State`, a dictionary in which it keeps what its next piece needs of the pieces before. With a
state, pieces in a row give what the whole gives, up to rounding. Knows nothing of codes.

Legend: B batch, C channels, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.layers import Block, BlockConfig, rope_table

State = dict[nn.Module, Any]
"""What the layers keep between two pieces, by layer."""


class CausalConv1d(nn.Conv1d):
    """A convolution whose output at a place depends on no later input. L must be a multiple of the stride."""

    def __init__(self, before: int, after: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(before, after, kernel, stride=stride, dilation=dilation)
        self.past = (kernel - 1) * dilation + 1 - stride
        if self.past < 0:
            raise TokenloomError(f"A kernel of {kernel} leaves out input at stride {stride}; make it longer.")

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, C, L) to (B, C', L / stride)."""
        past = x.new_zeros(x.shape[0], x.shape[1], self.past) if state is None else state.get(self)
        past = x.new_zeros(x.shape[0], x.shape[1], self.past) if past is None else past
        x = torch.cat([past, x], dim=2)
        if state is not None:
            state[self] = x[:, :, x.shape[2] - self.past :]
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation)


class Upsample(nn.Module):
    """Makes `stride` positions of each, from it and the one before (a transposed convolution of twice the stride)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalConv1d(before, after * stride, 2)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, C, L) to (B, C', L stride)."""
        return self.conv(x, state).unflatten(1, (-1, self.stride)).transpose(2, 3).flatten(2)


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a learned frequency a a channel (Ziyin et al. 2020), good for periodic signals."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, L) to itself."""
        return x + (self.frequency * x).sin().square() / (self.frequency + 1e-9)


class Unit(nn.Module):
    """A residual unit: a dilated convolution and one of width 1."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.snake1, self.snake2 = Snake(channels), Snake(channels)
        self.conv1 = CausalConv1d(channels, channels, kernel, dilation=dilation)
        self.conv2 = CausalConv1d(channels, channels, 1)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, C, L) to itself."""
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x), state)), state)


class _Window:
    """Keys and values of the last positions of one block (a `KeyValueStore`)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All visible keys and values (B, h, l, d); those that the next piece may see are kept."""
        if self.kept is not None:
            keys, values = torch.cat([self.kept[0], keys], dim=2), torch.cat([self.kept[1], values], dim=2)
        start = max(0, keys.shape[2] - self.size)
        self.kept = keys[:, :, start:], values[:, :, start:]
        return keys, values


class CausalTransformer(nn.Module):
    """Blocks of attention in which a position sees itself and the window - 1 positions before it.

    Args:
        width: Channels C.
        depth: Blocks.
        heads: Heads, whose width must be even.
        window: Positions that a position sees.
    """

    def __init__(self, width: int, depth: int = 2, heads: int = 4, window: int = 100) -> None:
        super().__init__()
        if window < 1:
            raise TokenloomError(f"The window of a transformer is at least 1 position, got {window}.")
        self.window = window
        config = BlockConfig(width=width, heads=heads)
        self.head_width = config.head_size
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, C, L) to itself."""
        stores = [_Window(self.window - 1) for _ in self.blocks]
        done, stores = (0, stores) if state is None else state.get(self, (0, stores))
        count = x.shape[2]
        places = torch.arange(done, done + count, device=x.device)
        seen = torch.arange(done - min(done, self.window - 1), done + count, device=x.device)
        apart = places[:, None] - seen
        rope = rope_table(places[:, None], self.head_width)
        x = x.transpose(1, 2)
        for block, store in zip(self.blocks, stores, strict=True):
            x = block(x, rope=rope, mask=(apart >= 0) & (apart < self.window), store=store)
        if state is not None:
            state[self] = (done + count, stores)
        return x.transpose(1, 2)


def _transformer(width: int, options: dict[str, int] | None) -> CausalTransformer | None:
    if options is None:
        return None
    check_options(CausalTransformer, {"width": width, **options}, "option of the transformer")
    return CausalTransformer(width, **options)


class Shape:
    """Widths, strides and kernels that encoder and decoder share.

    Residual units stand behind every stride; at full rate, where they would cost most, there are none.

    Args:
        widths: Channels at full rate and behind each stride.
        strides: How many positions become one, level by level; their product is the samples a frame.
        kernel: Length of the kernels of the residual units.
        dilations: One residual unit each, behind every stride.
        latent: Channels of the frames.
        transformer: Options of the `CausalTransformer` at the frame rate; `None` = no such thing.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        kernel: int,
        dilations: Sequence[int],
        latent: int,
        transformer: dict[str, int] | None,
    ) -> None:
        if len(widths) != len(strides) + 1 or min(*widths, *strides, kernel, *dilations, latent) < 1:
            raise TokenloomError(
                f"widths must be one more than strides, and all of them at least 1; got widths {list(widths)}, strides "
                f"{list(strides)}, kernel {kernel}, dilations {list(dilations)}, latent channels {latent}."
            )
        self.widths, self.strides, self.kernel = tuple(widths), tuple(strides), kernel
        self.dilations, self.latent, self.transformer = tuple(dilations), latent, transformer

    def units(self, width: int) -> nn.ModuleList:
        """The residual units of one level."""
        return nn.ModuleList(Unit(width, self.kernel, dilation) for dilation in self.dilations)


class Encoder(nn.Module):
    """Samples to one vector a frame."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = shape.widths
        self.conv_in = CausalConv1d(1, widths[0], shape.kernel)
        self.snakes = nn.ModuleList(Snake(width) for width in widths)
        self.levels = nn.ModuleList(shape.units(width) for width in widths[1:])
        self.down = nn.ModuleList(
            CausalConv1d(before, after, 2 * stride, stride=stride)
            for before, after, stride in zip(widths[:-1], widths[1:], shape.strides, strict=True)
        )
        self.transformer = _transformer(widths[-1], shape.transformer)
        self.conv_out = CausalConv1d(widths[-1], shape.latent, 3)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, 1, S) to (B, latent, T)."""
        x = self.conv_in(x, state)
        for snake, down, units in zip(self.snakes, self.down, self.levels, strict=False):
            x = down(snake(x), state)
            for unit in units:  # type: ignore[attr-defined]
                x = unit(x, state)
        x = x if self.transformer is None else self.transformer(x, state)
        return self.conv_out(self.snakes[-1](x), state)


class Decoder(nn.Module):
    """One vector a frame to samples in (-1, 1); the mirror of `Encoder`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = shape.widths[::-1]
        self.conv_in = CausalConv1d(shape.latent, widths[0], 3)
        self.transformer = _transformer(widths[0], shape.transformer)
        self.snakes = nn.ModuleList(Snake(width) for width in widths)
        self.up = nn.ModuleList(
            Upsample(before, after, stride)
            for before, after, stride in zip(widths[:-1], widths[1:], shape.strides[::-1], strict=True)
        )
        self.levels = nn.ModuleList(shape.units(width) for width in widths[:-1])
        self.conv_out = CausalConv1d(widths[-1], 1, shape.kernel)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, latent, T) to (B, 1, S)."""
        x = self.conv_in(x, state)
        x = x if self.transformer is None else self.transformer(x, state)
        for units, snake, up in zip(self.levels, self.snakes, self.up, strict=False):
            for unit in units:  # type: ignore[attr-defined]
                x = unit(x, state)
            x = up(snake(x), state)
        return self.conv_out(self.snakes[-1](x), state).tanh()
