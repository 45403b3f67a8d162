"""The three transformers of a tokenizer whose codes condition the steps of a diffusion (D-AR, Gao & Shou 2025).

`QueryEncoder` lets causal queries read a picture, `Conditioner` turns their quantized vectors into condition tokens, and
`StepPainter` is the velocity of a noisy picture given the few condition tokens of one step. Knows pictures, vectors and
times; knows nothing of codes, schedules or files.

Shapes: B batch, N queries, n condition tokens of a step, P patches, D width, d width of a code, H and W sides of a picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.layers import Attention, Block, BlockConfig, TimeEmbedding, make_norm, rope_table
from tokenloom.tokenizers.registers import causal_registers

_EPS = 1e-6
_LAYER_SCALE = 0.1  # at 0, where official training starts, no code would depend on the picture
_TICKS = 1000.0  # the unit of time of the embedding


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Shape of a transformer.

    Attributes:
        width: Width D.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_width: Hidden width of the MLPs; `None` means 4 D.
        rope_base: Base of the rotary frequencies of patches.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_width: int | None = None
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        """Checks the sizes; raises `TokenloomError`."""
        if min(self.width, self.heads) < 1 or self.depth < 0:
            raise TokenloomError(
                f"width and heads must be at least 1 and depth at least 0, got {self.width}, {self.heads} and {self.depth}."
            )

    @classmethod
    def of(cls, values: Mapping[str, Any] | None, kind: str) -> Any:
        """A configuration of keyword options; unknown ones are errors that say `kind`."""
        check_options(cls, values or {}, kind)
        return cls(**(values or {}))

    def block(self, **options: Any) -> BlockConfig:
        """The configuration of a block."""
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp="silu",
            mlp_width=self.mlp_width,
            norm="layer",
            norm_eps=_EPS,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            qk_norm="layer",
            **options,
        )

    def rope(self, rows: int, columns: int, others: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables (P + others, d / 2) of a grid of patches, and of rows behind them, which are not rotated."""
        places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
        coords = torch.cat([places, places.new_zeros(others, 2)])
        return rope_table(coords, self.width // self.heads, self.rope_base)


@dataclass(frozen=True, kw_only=True)
class QueryEncoderConfig(QueryConfig):
    """Shape of the encoder.

    Attributes:
        patch: Side of a patch in pixels.
        rank: Width of the learned queries before a projection to D; `None`: D, and no projection.
    """

    patch: int = 8
    rank: int | None = 8


@dataclass(frozen=True, kw_only=True)
class PainterConfig(QueryConfig):
    """Shape of the painter.

    Attributes:
        patch: Side of a patch in pixels.
        deviation: Standard deviation that pictures are scaled to before noise is added.
        shift: How much smaller steps are near noise, see `tokenloom.tokenizers.flow.make_levels`.
        shared_time: One embedding of the time for all blocks instead of one a block.
        modulated_head: Whether the time modulates the head; needs `shared_time`.
        align_layer: Block before which features are compared with those of another network (REPA, Yu et al. 2024).
        align_width: Hidden width of the perceptron that predicts these features; 0: none.
        align_features: Width of these features.
        align_grid: Rows of the grid of these features.
    """

    patch: int = 8
    deviation: float = 0.6
    shift: float = 2.0
    shared_time: bool = False
    modulated_head: bool = False
    align_layer: int = 0
    align_width: int = 0
    align_features: int = 768
    align_grid: int = 16

    def __post_init__(self) -> None:
        """Checks the sizes; raises `TokenloomError`."""
        super().__post_init__()
        if self.deviation <= 0 or self.shift <= 0:
            raise TokenloomError(
                f"deviation and shift must be above 0, got {self.deviation} and {self.shift}."
            )
        if self.modulated_head and not self.shared_time:
            raise TokenloomError(
                "modulated_head needs shared_time, because the head takes the time of all blocks."
            )


class QueryEncoder(nn.Module):
    """Pictures (B, 3, H, W) to vectors (B, N, d).

    Args:
        config: Shape.
        queries: Number N of queries in use.
        rows: Rows of the table of queries, at least N.
        dim: Width d of a vector.
    """

    def __init__(self, config: QueryEncoderConfig, queries: int, rows: int, dim: int) -> None:
        super().__init__()
        self.config, self.count = config, queries
        width, rank = config.width, config.rank
        self.patches = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.norm = make_norm("layer", width, _EPS, False)
        self.queries = nn.Parameter(torch.randn(rows, rank or width) * (1.0 if rank else 0.02))
        self.from_rank = nn.Linear(rank, width) if rank else nn.Identity()
        block = config.block(layer_scale=_LAYER_SCALE)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.depth))
        self.to_code = nn.Linear(width, dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels.to(self.to_code.weight.dtype))
        rows, columns = patches.shape[2:]
        patches = self.norm(patches.flatten(2).transpose(1, 2))
        queries = self.from_rank(self.queries[: self.count]).expand(len(pixels), -1, -1)
        x = torch.cat([patches, queries], dim=1)
        mask = causal_registers(rows * columns, self.count).to(x.device)
        rope = self.config.rope(rows, columns, self.count, x.device)
        for block in self.blocks:
            x = block(x, rope=rope, mask=mask)
        return self.to_code(self.norm(x[:, -self.count :]))


class Conditioner(nn.Module):
    """Vectors (B, k, d) of the first k codes to condition tokens (B, k, D); a token depends on none after it.

    Args:
        config: Shape.
        rows: Rows of the table of positions, at least the number of codes.
        dim: Width d of a vector.
    """

    def __init__(self, config: QueryConfig, rows: int, dim: int) -> None:
        super().__init__()
        self.from_code = nn.Linear(dim, config.width, bias=False)
        self.positions = nn.Parameter(0.02 * torch.randn(rows, config.width))
        block = config.block(layer_scale=_LAYER_SCALE)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.depth))
        self.norm = make_norm("layer", config.width, _EPS, False)

    def forward(self, z_q: Tensor) -> Tensor:
        count = z_q.shape[1]
        x = self.from_code(z_q.to(self.from_code.weight.dtype)) + self.positions[:count]
        mask = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)


class StepBlock(nn.Module):
    """Patches look at the condition tokens; what they see and the time modulate attention and MLP, place by place."""

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        width = config.width
        block = config.block(norm_affine=False, modulation="own")
        self.shared = config.shared_time
        if not self.shared:
            self.time = TimeEmbedding(width, width, scale=_TICKS)
        self.condition = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = make_norm("layer", width, _EPS, False)
        self.look = Attention(block, width)
        self.block = Block(block)

    def forward(self, x: Tensor, times: Tensor, tokens: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Maps patches (B, P, D), given times (B,), or their embedding (B, D) if shared, and tokens (B, n, D)."""
        time = times if self.shared else self.time(times)
        seen = self.look(self.norm(x), context=self.norm(self.condition(tokens)), rope=rope)
        modulation = self.block.modulation(F.silu(time[:, None] + seen)).unflatten(-1, (6, -1))
        return self.block(x, rope=rope, modulation=modulation)


class StepPainter(nn.Module):
    """Velocity, data minus noise, of noisy pictures (B, 3, H, W).

    Args:
        config: Shape.
        condition_width: Width of the condition tokens.
    """

    def __init__(self, config: PainterConfig, condition_width: int) -> None:
        super().__init__()
        self.config, width, area = config, config.width, 3 * config.patch**2
        self.from_condition = nn.Linear(condition_width, width)
        self.norm = make_norm("layer", width, _EPS, False)
        self.patches = nn.Linear(area, width)
        if config.shared_time:
            self.time = TimeEmbedding(width, width, scale=_TICKS)
        self.blocks = nn.ModuleList(StepBlock(config) for _ in range(config.depth))
        if config.modulated_head:
            self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, area)
        if config.align_width:
            sizes = (config.align_width, config.align_width, config.align_features)
            layers: list[nn.Module] = [nn.Linear(width, sizes[0])]
            for before, after in itertools.pairwise(sizes):
                layers += [nn.SiLU(), nn.Linear(before, after)]
            self.align = nn.Sequential(*layers)

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Velocity (B, 3, H, W), and features (B, places, align_features) if the painter predicts any.

        Args:
            noisy: (B, 3, H, W).
            times: (B,), 0 for noise, 1 for data.
            condition: (B, n, condition_width) tokens of this step.
        """
        dtype = self.head.weight.dtype
        tokens = self.norm(self.from_condition(condition.to(dtype)))
        patches = F.pixel_unshuffle(noisy.to(dtype), self.config.patch)
        rows, columns = patches.shape[2:]
        rope = self.config.rope(rows, columns, 0, noisy.device)
        x = self.patches(patches.flatten(2).transpose(1, 2))
        embedded = self.time(times) if self.config.shared_time else times
        features = None
        for index, block in enumerate(self.blocks):
            if index == self.config.align_layer and self.config.align_width:
                features = self._align(x, rows, columns)
            x = block(x, embedded, tokens, rope)
        x = self.norm(x)
        if self.config.modulated_head:
            shift, scale = self.head_modulation(F.silu(embedded))[:, None].chunk(2, dim=-1)
            x = self.norm(x) * (1 + scale) + shift
        painted = self.head(x).transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(painted, self.config.patch), features

    def _align(self, x: Tensor, rows: int, columns: int) -> Tensor:
        stride = max(1, rows // self.config.align_grid)
        pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (rows, columns)), stride)
        return self.align(pooled.flatten(2).transpose(1, 2))
