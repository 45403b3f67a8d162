"""The cached rung: a static key/value cache in decode order, so that a step computes only its own rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tokenloom.generators.base import Generator


class CachedStepper:
    """Runs the rows of this step against the cache; masks only where a plan hides rows (queries, causal prefixes)."""

    def __init__(self, generator: Generator, prefix: Tensor, visible: Tensor | None = None) -> None:
        self.generator, self.plan, self.visible = generator, generator.plan, visible
        self.condition = generator.pooled_condition(prefix)
        self.cache = generator.transformer.new_cache(prefix.shape[0], self.plan.capacity)
        self.modulations = generator.transformer.modulations(self.condition)

    def __call__(self, x: Tensor, step: int) -> tuple[Tensor, ...]:
        """Hidden states (B, n, D) of the rows fed at `step`."""
        rows = self.plan.steps[step].rows
        columns = self.cache.length + len(rows)
        taps = self.generator.run_rows(
            x,
            rows,
            mask=self.plan.mask_for(self.visible, rows, columns, self.plan.steps[step].mask),
            cache=self.cache,
            condition=self.condition,
            modulations=self.modulations,
        )
        self.cache.commit(self.plan.steps[step].committed)
        return taps
