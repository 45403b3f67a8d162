"""Transformers behind one another, such as the encoder and the decoder of xAR, on rows of continuous tokens.

Each stage projects what comes in, adds a learned vector a row, and runs the shared `Transformer` with rotary tables of
its own head width. Knows row ids and coordinates; knows nothing of layouts, orders, noise or time.

Legend: B samples, n rows of a call, R rows of the plan, P prefix rows, C channels, D width, A axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.cache import Cache
from tokenloom.generators.transformer import Transformer, TransformerConfig
from tokenloom.layers import make_norm


class StageCaches:
    """One `Cache` a stage; they hold the same rows."""

    def __init__(self, parts: Sequence[Cache]) -> None:
        self.parts = list(parts)

    @property
    def length(self) -> int:
        """Committed rows."""
        return self.parts[0].length

    def commit(self, rows: int) -> None:
        """Keeps the first `rows` of the rows written last."""
        for part in self.parts:
            part.commit(rows)


class Stage(nn.Module):
    """A projection, learned places, optionally a norm, and a transformer.

    Args:
        channels: Width of what comes in.
        config: Shape of the transformer.
        coords: LongTensor (R, A), where each row of the plan stands.
        norm: Whether rows pass a norm with weights before the first block.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, channels: int, config: TransformerConfig, coords: Tensor, norm: bool) -> None:
        super().__init__()
        self.project = nn.Linear(channels, config.width)
        self.places = nn.Embedding(len(coords), config.width)
        nn.init.normal_(self.places.weight, std=0.02)
        self.norm = make_norm(config.norm, config.width, config.norm_eps, True) if norm else nn.Identity()
        self.transformer = Transformer(config)
        rope = self.transformer.rope(coords)
        if rope is not None:
            self.register_buffer("rope_cos", rope[0], persistent=False)
            self.register_buffer("rope_sin", rope[1], persistent=False)

    def forward(
        self, x: Tensor, rows: Tensor, mask: Tensor | None, cache: Cache | None, modulations: Sequence[Tensor]
    ) -> Tensor:
        """Hidden states (B, n, D) of projected rows (B, n, D) with row ids (n,)."""
        rope = (self.rope_cos[rows], self.rope_sin[rows]) if self.transformer.config.rope else None
        x = self.norm(x + self.places(rows))
        return self.transformer(x, rope=rope, mask=mask, cache=cache, modulations=modulations)[0]


class Stages(nn.Module):
    """All stages of a generator.

    Args:
        channels: Channels C of a token.
        configs: Shape of the transformer of each stage; all are modulated, by a condition of the width of the first.
        coords: LongTensor (R, A), where each row of the plan stands.

    Raises:
        TokenloomError: If a stage has no modulation, or several taps.
    """

    def __init__(self, channels: int, configs: Sequence[TransformerConfig], coords: Tensor) -> None:
        super().__init__()
        for config in configs:
            if config.modulation is None or config.final_modulation or len(config.taps) > 1:
                raise TokenloomError(
                    "Continuous tokens are told the time through adaLN: modulation must be 'own' or 'shared', without "
                    f"final_modulation and taps, got modulation {config.modulation!r}."
                )
        widths = [channels, *(config.width for config in configs)]
        self.parts = nn.ModuleList(
            Stage(inputs, config, coords, norm=index == 0)
            for index, (inputs, config) in enumerate(zip(widths, configs, strict=False))
        )

    def embed(self, tokens: Tensor, prefix: Tensor | None) -> Tensor:
        """Rows (B, n, D) of continuous tokens (B, t, C), behind prefix rows (B, P, D) where there are any."""
        rows = self.parts[0].get_submodule("project")(tokens)
        return rows if prefix is None else torch.cat((prefix.to(rows.dtype), rows), dim=1)

    def modulations(self, condition: Tensor, groups: Tensor | None = None) -> list[list[Tensor]]:
        """adaLN vectors of every block of every stage.

        Args:
            condition: (B, G, D) conditions.
            groups: LongTensor (n,), the condition of each row; `None` where G is 1 or the number of rows.

        Returns:
            A list a stage of tensors (B, G or n, 6, D), one a block.
        """
        every = []
        for part in self.parts:
            made = part.get_submodule("transformer").modulations(condition)  # type: ignore[operator]
            every.append(made if groups is None else [vectors[:, groups] for vectors in made])
        return every

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        *,
        mask: Tensor | None,
        cache: StageCaches | None = None,
        condition: Tensor | None = None,
        modulations: Sequence[Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Runs all stages on embedded rows.

        Args:
            x: (B, n, D) what `embed` returned.
            rows: LongTensor (n,) row ids.
            mask: Boolean, true where a row may look, as for `Transformer`.
            cache: What `new_cache` returned.
            condition: (B, n or 1, D) adaLN condition, needed without `modulations`.
            modulations: What `modulations` returned.

        Returns:
            One tensor (B, n, D of the last stage).
        """
        if modulations is None:
            if condition is None:
                raise TokenloomError(
                    "These transformers are modulated and need a condition or its modulations."
                )
            modulations = self.modulations(condition)
        for index, part in enumerate(self.parts):
            if index:
                x = part.get_submodule("project")(x)
            x = part(x, rows, mask, None if cache is None else cache.parts[index], modulations[index])
        return (x,)

    def new_cache(self, batch: int, rows: int) -> StageCaches:
        """An empty cache of every stage for `rows` rows."""
        return StageCaches([part.get_submodule("transformer").new_cache(batch, rows) for part in self.parts])  # type: ignore[operator]
