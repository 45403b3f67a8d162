"""Next-block prediction: any order with any number of positions a step, asked for by query rows."""

from __future__ import annotations

from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan, query_plan


class NextBlockGenerator(Generator):
    """Predicts all positions of a step at once: a learned query stands at each of them and sees all earlier tokens."""

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """Tokens and queries."""
        return query_plan(order, prefix, causal_prefix)
