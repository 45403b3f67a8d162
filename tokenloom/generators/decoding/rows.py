"""What a decode rung asks of a generator: its plan, and a way to run rows."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from tokenloom.generators.plans import RowPlan


class RowModel(Protocol):
    """A generator, as far as rungs know it."""

    plan: RowPlan
    transformer: Any

    def pooled_condition(self, prefix: Tensor) -> Tensor | None:
        """adaLN condition (B, 1, C) of a generation; `None` where there is none, or where it changes with every call."""
        ...

    def run_rows(self, x: Tensor, rows: Tensor, *, mask: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        """Hidden states of embeddings (B, n, D) of row ids (n,), one (B, n, D) a tap."""
        ...
