"""The reference rung: no cache, one full masked forward a step. Slow, obvious, kept as the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenloom.generators.base import Generator


class ReferenceStepper:
    """Runs all rows committed so far and the rows of this step under the plan's mask."""

    def __init__(self, generator: Generator, prefix: Tensor, visible: Tensor | None = None) -> None:
        self.generator, self.plan, self.visible = generator, generator.plan, visible
        self.condition = generator.pooled_condition(prefix)
        self.inputs: list[Tensor] = []
        self.rows: list[Tensor] = []

    def __call__(self, x: Tensor, step: int) -> tuple[Tensor, ...]:
        """Hidden states (B, n, D) of the rows fed at `step`."""
        feed, kept = self.plan.feeds[step], self.plan.committed[step]
        rows = torch.cat([*self.rows, feed])
        mask = self.plan.mask_for(self.visible, rows, len(rows), self.plan.mask[rows][:, rows])
        inputs = torch.cat([*self.inputs, x], dim=1)
        taps = self.generator.run_rows(inputs, rows, mask=mask, condition=self.condition)
        self.rows.append(feed[:kept])
        self.inputs.append(x[:, :kept])
        return tuple(tap[:, -len(feed) :] for tap in taps)
