"""The bidirectional encoder and decoder of masked latent prediction (MAE, He et al. 2022; MAR, Li et al. 2024).

The encoder sees the condition, repeated over some rows, and the tokens that are not hidden; the decoder sees what the
encoder made of them and a learned vector at every hidden place. Where an order has several steps (Hi-MAR), each step has
its own projection, positions and mask vectors, and a small modulation tells the shared blocks which step it is; tokens
of earlier steps arrive as features. Knows nothing of diffusion, noise, visits or sampling.

Legend: B samples, N positions, C channels, P prefix rows, R = P + N rows, D encoder width, E decoder width, S steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.generators.orders import Order
from tokenloom.generators.transformer import Transformer, TransformerConfig
from tokenloom.layers import make_norm


class StageModulation(nn.Module):
    """Scales and gates of every block of a transformer, for each step: one projection, and a learned line a block.

    Args:
        stages: Number of steps S.
        depth: Number of blocks.
        width: Width D.
    """

    def __init__(self, stages: int, depth: int, width: int) -> None:
        super().__init__()
        self.table, self.project = nn.Embedding(stages, width), nn.Linear(width, 4 * width)
        nn.init.normal_(self.table.weight, std=0.02)
        gates = torch.cat((torch.zeros(width), torch.ones(width))).repeat(2).expand(stages, 1, 1, -1)
        self.slopes = nn.ParameterList(torch.zeros(stages, 1, 1, 4 * width) for _ in range(depth))
        self.offsets = nn.ParameterList(gates.clone() for _ in range(depth))

    def forward(self, stage: int) -> list[Tensor]:
        """The modulation (1, 1, 6, D) of every block."""
        base = self.project(F.silu(self.table.weight[stage]))
        modulations = []
        for slope, offset in zip(self.slopes, self.offsets, strict=True):
            scale1, gate1, scale2, gate2 = (base * slope[stage] + offset[stage]).chunk(4, dim=-1)
            none = torch.zeros_like(scale1)
            modulations.append(torch.stack((gate1, gate2, scale1, scale2, none, none), dim=-2))
        return modulations


class MaskedAutoencoder(nn.Module):
    """Features of every position from the tokens that are not hidden.

    Args:
        order: The order; its steps are made one after the other.
        channels: Channels C.
        prefix: Prefix rows P.
        encoder: Shape of the encoder.
        decoder: Shape of the decoder.
    """

    step: Tensor

    def __init__(
        self,
        order: Order,
        channels: int,
        prefix: int,
        encoder: TransformerConfig,
        decoder: TransformerConfig,
    ) -> None:
        super().__init__()
        size, stages = order.layout.size, order.num_steps
        width, out = encoder.width, decoder.width
        self.stages, self.prefix = stages, prefix
        self.register_buffer("step", order.step.clone(), persistent=False)
        self.embeds = nn.ModuleList(nn.Linear(channels, width) for _ in range(stages))
        self.encoder_places = nn.Parameter(torch.randn(stages, prefix + size, width) * 0.02)
        self.norm = make_norm("layer", width, 1e-6, True)
        self.encoder, self.decoder = Transformer(encoder), Transformer(decoder)
        self.bridge = nn.Linear(width, out)
        self.mask = nn.Parameter(torch.randn(stages, 1 if stages == 1 else size, out) * 0.02)
        self.decoder_places = nn.Parameter(torch.randn(stages, prefix + size, out) * 0.02)
        self.places = nn.Parameter(torch.randn(size, out) * 0.02)
        if stages > 1:
            self.contexts = nn.ModuleList(nn.Linear(out, width) for _ in range(stages - 1))
            early = size - int((order.step == stages - 1).sum())
            self.absent = nn.Parameter(torch.randn(early, channels) * 0.02)
            self.encoder_stages = StageModulation(stages, encoder.depth, width)
            self.decoder_stages = StageModulation(stages, decoder.depth, out)

    def _tokens(self, latents: Tensor, stage: int, context: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rows (B, N, D) of all tokens at a stage."""
        rows = torch.zeros(
            *latents.shape[:2], self.bridge.in_features, dtype=latents.dtype, device=latents.device
        )
        for index, embed in enumerate(self.embeds):
            own = self.step == index
            tokens = embed(latents[:, own])
            if context is not None and index < stage:
                features, made = context
                lacking = embed(self.absent[self.step[self.step < self.stages - 1] == index])
                tokens = torch.where(made[:, own, None], self.contexts[index](features[:, own]), lacking)
            rows[:, own] = tokens.to(rows.dtype)
        return rows

    def _told(self, side: Transformer, prefix: Tensor, stage: int) -> dict[str, Any]:
        """What modulates the blocks of a side: the condition (adaLN), and the step where there are several."""
        settings = side.config
        adaptive = settings.modulation or settings.final_modulation
        condition = prefix.mean(1, keepdim=True) if adaptive else None
        if self.stages == 1:
            return {"condition": condition}
        of_step = (self.encoder_stages if side is self.encoder else self.decoder_stages)(stage)
        own = side.modulations(condition)
        both = [step if mine is None else step + mine for step, mine in zip(of_step, own, strict=True)]
        return {"condition": condition, "modulations": both}

    def _encode(self, x: Tensor, hidden: Tensor, prefix: Tensor, stage: int, dense: bool) -> Tensor:
        """The encoder over rows (B, R, D) that are not hidden; other rows come back with no meaning.

        `dense` runs all rows and hides keys by a mask; otherwise hidden rows are left out, which costs less and gives the
        same: samples with fewer rows than others are padded.
        """
        told = self._told(self.encoder, prefix, stage)
        if dense:
            return self.encoder(x, mask=~hidden[:, None, None], **told)[0]
        count = int((~hidden).sum(1).max())
        index = hidden.long().argsort(dim=1, stable=True)[:, :count]
        padding = hidden.gather(1, index)
        index = index[..., None].expand(-1, -1, x.shape[-1])
        mask = ~padding[:, None, None] if bool(padding.any()) else None
        shown = self.encoder(x.gather(1, index), mask=mask, **told)[0]
        return torch.zeros_like(x).scatter(1, index, shown.to(x.dtype))

    def forward(
        self,
        latents: Tensor,
        prefix: Tensor,
        hidden: Tensor,
        stage: int = 0,
        context: tuple[Tensor, Tensor] | None = None,
        dense: bool = False,
    ) -> Tensor:
        """Features of all positions.

        Args:
            latents: (B, N, C) in layout order.
            prefix: Condition rows (B, P, D).
            hidden: BoolTensor (B, N), the tokens that are not seen.
            stage: The step of the order that is being made.
            context: Features (B, N, E) of the tokens of earlier steps, and BoolTensor (B, N) where there are some; a
                learned token stands for the others. `None`: the tokens themselves.
            dense: Whether hidden rows run through the encoder (where nobody sees them) instead of being left out.

        Returns:
            (B, N, E).
        """
        x = torch.cat((prefix, self._tokens(latents, stage, context)), dim=1) + self.encoder_places[stage]
        covered = F.pad(hidden, (self.prefix, 0))
        seen = self.bridge(self._encode(self.norm(x), covered, prefix, stage, dense))
        mask = F.pad(self.mask[stage].expand(hidden.shape[1], -1), (0, 0, self.prefix, 0))
        x = torch.where(covered[..., None], mask, seen) + self.decoder_places[stage]
        out = self.decoder(x, **self._told(self.decoder, prefix, stage))[0]
        return out[:, self.prefix :] + self.places
