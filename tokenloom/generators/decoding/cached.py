"""The cached rung: a static key/value cache in decode order, so that a step computes only its own rows."""

from __future__ import annotations

from torch import Tensor

from tokenloom.generators.decoding.rows import RowModel


class CachedStepper:
    """Runs the rows of this step against the cache; masks only where a plan hides rows (queries, causal prefixes)."""

    def __init__(self, generator: RowModel, prefix: Tensor, visible: Tensor | None = None) -> None:
        self.generator, self.plan, self.visible = generator, generator.plan, visible
        self.condition = generator.pooled_condition(prefix)
        self.cache = generator.transformer.new_cache(prefix.shape[0], self.plan.capacity)
        constant = self.condition is not None
        self.modulations = generator.transformer.modulations(self.condition) if constant else None

    def __call__(
        self, x: Tensor, step: int, *, condition: Tensor | None = None, commit: bool = True
    ) -> tuple[Tensor, ...]:
        """Hidden states (B, n, D) of the rows fed at `step`."""
        rows = self.plan.steps[step].rows
        columns = self.cache.length + len(rows)
        visible = None if self.visible is None else self.visible[: len(x)]
        taps = self.generator.run_rows(
            x,
            rows,
            mask=self.plan.mask_for(visible, rows, columns, self.plan.steps[step].mask),
            cache=self.cache,
            condition=self.condition if condition is None else condition,
            modulations=self.modulations if condition is None else None,
        )
        if commit:
            self.cache.commit(self.plan.steps[step].committed)
        return taps
