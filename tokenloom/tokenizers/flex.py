"""Patches and registers: the encoder and the two decoders of flexible-length tokenizers (FlexTok, Bachmann et al. 2025).

The encoder lets a row of learned registers read a map of features; what the registers become is quantized. The decoder turns
registers back into the map, either as the velocity of a flow that starts at noise, or directly. Any number of registers from the
end may be missing: learned vectors stand for them. Knows maps, registers and times; knows nothing of codes, pictures or files.

Shapes: B batch, P patches, N registers, D width, C channels of the map, H and W its sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.layers import Block, BlockConfig, TimeEmbedding, make_norm
from tokenloom.tokenizers.registers import causal_registers

MASKS = ("registers", "full", "causal")
KINDS = ("flow", "direct")
_PERIOD = 256.0
_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Shape of the transformer of an encoder or decoder.

    Attributes:
        width: Width D.
        depth: Number of blocks.
        heads: Attention heads; the softmax scale is 8 / (D / heads), as in FlexTok.
        mlp_width: Hidden width of the gated MLPs; `None` means 8 D / 3, rounded down.
        mask: Who sees whom in a row of patches and then registers. "registers": patches see patches, a register sees
            all patches, itself and earlier registers. "full": everyone sees everyone. "causal": nobody sees what follows.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_width: int | None = None
    mask: str = "registers"

    def __post_init__(self) -> None:
        """Checks the sizes; raises `TokenloomError`."""
        if self.mask not in MASKS:
            raise unknown_name("mask", self.mask, MASKS)
        if min(self.width, self.depth, self.heads) < 1 or self.width % 4:
            raise TokenloomError(
                f"width, depth and heads must be at least 1 and width a multiple of 4, got {self.width}, {self.depth} and "
                f"{self.heads}."
            )

    @classmethod
    def of(cls, values: Mapping[str, Any] | None, kind: str) -> Any:
        """A configuration of keyword options; unknown ones are errors that say `kind`."""
        check_options(cls, values or {}, kind)
        return cls(**(values or {}))

    def blocks(self) -> list[Block]:
        """The blocks."""
        config = BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp="swiglu",
            mlp_width=self.mlp_width or 8 * self.width // 3,
            norm="layer",
            norm_affine=False,
            norm_eps=_EPS,
            qk_norm="layer",
            qk_norm_affine=False,
            attention_scale=8 * self.heads / self.width,
        )
        return [Block(config) for _ in range(self.depth)]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """Shape of a decoder.

    Attributes:
        kind: "flow": velocity of a noisy map. "direct": the map itself, by one pass without noise.
        positions: Whether registers have learned positions.
        null: Whether the vector that stands for "no condition" is learned; else it is zero.
        modulations: 1: the time modulates patches and registers alike. 2: each in its own way.
        head_modulation: Whether the time modulates the head as well.
        frequencies: Cosines and sines of the time.
        largest_time: Time of pure noise.
    """

    mask: str = "full"
    kind: str = "flow"
    positions: bool = True
    null: bool = True
    modulations: int = 2
    head_modulation: bool = True
    frequencies: int = 256
    largest_time: float = 1.0

    def __post_init__(self) -> None:
        """Checks the sizes; raises `TokenloomError`."""
        super().__post_init__()
        if self.kind not in KINDS:
            raise unknown_name("kind of decoder", self.kind, KINDS)
        if self.modulations not in (1, 2) or self.frequencies < 2 or self.largest_time <= 0:
            raise TokenloomError(
                "modulations must be 1 or 2, frequencies at least 2 and largest_time above 0, got "
                f"{self.modulations}, {self.frequencies} and {self.largest_time}."
            )


def to_patches(x: Tensor, patch: int) -> Tensor:
    """Patches (B, P, patch * patch * C), each row by row with channels last, of a map (B, C, H, W)."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_patches(x: Tensor, patch: int, rows: int) -> Tensor:
    """The map (B, C, H, W) of patches; the inverse of `to_patches`."""
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, -1))  # (B, rows, columns, patch, patch, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _waves(line: Tensor, width: int) -> Tensor:
    """Sines and cosines (..., width / 2) of places along an axis (as in MoCo v3)."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = line.double()[..., None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_table(side: int, width: int) -> Tensor:
    """Fixed positions (width, side, side): sines and cosines of the row, then of the column."""
    line = _waves(torch.arange(side), width).T  # (width / 2, side)
    return torch.cat(
        [line[:, :, None].expand(-1, side, side), line[:, None, :].expand(-1, side, side)]
    ).clone()


def spread_places(count: int, side: int) -> Tensor:
    """Places (count, 2), float64, in a square of side x side patches, whose first ones cover it already.

    They are the cells of an ordered dither (Bayer 1973): 4 fall into its quarters, 16 into its sixteenths, and so on.
    """
    levels = max(1, math.ceil(math.log(max(count, 2), 4) - 1e-9))
    number = torch.arange(count)
    places = torch.full((count, 2), 0.5**levels / 2, dtype=torch.float64)
    for level in range(levels):
        digit = number >> (2 * level) & 3  # 0: upper left, 1: lower right, 2: upper right, 3: lower left
        down, right = (digit == 1) | (digit == 3), (digit == 1) | (digit == 2)
        places += torch.stack([down, right], dim=1) * 0.5 ** (level + 1)
    return places * side - 0.5


def spread_registers(count: int, side: int, width: int) -> Tensor:
    """Vectors (count, width) with which registers begin: positions of places that cover the picture, coarse to fine.

    Registers that begin alike have to find places of their own first, which takes a small model longer than all the rest.
    """
    return _waves(spread_places(count, side), width).flatten(1)


def row_mask(kind: str, patches: int, registers: int) -> Tensor | None:
    """Boolean (P + N, P + N): whether row q sees row k, by a key of `MASKS`; `None` where everyone sees everyone."""
    if kind == "full":
        return None
    seen = causal_registers(patches, registers)
    return seen.tril() if kind == "causal" else seen


class _Rows(nn.Module):
    """What encoder and decoder share: embedded patches with positions, and blocks over patches and registers."""

    table: Tensor

    def __init__(self, config: StackConfig, inputs: int, patch: int, table: int) -> None:
        super().__init__()
        self.config, self.patch = config, patch
        if inputs:
            self.patches = nn.Linear(inputs, config.width)
        self.register_buffer("table", sincos_table(table, config.width))
        self.blocks = nn.ModuleList(config.blocks())
        self.norm = make_norm("layer", config.width, _EPS, False)

    def reset_parameters(self) -> None:
        """Xavier weights without biases; modulations start at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if "modulation" in name:
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def places(self, rows: int, columns: int) -> Tensor:
        """Positions (P, D) of a grid of patches.

        Raises:
            TokenloomError: For a grid that the table of positions does not hold.
        """
        most = self.table.shape[1]
        if max(rows, columns) > most:
            raise TokenloomError(
                f"This tokenizer has positions for {most}x{most} patches of {self.patch}, but the picture has "
                f"{rows}x{columns}; make it smaller, or cut it into tiles: reconstruct(picture, tile=...)."
            )
        return self.table[:, :rows, :columns].flatten(1).T

    def run(self, patches: Tensor, registers: Tensor, modulations: list[Tensor] | None = None) -> Tensor:
        """Rows (B, P + N, D) after the blocks, normalised."""
        x = torch.cat([patches, registers], dim=1)
        mask = row_mask(self.config.mask, patches.shape[1], registers.shape[1])
        mask = None if mask is None else mask.to(x.device)
        for index, block in enumerate(self.blocks):
            x = block(x, mask=mask, modulation=None if modulations is None else modulations[index])
        return self.norm(x)


class FlexEncoder(_Rows):
    """Maps (B, C, H, W) to vectors (B, N, dim) for a quantizer.

    Args:
        config: Shape of the transformer.
        channels: Channels C of the map.
        patch: Side of a patch.
        table: Rows and columns of patches for which there are positions.
        registers: Number N of registers.
        dim: Width of a vector.
    """

    def __init__(
        self, config: StackConfig, channels: int, patch: int, table: int, registers: int, dim: int
    ) -> None:
        super().__init__(config, channels * patch * patch, patch, table)
        self.registers = nn.Parameter(spread_registers(registers, table, config.width))
        self.head = nn.Linear(config.width, dim)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        patches = self.patches(to_patches(x.to(self.head.weight.dtype), self.patch))
        patches = patches + self.places(rows, columns)
        registers = self.registers.expand(len(x), -1, -1)
        return self.head(self.run(patches, registers)[:, patches.shape[1] :])


class FlexDecoder(_Rows):
    """Vectors (B, N, dim) to a map (B, C, H, W), or to the velocity of a noisy map.

    Args:
        config: Shape and kind.
        channels: Channels C of the map.
        patch: Side of a patch.
        table: Rows and columns of patches for which there are positions.
        registers: Number N of registers.
        dim: Width of a vector.
    """

    def __init__(
        self, config: DecoderConfig, channels: int, patch: int, table: int, registers: int, dim: int
    ) -> None:
        width, area = config.width, channels * patch * patch
        flow = config.kind == "flow"
        super().__init__(config, area if flow else 0, patch, table)
        self.shape = config
        self.flow, self.count = flow, registers
        self.from_code = nn.Linear(dim, width)
        self.missing = nn.Parameter(0.02 * torch.randn(width))
        if config.positions:
            self.positions = nn.Parameter(spread_registers(registers, table, width).T.contiguous())
        if not self.flow:
            self.canvas = nn.Parameter(0.02 * torch.randn(width))
            self.paint = nn.Conv2d(width, area, 3, padding=1)
            self.reset_parameters()
            return
        if config.null:
            self.null = nn.Parameter(0.02 * torch.randn(width))
        self.time = TimeEmbedding(width, config.frequencies, _PERIOD, 1000.0 / config.largest_time)
        self.modulations = nn.ModuleList(
            nn.Linear(width, config.modulations * 6 * width) for _ in range(config.depth)
        )
        if config.head_modulation:
            self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, area)
        self.reset_parameters()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that paints the map."""
        weight: nn.Parameter = (self.head if self.flow else self.paint).weight  # type: ignore[assignment]
        return weight

    def registers(self, z_q: Tensor, keep: Tensor | None, dropped: Tensor | None = None) -> Tensor:
        """Register rows (B, N, D).

        Args:
            z_q: (B, N, dim) quantized vectors.
            keep: LongTensor (B,): how many registers are there; `None`: all.
            dropped: Boolean (B,): samples without a condition; `None`: none.
        """
        x = self.from_code(z_q)
        if hasattr(self, "positions"):
            x = x + self.positions.T
        if keep is not None:
            there = torch.arange(x.shape[1], device=x.device) < keep[:, None]
            x = torch.where(there[:, :, None], x, self.missing)
        if dropped is not None:
            x = torch.where(dropped[:, None, None], self.no_registers(1), x)
        return x

    def no_registers(self, batch: int) -> Tensor:
        """Register rows (B, N, D) of samples without a condition."""
        null = self.null if hasattr(self, "null") else torch.zeros_like(self.missing)
        return null.expand(batch, self.count, -1)

    def paint_map(self, registers: Tensor, size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W) of register rows, by the direct decoder."""
        rows, columns = size[0] // self.patch, size[1] // self.patch
        patches = (self.canvas + self.places(rows, columns)).expand(len(registers), -1, -1)
        x = self.run(patches, registers)[:, : rows * columns]
        return F.pixel_shuffle(self.paint(x.transpose(1, 2).unflatten(2, (rows, columns))), self.patch)

    def velocity(self, noisy: Tensor, times: Tensor, registers: Tensor) -> Tensor:
        """Velocity (B, C, H, W), noise minus data, of a noisy map at times (B,), by the flow decoder."""
        rows, columns = noisy.shape[2] // self.patch, noisy.shape[3] // self.patch
        patches = self.patches(to_patches(noisy.to(self.head.weight.dtype), self.patch))
        patches = patches + self.places(rows, columns)
        active = F.silu(self.time(times))  # (B, D)
        counts = (patches.shape[1], registers.shape[1])
        x = self.run(patches, registers, [self._spread(layer(active), counts) for layer in self.modulations])
        x = x[:, : patches.shape[1]]
        if hasattr(self, "head_modulation"):
            shift, scale = self.head_modulation(active)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return from_patches(self.head(x), self.patch, rows)

    def _spread(self, modulation: Tensor, counts: tuple[int, int]) -> Tensor:
        """Modulation (B, 1 or P + N, 6, D) of a projected time (B, sets * 6 * D)."""
        sets = modulation.unflatten(1, (-1, 1, 6, self.config.width)).unbind(1)  # each (B, 1, 6, D)
        if len(sets) == 1:
            return sets[0]
        return torch.cat(
            [part.expand(-1, count, -1, -1) for part, count in zip(sets, counts, strict=True)], dim=1
        )
