"""Next-token prediction where each part of the line has codes of its own: for instance four codes of a box, then a mask.

The codes of all parts share one vocabulary and one transformer; at each position only the codes of its part are possible.
Knows nothing of what the parts mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.conditions import Given
from tokenloom.generators.next_token import NextTokenGenerator
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan
from tokenloom.generators.sampling import Sampling


class RangedTokenGenerator(NextTokenGenerator):
    """Next-token prediction with a range of codes for each part of the line.

    `rule_config` is {"ranges": [[count, low, high], ...]}: the first `count` positions of the layout hold codes from `low` up
    to, but without, `high`; then the next ones. Codes outside have no probability, in training as well.
    """

    def make_rule(self, options: dict[str, Any]) -> Tensor:
        """LongTensor (N, 2): lowest code of each position, and the code behind the highest."""
        parts: Any = options.get("ranges")
        good = (
            isinstance(parts, (list, tuple))
            and parts
            and all(len(part) == 3 and part[0] >= 1 and 0 <= part[1] < part[2] for part in parts)
        )
        if not good or set(options) != {"ranges"}:
            raise TokenloomError(
                f'rule_config must be {{"ranges": [[count, low, high], ...]}} with counts of at least 1 and low < high, got '
                f"{options!r}."
            )
        return torch.tensor([part[1:] for part in parts for _ in range(part[0])])

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """As next-token prediction, if there is a range for every position."""
        if len(self.rule) != order.layout.size:
            raise TokenloomError(
                f"The ranges are for {len(self.rule)} positions, but {order.layout} has {order.layout.size}."
            )
        return super().make_plan(order, prefix, causal_prefix)

    def possible(self, positions: Tensor) -> Tensor:
        """BoolTensor (..., n, V): which codes may stand at layout indices (..., n)."""
        limits = self.rule.to(positions.device)[positions]
        codes = torch.arange(self.vocab_size, device=positions.device)
        return (codes >= limits[..., :1]) & (codes < limits[..., 1:])

    def logits(self, codes: Tensor, condition: Given | None = None) -> Tensor:
        """As for every generator; -inf for codes that cannot stand at a position."""
        logits = super().logits(codes, condition)
        positions = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(~self.possible(positions), -torch.inf)

    def _sample(
        self, logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling, step: int
    ) -> Tensor:
        return super()._sample(
            logits.masked_fill(~self.possible(positions), -torch.inf), seeds, positions, sampling, step
        )
