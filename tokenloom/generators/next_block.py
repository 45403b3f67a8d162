"""Next-block prediction: any order with any number of positions a step.

What asks for the positions of a step is chosen by `plan_kind`:

* "queries": a learned query at each position; fits every order. It sees all earlier tokens and the other queries.
* "groups" (PAR, NBP hybrid): the first n positions come one a step; then the rows of a group predict the next group, and
  n-1 learned rows complete the first.
* "shift" (NBP): the rows of a block predict the next block; the first block has to be known.
"""

from __future__ import annotations

from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan, group_plan, query_plan, shift_plan


class NextBlockGenerator(Generator):
    """Predicts all positions of a step at once."""

    plan_kinds = ("queries", "groups", "shift")

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """Tokens and what asks for the next ones."""
        plans = {"queries": query_plan, "groups": group_plan, "shift": shift_plan}
        return plans[self.plan_kind](order, prefix, causal_prefix)
