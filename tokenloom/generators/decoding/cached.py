"""The cached rung: a static key/value cache in decode order, so that a step computes only its own rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenloom.generators.decoding.rows import RowModel


class CachedStepper:
    """Runs the rows of this step against the cache; masks only where a plan hides rows (queries, causal prefixes)."""

    def __init__(
        self, generator: RowModel, prefix: Tensor, visible: Tensor | None = None, cache: Any = None
    ) -> None:
        self.generator, self.plan, self.visible = generator, generator.plan, visible
        self.condition = generator.pooled_condition(prefix)
        if cache is None:
            cache = generator.transformer.new_cache(prefix.shape[0], self.plan.capacity)
        self.cache = cache
        constant = self.condition is not None
        self.modulations = generator.transformer.modulations(self.condition) if constant else None

    def __call__(
        self, x: Tensor, step: int, *, condition: Tensor | None = None, commit: bool = True
    ) -> tuple[Tensor, ...]:
        """Hidden states (B, n, D) of the rows fed at `step`."""
        fed = self.plan.on(x.device)[step]
        columns = self.cache.length + len(fed.rows)
        visible = None if self.visible is None else self.visible[: len(x)]
        modulations = self.modulations
        if condition is not None:
            modulations = None
        elif self.condition is not None and len(x) < len(self.condition):  # the first samples alone
            condition = self.condition[: len(x)]
            modulations = [None if each is None else each[: len(x)] for each in modulations or ()] or None
        taps = self.generator.run_rows(
            x,
            fed.rows,
            mask=self.plan.mask_for(visible, fed.rows, columns, fed.mask),
            cache=self.cache,
            condition=self.condition if condition is None else condition,
            modulations=modulations,
        )
        if commit:
            self.cache.commit(fed.committed)
        return taps
