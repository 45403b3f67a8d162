"""Next-token prediction: one position a step, in any order that has one position a step (LlamaGen, Sun et al. 2024; D-AR).

Mask: a row sees itself and everything before it. Input: the prefix at step 0, then the token of the step before. Head: each
row predicts the next position; the last prefix row predicts the first. Steps: one a token, 256 for 16x16 tokens.
"""

from __future__ import annotations

from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan, token_plan


class NextTokenGenerator(Generator):
    """Predicts each position from all earlier ones (LlamaGen, D-AR and every language model)."""

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """Each row predicts the next position."""
        return token_plan(order, prefix, causal_prefix)
