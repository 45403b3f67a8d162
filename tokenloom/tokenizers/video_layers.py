"""Layers of causal video networks that work on a whole clip or piece by piece with the same result.

Every layer takes a `State`: `None` for a whole clip, or a dictionary in which it keeps what it needs of the frames before.
The first piece of a clip is its first frame, plus whole strides; later pieces are whole strides. The network is that of
MAGVIT-v2 (Yu et al. 2023) as NBP's tokenizer has it (Ren et al. 2025). Knows maps of features. Knows nothing of codes.

Legend: B batch, C channels, T frames, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError

State = dict[nn.Module, Tensor]
"""What the layers keep between two pieces, by layer."""

Triple = tuple[int, int, int]


class CausalConv3d(nn.Conv3d):
    """A convolution whose output at a frame depends on no later one; edges and the first frame are repeated.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        kernel: Frames, rows and columns that it sees.
        stride: How many frames, rows and columns become one.
    """

    def __init__(
        self, before: int, after: int, kernel: Triple = (3, 3, 3), stride: Triple = (1, 1, 1)
    ) -> None:
        super().__init__(before, after, kernel, stride=stride)
        self.past = kernel[0] - stride[0]
        if self.past < 0:
            raise TokenloomError(
                f"A kernel of {kernel} leaves out frames at stride {stride}; make it longer."
            )

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, C, 1 + k t, H, W), or (B, C, k t, H, W) behind earlier pieces, to the same divided by the stride."""
        before = None if state is None else state.get(self)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, self.kernel_size[0] - 1, -1, -1)
        x = torch.cat([before, x], dim=2)
        if state is not None:
            state[self] = x[:, :, x.shape[2] - self.past :].clone()
        rows, columns = self.kernel_size[1] // 2, self.kernel_size[2] // 2
        padded = F.pad(x, (columns, columns, rows, rows, 0, 0), mode="replicate")
        return F.conv3d(padded, self.weight, self.bias, self.stride)


class FrameNorm(nn.GroupNorm):
    """A group norm of each frame by itself, so that no frame sees another."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to itself."""
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Swish(nn.Module):
    """x sigmoid(beta x) with a learned beta a channel (Ramachandran et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to itself."""
        return x * (self.beta * x).sigmoid()


class VideoUnit(nn.Module):
    """Norm, swish, convolution, twice, with a skip connection: (B, C, T, H, W) to (B, C', T, H, W)."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.swish1 = FrameNorm(groups, before), Swish(before)
        self.conv1 = CausalConv3d(before, after)
        self.norm2, self.swish2 = FrameNorm(groups, after), Swish(after)
        self.conv2 = CausalConv3d(after, after)
        if before != after:
            self.shortcut = CausalConv3d(before, after, (1, 1, 1))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T, H, W)."""
        y = self.conv1(self.swish1(self.norm1(x)), state)
        y = self.conv2(self.swish2(self.norm2(y)), state)
        return y + (self.shortcut(x, state) if hasattr(self, "shortcut") else x)


class Upsample3d(nn.Module):
    """Makes a box of places of each: a convolution to so many channels, which are then spread out.

    Of the first frame of a clip one frame is made, its last, so that t frames become 1 + (t - 1) k.
    """

    def __init__(self, channels: int, stride: Triple, kernel: Triple) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(channels, channels * math.prod(stride), kernel)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, C, t, h, w) to (B, C, 1 + (t - 1) k, h i, w j) for the stride (k, i, j); t k frames in later pieces."""
        started = state is not None and self in state
        if state is not None:
            state[self] = x.new_zeros(0)
        x = self.conv(x, state).unflatten(1, (*self.stride, -1))  # (B, k, i, j, C, t, h, w)
        x = x.permute(0, 4, 5, 1, 6, 2, 7, 3).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x if started else x[:, :, self.stride[0] - 1 :]


class VideoShape:
    """Widths, strides and depths that encoder and decoder share.

    Args:
        patch: Side of the squares of pixels that are one place at full resolution.
        widths: Channels of every level, from full to lowest resolution.
        strides: (frames, rows, columns) that become one behind every level but the last.
        blocks: Residual units of every level.
        groups: Groups of the norms.
        up_kernel: Side of the kernels in front of upsampling, 1 or 3.
        latent: Channels of the encoder's output and the decoder's input.

    Raises:
        TokenloomError: For sizes below 1, lists of different lengths, or widths that the groups do not divide.
    """

    def __init__(
        self,
        patch: int,
        widths: Sequence[int],
        strides: Sequence[Sequence[int]],
        blocks: Sequence[int],
        groups: int,
        up_kernel: int,
        latent: int,
    ) -> None:
        fits = len(widths) == len(blocks) == len(strides) + 1 and all(len(one) == 3 for one in strides)
        if not fits or min(patch, groups, latent, *widths, *blocks, *(min(one) for one in strides)) < 1:
            raise TokenloomError(
                "Expected one width and one number of blocks a level, and (frames, rows, columns) between two levels, all "
                f"at least 1; got widths {list(widths)}, blocks {list(blocks)}, strides {[list(one) for one in strides]}, "
                f"patch {patch}, groups {groups}."
            )
        if max((one[0] for one in strides), default=1) > 3:
            raise TokenloomError(f"A level halves or thirds the frames at most, got strides {list(strides)}.")
        if odd := [width for width in widths if width % groups]:
            raise TokenloomError(
                f"Every width must be a multiple of norm_groups={groups}, but {odd[0]} is not; pass fewer groups."
            )
        if up_kernel not in (1, 3):
            raise TokenloomError(f"up_kernel is 1 or 3, got {up_kernel!r}.")
        self.patch, self.groups, self.latent = patch, groups, latent
        self.widths, self.blocks = tuple(widths), tuple(blocks)
        self.strides: list[Triple] = [(one[0], one[1], one[2]) for one in strides]
        self.up_kernel: Triple = (up_kernel, up_kernel, up_kernel)

    @property
    def stride(self) -> Triple:
        """Frames, rows and columns of pixels a place of the lowest level."""
        frames, rows, columns = (math.prod(one[axis] for one in self.strides) for axis in range(3))
        return frames, rows * self.patch, columns * self.patch

    def units(self, before: int, level: int) -> nn.ModuleList:
        """The residual units of a level behind a map of `before` channels."""
        width = self.widths[level]
        inputs = [before] + [width] * (self.blocks[level] - 1)
        return nn.ModuleList(VideoUnit(size, width, self.groups) for size in inputs)


class VideoEncoder(nn.Module):
    """Pixels (B, 3, T, H, W) to a latent map (B, latent, t, h, w)."""

    def __init__(self, shape: VideoShape) -> None:
        super().__init__()
        widths = shape.widths
        self.unshuffle = nn.PixelUnshuffle(shape.patch)
        self.conv_in = CausalConv3d(3 * shape.patch**2, widths[0])
        self.levels = nn.ModuleList(
            shape.units(before, level) for level, before in enumerate((widths[0], *widths[:-1]))
        )
        self.down = nn.ModuleList(
            CausalConv3d(width, width, stride=stride)
            for width, stride in zip(widths[:-1], shape.strides, strict=True)
        )
        self.norm_out, self.swish_out = FrameNorm(shape.groups, widths[-1]), Swish(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], shape.latent, (1, 1, 1))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, 3, T, H, W) to (B, latent, t, h, w)."""
        x = self.unshuffle(x.transpose(1, 2)).transpose(1, 2)
        x = self.conv_in(x, state)
        for level, units in enumerate(self.levels):
            for unit in units:  # type: ignore[attr-defined]
                x = unit(x, state)
            if level < len(self.down):
                x = self.down[level](x, state)
        return self.conv_out(self.swish_out(self.norm_out(x)), state)


class VideoDecoder(nn.Module):
    """A latent map (B, latent, t, h, w) to pixels (B, 3, T, H, W). Its levels begin at the lowest resolution."""

    def __init__(self, shape: VideoShape) -> None:
        super().__init__()
        widths, last = shape.widths[::-1], len(shape.widths) - 1
        self.conv_in = CausalConv3d(shape.latent, widths[0])
        self.levels = nn.ModuleList(
            shape.units(before, last - level) for level, before in enumerate((widths[0], *widths[:-1]))
        )
        self.up = nn.ModuleList(
            Upsample3d(width, stride, shape.up_kernel)
            for width, stride in zip(widths[:-1], shape.strides[::-1], strict=True)
        )
        self.norm_out, self.swish_out = FrameNorm(shape.groups, widths[-1]), Swish(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3 * shape.patch**2)
        self.shuffle = nn.PixelShuffle(shape.patch)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Maps (B, latent, t, h, w) to (B, 3, T, H, W)."""
        x = self.conv_in(x, state)
        for level, units in enumerate(self.levels):
            for unit in units:  # type: ignore[attr-defined]
                x = unit(x, state)
            if level < len(self.up):
                x = self.up[level](x, state)
        x = self.conv_out(self.swish_out(self.norm_out(x)), state)
        return self.shuffle(x.transpose(1, 2)).transpose(1, 2)
