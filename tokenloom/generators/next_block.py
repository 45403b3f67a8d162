"""Next-block prediction: any order with any number of positions a step (PAR, Wang et al. 2024; NBP, Ren et al. 2025).

Mask: a row sees all earlier steps and its own. Steps: those of the order, S for S blocks. Input and head are the choice of
`rule_config={"plan": ...}`:

* "queries" (default): a learned query at each position of the step asks for it; fits every order. It sees all earlier tokens
  and the other queries.
* "groups" (PAR, NBP hybrid): the first n positions come one a step; then the rows of a group predict the next group, and
  n-1 learned rows complete the first.
* "shift" (NBP): the rows of a block predict the next block; the first block has to be known.
"""

from __future__ import annotations

from typing import Any

from tokenloom.errors import unknown_name
from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan, group_plan, query_plan, shift_plan

_PLANS = {"queries": query_plan, "groups": group_plan, "shift": shift_plan}


class NextBlockGenerator(Generator):
    """Predicts all positions of a step at once."""

    def make_rule(self, options: dict[str, Any]) -> str:
        """The name of the plan."""
        for name in options:
            if name != "plan":
                raise unknown_name("rule option of NextBlockGenerator", name, ("plan",))
        plan = options.get("plan", "queries")
        if plan not in _PLANS:
            raise unknown_name("plan of NextBlockGenerator", plan, _PLANS)
        return plan

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """Tokens and what asks for the next ones."""
        return _PLANS[self.rule](order, prefix, causal_prefix)
