"""Row plans: what a paradigm feeds to the transformer at each step, who sees whom, and which rows predict what.

The transformer works on rows: the prefix (condition), one row a token, and, for some paradigms, query rows that only
ask. A plan is plain data derived from an `Order`; training, the reference rung and the cached rung all read the same
plan, which is why they agree. Knows nothing of embeddings, weights or sampling.

Legend: P prefix rows, N tokens, R rows in all, S steps, J heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.orders import Order


@dataclass(frozen=True, eq=False)
class StepRows:
    """What one step of a generation needs, worked out once a plan.

    Attributes:
        rows: LongTensor (n,), the rows fed.
        tokens: LongTensor (t,), the layout indices of the token rows among them.
        learned: LongTensor (q,), the learned vectors of the query rows behind the tokens.
        committed: How many of the rows stay in the cache.
        mask: BoolTensor (n, L) over the cache and these rows, or `None` where all is visible.
        sources: LongTensor (J, m), the place among the fed rows that predicts each position at each head.
        weights: float32 (J, m).
        positions: LongTensor (m,), the layout indices predicted.
        predicts: Whether any row predicts them; where not, they have to be known.
    """

    rows: Tensor
    tokens: Tensor
    learned: Tensor
    committed: int
    mask: Tensor | None
    sources: Tensor
    weights: Tensor
    positions: Tensor
    predicts: bool = True

    def to(self, device: torch.device) -> StepRows:
        """The same on a device."""
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of a generation.

    Attributes:
        feeds: For each step, the ids of the rows fed, the committed ones first.
        committed: For each step, how many of the fed rows stay in the cache.
        mask: BoolTensor (R, R); mask[q, k] says whether row q sees row k.
        position: LongTensor (R,), the layout index of a token or query row, -1 for rows that stand at none.
        query: BoolTensor (R,), true for query rows.
        learned: LongTensor (R,), which learned vector a query row holds; `None` means one vector for all.
        place: LongTensor (R,), which learned position a row gets; `None` means prefix rows first, then the layout.
        sources: LongTensor (J, N), the row whose hidden state at head j predicts the n-th position in decode order.
        weights: float32 (J, N), the weight of each head; the columns sum to 1, or to 0 where a position is
            predicted by no row and has to be known.
        order: The order behind it.
        visits: For each feed, the step of the order it works on, where steps are visited several times; `None` means
            that the n-th feed is the n-th step.
    """

    feeds: tuple[Tensor, ...]
    committed: tuple[int, ...]
    mask: Tensor
    position: Tensor
    query: Tensor
    sources: Tensor
    weights: Tensor
    order: Order
    learned: Tensor | None = None
    place: Tensor | None = None
    visits: tuple[int, ...] | None = None

    @cached_property
    def vectors(self) -> Tensor:
        """LongTensor (q,): the learned vectors of the query rows, in the order of the rows."""
        if self.learned is None:
            return torch.zeros(int(self.query.sum()), dtype=torch.long)
        return self.learned[self.query]

    @cached_property
    def predicted(self) -> Tensor:
        """BoolTensor (N,) in layout order: false where no row predicts a position."""
        return (self.weights.sum(0) > 0)[self.order.inverse]

    @cached_property
    def steps(self) -> tuple[StepRows, ...]:
        """One `StepRows` a feed."""
        return tuple(self._step(index) for index in range(len(self.feeds)))

    @cached_property
    def _moved(self) -> dict[torch.device, tuple[StepRows, ...]]:
        return {}

    def on(self, device: torch.device) -> tuple[StepRows, ...]:
        """`steps` on a device, moved once, so that a generation copies nothing to it between steps."""
        if device.type == "cpu":
            return self.steps
        if device not in self._moved:
            self._moved[device] = tuple(step.to(device) for step in self.steps)
        return self._moved[device]

    def _step(self, step: int) -> StepRows:
        place = self.order.slices[step if self.visits is None else self.visits[step]]
        rows = self.feeds[step]
        local = torch.full((self.rows,), -1)
        local[rows] = torch.arange(len(rows))
        weights = self.weights[:, place]
        sources = local[self.sources[:, place]]
        if bool(((sources < 0) & (weights > 0)).any()):
            raise TokenloomError(f"Step {step} of {self.order} reads a row that was not fed at that step.")
        is_query = self.query[rows]
        return StepRows(
            rows=rows,
            tokens=self.position[rows][(self.position[rows] >= 0) & ~is_query],
            learned=(torch.zeros_like(rows) if self.learned is None else self.learned[rows])[is_query],
            committed=self.committed[step],
            mask=self.step_mask(step),
            sources=sources.clamp(min=0),
            weights=weights,
            positions=self.order.permutation[place],
            predicts=bool(weights.any()),
        )

    @property
    def rows(self) -> int:
        """Number of rows R in all."""
        return self.mask.shape[0]

    @property
    def capacity(self) -> int:
        """Cache rows a generation needs."""
        kept, most = 0, 0
        for feed, committed in zip(self.feeds, self.committed, strict=True):
            most = max(most, kept + len(feed))
            kept += committed
        return most

    def step_mask(self, step: int) -> Tensor | None:
        """Mask (n, L) of the rows fed at a step over the cache behind which they stand; `None` if all is visible."""
        before = [feed[:kept] for feed, kept in zip(self.feeds[:step], self.committed[:step], strict=True)]
        visible = self.mask[self.feeds[step]][:, torch.cat([*before, self.feeds[step]])]
        return None if bool(visible.all()) else visible

    def mask_for(
        self, visible: Tensor | None, rows: Tensor, columns: int, mask: Tensor | None
    ) -> Tensor | None:
        """Adds to a mask what the samples hide of their prefix; every row still sees itself.

        Args:
            visible: BoolTensor (B, P), the prefix rows that may be looked at, or `None` for all.
            rows: LongTensor (n,), the rows that look.
            columns: How many rows L they look at, the prefix first.
            mask: BoolTensor (n, L), or `None` where the plan hides nothing.

        Returns:
            `mask` where `visible` is `None`, else BoolTensor (B, 1, n, L).
        """
        if visible is None:
            return mask
        prefix, device = visible.shape[1], visible.device
        full = torch.ones(len(rows), columns, dtype=torch.bool, device=device) if mask is None else mask
        own = rows.to(device)[:, None] == torch.arange(prefix, device=device)
        full = full.to(device).repeat(len(visible), 1, 1)
        full[:, :, :prefix] &= visible[:, None] | own
        return full[:, None]


def base_mask(row_step: Tensor, prefix: int, causal_prefix: bool) -> Tensor:
    """Rows see the rows of their own step and of all earlier ones."""
    mask = row_step[None, :] <= row_step[:, None]
    if causal_prefix:
        mask[:prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool).tril()
    return mask


def token_rows(order: Order, prefix: int) -> tuple[Tensor, Tensor]:
    """Step at which each prefix and token row is fed, and its position."""
    step = torch.cat((torch.zeros(prefix, dtype=torch.long), order.step[order.permutation] + 1))
    position = torch.cat((torch.full((prefix,), -1), order.permutation))
    return step, position


def _feeds(row_step: Tensor, steps: int) -> tuple[Tensor, ...]:
    return tuple((row_step == step).nonzero().squeeze(1) for step in range(steps))


def build_plan(
    order: Order,
    row_step: Tensor,
    *,
    mask: Tensor,
    position: Tensor,
    sources: Tensor,
    weights: Tensor | None = None,
    query: Tensor | None = None,
    committed: tuple[int, ...] | None = None,
    learned: Tensor | None = None,
    place: Tensor | None = None,
) -> RowPlan:
    """A plan whose rows are fed at `row_step`; by default none is a query, all stay, and every head counts fully."""
    feeds = _feeds(row_step, order.num_steps)
    return RowPlan(
        feeds=feeds,
        committed=tuple(len(feed) for feed in feeds) if committed is None else committed,
        mask=mask,
        position=position,
        query=torch.zeros(len(row_step), dtype=torch.bool) if query is None else query,
        sources=sources,
        weights=torch.ones(sources.shape) if weights is None else weights,
        order=order,
        learned=learned,
        place=place,
    )
