"""Next-neighbor prediction: all positions at the same distance from the first corner in one step (NAR, He et al. 2025).

Mask: a row sees everything at its distance and nearer. Input: the prefix at step 0, then all tokens of the step before.
Head: one an axis predicts the neighbour one step along it; the predictions of all neighbours that exist are averaged.
Steps: 2n - 1 for n x n tokens, T + H + W - 2 for a clip.
"""

from __future__ import annotations

from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan, neighbor_plan


class NextNeighborGenerator(Generator):
    """Predicts an anti-diagonal (or plane) from the one before, with one directional head an axis (He et al. 2025).

    With taps (d, d + 1) and a depth of d + 1, the head to the right reads depth d and the head below reads depth d + 1,
    as in the published models; with a single tap all heads read the same depth.
    """

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """Directional heads over the neighbour order."""
        return neighbor_plan(order, prefix, causal_prefix)
