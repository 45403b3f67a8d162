"""The reference rung: no cache, one full masked forward a step. Slow, obvious, kept as the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.generators.decoding.rows import RowModel


class ReferenceStepper:
    """Runs all rows committed so far and the rows of this step under the plan's mask."""

    def __init__(self, generator: RowModel, prefix: Tensor, visible: Tensor | None = None) -> None:
        self.generator, self.plan, self.visible = generator, generator.plan, visible
        self.condition = generator.pooled_condition(prefix)
        self.inputs: list[Tensor] = []
        self.conditions: list[Tensor] = []  # of the committed rows, where a condition comes with every call
        self.rows: list[Tensor] = []

    def __call__(
        self, x: Tensor, step: int, *, condition: Tensor | None = None, commit: bool = True
    ) -> tuple[Tensor, ...]:
        """Hidden states (B, n, D) of the rows fed at `step`."""
        feed, kept, batch = self.plan.feeds[step], self.plan.committed[step], len(x)
        rows = torch.cat([*self.rows, feed])
        visible = None if self.visible is None else self.visible[:batch]
        mask = self.plan.mask_for(visible, rows, len(rows), self.plan.mask[rows][:, rows])
        inputs = torch.cat([*(part[:batch] for part in self.inputs), x], dim=1)
        every = None if self.condition is None else self.condition[:batch]
        if condition is not None:
            condition = condition.expand(-1, len(feed), -1)
            every = torch.cat([*(part[:batch] for part in self.conditions), condition], dim=1)
        taps = self.generator.run_rows(inputs, rows, mask=mask, condition=every)
        if commit and kept:  # steps that leave nothing may run other numbers of samples
            self.rows.append(feed[:kept])
            self.inputs.append(x[:, :kept])
            if condition is not None:
                self.conditions.append(condition[:, :kept])
        return tuple(tap[:, -len(feed) :] for tap in taps)
