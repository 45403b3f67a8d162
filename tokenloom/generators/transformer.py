"""The one transformer behind every generator.

A stack of `tokenloom.layers.Block` with optional learned positions, adaLN conditions, cross-attention and several
tapped outputs. It sees embeddings, a mask or a cache, and rotary tables; it knows nothing of codes, layouts, orders or
which published model it holds. Shapes: B batch, n rows of this call, L visible rows, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.cache import Cache
from tokenloom.layers import Block, BlockConfig, make_norm, rope_table


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """Shape of the whole stack; the fields of `BlockConfig` describe one block.

    Attributes:
        depth: Number of blocks.
        taps: Depths whose hidden states are returned, each through its own final norm; empty means (depth,).
        final_norm: Whether tapped states pass a norm (with weights unless `final_modulation`).
        final_norm_affine: Whether the final norm has weights; `None` means as `norm_affine`.
        final_modulation: Whether the final norm is modulated by the condition (adaLN before the head, as VAR).
        rope: Whether queries and keys are rotated.
        rope_base: Base of the rotary frequencies.
        learned_positions: Rows of a learned position table added to the input; 0 for none.
        context_width: Width of the context of cross-attention; `None` means D.
    """

    depth: int
    taps: tuple[int, ...] = ()
    final_norm: bool = True
    final_norm_affine: bool | None = None
    final_modulation: bool = False
    rope: bool = True
    rope_base: float = 10000.0
    learned_positions: int = 0
    context_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "taps", tuple(self.taps) or (self.depth,))
        if self.depth < 1 or any(not 1 <= tap <= self.depth for tap in self.taps):
            raise TokenloomError(f"taps {self.taps} must lie in 1..depth, got depth {self.depth}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """Builds a config from JSON values; unknown keys are errors with the closest match."""
        known = {item.name for item in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise unknown_name("transformer option", key, known)
        missing = [key for key in ("width", "heads", "depth") if key not in values]
        if missing:
            raise TokenloomError(f"The transformer options lack {', '.join(missing)}.")
        options: dict[str, Any] = dict(values)
        return cls(**options)


class Transformer(nn.Module):
    """A pre-norm transformer over embeddings.

    Set `cache_dtype` to keep keys and values in another number format than the weights, for instance torch.bfloat16: half the
    memory, and another model by a little.

    Args:
        config: Shape and flavour.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.cache_dtype: torch.dtype | None = None  # of keys and values; None: as the weights
        width = config.width
        self.blocks = nn.ModuleList(Block(config, config.context_width) for _ in range(config.depth))
        affine = config.norm_affine if config.final_norm_affine is None else config.final_norm_affine
        affine = affine and not config.final_modulation
        self.norms = nn.ModuleList(
            make_norm(config.norm, width, config.norm_eps, affine) if config.final_norm else nn.Identity()
            for _ in config.taps
        )
        if config.learned_positions:
            self.positions = nn.Embedding(config.learned_positions, width)
        condition_width = config.condition_width or width
        if config.modulation == "shared":
            self.modulation = nn.Linear(condition_width, 6 * width)
        if config.final_modulation:
            self.final_modulation = nn.Linear(condition_width, 2 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) weights; residual outputs scaled by 1 / sqrt(2 depth); modulations start at zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if name.endswith((".out", ".down")):
                    nn.init.normal_(module.weight, std=0.02 / (2 * self.config.depth) ** 0.5)
                if "modulation" in name:
                    nn.init.zeros_(module.weight)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def rope(self, coords: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary tables (R, d / 2) of row coordinates (R, A), or `None` for a model without."""
        if not self.config.rope:
            return None
        return rope_table(coords, self.config.head_size, self.config.rope_base)

    def modulations(self, condition: Tensor | None) -> list[Tensor | None]:
        """Per-block modulation (B, n or 1, 6, D) of a condition (B, n or 1, C); computed once a generation."""
        kind = self.config.modulation
        if kind is None:
            return [None] * len(self.blocks)
        if condition is None:
            raise TokenloomError(f"This transformer is modulated ({kind} adaLN) and needs a condition.")
        active = nn.functional.silu(condition)
        if kind == "own":
            own = [block.get_submodule("modulation") for block in self.blocks]
            return [project(active).unflatten(-1, (6, -1)) for project in own]
        shared = self.modulation(active).unflatten(-1, (6, -1))
        return [shared + block.get_parameter("modulation_offset") for block in self.blocks]

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        condition: Tensor | None = None,
        modulations: Sequence[Tensor | None] | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Runs the stack.

        Args:
            x: (B, n, D) embeddings.
            position_ids: (n,) rows of the learned position table.
            rope: Rotary tables of these rows.
            mask: Boolean, true where a row may look, broadcastable to (B, heads, n, L); `None` = everywhere.
            cache: Keys and values of earlier rows; the rows of this call are written behind them.
            condition: (B, n or 1, C) adaLN condition.
            modulations: What `modulations(condition)` returned, to save its cost.
            context: (B, T, C) for cross-attention.
            context_mask: Boolean, broadcastable to (B, heads, n, T).

        Returns:
            One (B, n, D) tensor a tap.
        """
        if self.config.learned_positions and position_ids is not None:
            x = x + self.positions(position_ids)
        if modulations is None:
            modulations = self.modulations(condition)
        tapped: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = block(
                x,
                rope=rope,
                mask=mask,
                store=None if cache is None else cache.layers[index],
                modulation=modulations[index],
                context=context,
                context_mask=context_mask,
            )
            tapped[index + 1] = x
        return tuple(
            self._finish(norm(tapped[tap]), condition)
            for tap, norm in zip(self.config.taps, self.norms, strict=True)
        )

    def _finish(self, hidden: Tensor, condition: Tensor | None) -> Tensor:
        if not self.config.final_modulation:
            return hidden
        if condition is None:
            raise TokenloomError("This transformer modulates its final norm and needs a condition.")
        scale, shift = self.final_modulation(nn.functional.silu(condition)).chunk(2, dim=-1)
        return hidden * (1 + scale) + shift

    def new_cache(self, batch: int, rows: int) -> Cache:
        """An empty cache for `rows` rows on the device of the weights, in `cache_dtype` or their dtype."""
        weight, config = self.blocks[0].get_parameter("attention.out.weight"), self.config
        kind = weight.device.type
        dtype = self.cache_dtype or weight.dtype
        if self.cache_dtype is None and kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return Cache(config.depth, batch, config.num_kv_heads, rows, config.head_size, weight.device, dtype)
