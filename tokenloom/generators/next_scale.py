"""Next-scale prediction: one whole map a step, from 1x1 to the full grid (VAR, Tian et al. 2024; MVAR, Zhang et al. 2025).

Mask: a row sees its own scale and all earlier ones (VAR), or its own scale alone, large scales through a window (MVAR).
Input: every position of a scale is fed what the earlier scales add up to, averaged to the size of this scale; the first
scale is fed the condition. Head: each row predicts the code at its own place. Steps: one a scale, 10 for 680 codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan, scale_plan
from tokenloom.layouts import Layout
from tokenloom.pyramid import Pyramid, ResidualPyramid


@dataclass(frozen=True)
class ScaleRule:
    """Settings of next-scale prediction.

    Attributes:
        channels: Length C of the tokenizer's code vectors.
        phis: Number of convolutions of its pyramid.
        ratio: Share of the convolution in phi.
        kernel: Side of the convolutions.
        own_scale: Whether a scale sees only its own rows (MVAR) instead of all earlier ones too (VAR).
        window: Side of the neighbourhood that rows of large scales see of their scale; 0 for all of it.
        window_from: First scale that has a window.
    """

    channels: int = 32
    phis: int = 4
    ratio: float = 0.5
    kernel: int = 3
    own_scale: bool = False
    window: int = 0
    window_from: int = 0


class MapRows(nn.Module):
    """Rows (B, n, D) that stand at the positions of a scale and hold what is known before it is made.

    The pyramid is the tokenizer's and is not trained here; copy it with `pyramid.load_state_dict`.

    Args:
        layout: A scales layout.
        vocab_size: Number of codes V.
        width: Width D.
        rule: Shape of the pyramid.
    """

    scale: Tensor

    def __init__(self, layout: Layout, vocab_size: int, width: int, rule: ScaleRule) -> None:
        super().__init__()
        self.pyramid = ResidualPyramid(
            layout.maps, vocab_size, rule.channels, rule.phis, rule.ratio, rule.kernel
        ).requires_grad_(False)
        self.project = nn.Linear(rule.channels, width)
        self.start = nn.Parameter(torch.randn(self.pyramid.slices[0].stop, width) * 0.02)
        self.places = nn.Parameter(torch.randn(layout.size, width) * 0.02)
        self.levels = nn.Embedding(len(layout.maps), width)
        nn.init.normal_(self.levels.weight, std=0.02)
        self.register_buffer("scale", layout.coords[:, 0].clone(), persistent=False)

    @property
    def codes(self) -> nn.Embedding:
        """The codebook."""
        return self.pyramid.codes

    @property
    def weight(self) -> Tensor:
        """Projected codebook (V, D)."""
        return self.project(self.codes.weight)

    def forward(self, rows: Tensor, place: slice) -> Tensor:
        """Adds the vectors of the places (layout indices) and scales to rows (B, n, D)."""
        return rows + self.places[place] + self.levels(self.scale[place])


class NextScaleGenerator(Generator):
    """Predicts all codes of a scale at once from the sum of the coarser scales.

    A condition of one row (a class) starts the first scale and modulates the blocks, as published; a condition of
    several rows (words) stands before the first scale as well, where every scale sees it. Positions and scales have
    learned vectors. `rule_config` holds the fields of `ScaleRule`.
    """

    tokens: MapRows

    def make_rule(self, options: dict[str, Any]) -> ScaleRule:
        """A `ScaleRule`."""
        check_options(ScaleRule, options, "rule option of NextScaleGenerator")
        return ScaleRule(**options)

    @staticmethod
    def rule_for(pyramid: Pyramid) -> dict[str, Any]:
        """The options of `ScaleRule` that describe a pyramid."""
        kernel = cast("nn.Conv2d", pyramid.phis[0]).kernel_size[0] if len(pyramid.phis) else 1
        return {
            "channels": pyramid.channels,
            "phis": len(pyramid.phis),
            "ratio": pyramid.ratio,
            "kernel": kernel,
        }

    @torch.no_grad()
    def take_pyramid(self, pyramid: Pyramid, vectors: Tensor) -> None:
        """Copies the convolutions of a tokenizer's pyramid and the vectors (V, C) of its codes.

        Raises:
            TokenloomError: If the pyramid enlarges maps in another way than this generator, or has other sizes.
        """
        own = self.tokens.pyramid
        if pyramid.up != own.up or pyramid.maps != own.maps or vectors.shape != own.codes.weight.shape:
            raise TokenloomError(
                f"The pyramid has {pyramid.maps} maps, enlarges them by {pyramid.up!r} and has vectors "
                f"{tuple(vectors.shape)}; this generator needs {own.maps}, {own.up!r}, {tuple(own.codes.weight.shape)}."
            )
        own.phis.load_state_dict(pyramid.phis.state_dict())
        own.codes.weight.copy_(vectors)

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """Rows at the places they predict."""
        rule = self.rule
        return scale_plan(
            order, self._words(prefix), causal_prefix, rule.own_scale, rule.window, rule.window_from
        )

    def make_tokens(self, vocab_size: int, width: int, code_levels: list[int] | None) -> MapRows:
        """The tokenizer's pyramid and a projection."""
        if code_levels:
            raise TokenloomError(
                "code_levels describe a token table; NextScaleGenerator has a pyramid instead."
            )
        return MapRows(self.order.layout, vocab_size, width, self.rule)

    @staticmethod
    def _words(prefix: int) -> int:
        return prefix if prefix > 1 else 0

    def _first(self, prefix: Tensor) -> Tensor:
        """Rows of the first scale, behind the words."""
        rows = prefix.mean(1, keepdim=True) + self.tokens.start
        rows = self.tokens(rows, self.tokens.pyramid.slices[0])
        return torch.cat((prefix, rows), dim=1) if self._words(prefix.shape[1]) else rows

    def _inputs(self, codes: Tensor, prefix: Tensor) -> Tensor:
        tokens = self.tokens
        later = tokens(tokens.project(tokens.pyramid.views(codes)), slice(len(tokens.start), None))
        return torch.cat((self._first(prefix), later), dim=1)

    def _feed(self, prefix: Tensor) -> Callable[[Tensor, int], Tensor]:
        tokens, pyramid = self.tokens, self.tokens.pyramid
        total: Tensor | float = 0.0  # the running reconstruction

        def feed(codes: Tensor, step: int) -> Tensor:
            nonlocal total
            if step == 0:
                return self._first(prefix)
            total = total + pyramid.detail(codes[:, pyramid.slices[step - 1]], step - 1)
            return tokens(tokens.project(pyramid.shrink(total, step)), pyramid.slices[step])

        return feed

    def features(self, codes: Tensor) -> Tensor:
        """What codes (B, N) add up to, (B, C, H, W): the input of the tokenizer's decoder."""
        self._check_codes(codes)
        return self.tokens.pyramid.decode(codes)
