"""Row plans: what a paradigm feeds to the transformer at each step, who sees whom, and which rows predict what.

The transformer works on rows: the prefix (condition), one row a token, and, for some paradigms, query rows that only
ask. A plan is plain data derived from an `Order`; training, the reference rung and the cached rung all read the same
plan, which is why they agree. Knows nothing of embeddings, weights or sampling.

Legend: P prefix rows, N tokens, R rows in all, S steps, J heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

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
    """

    rows: Tensor
    tokens: Tensor
    learned: Tensor
    committed: int
    mask: Tensor | None
    sources: Tensor
    weights: Tensor
    positions: Tensor


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
        """One `StepRows` a step."""
        return tuple(self._step(step) for step in range(self.order.num_steps))

    def _step(self, step: int) -> StepRows:
        rows, place = self.feeds[step], self.order.slices[step]
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
        full = torch.ones(len(rows), columns, dtype=torch.bool) if mask is None else mask
        own = rows.to(device)[:, None] == torch.arange(prefix, device=device)
        full = full.to(device).repeat(len(visible), 1, 1)
        full[:, :, :prefix] &= visible[:, None] | own
        return full[:, None]


def _base_mask(row_step: Tensor, prefix: int, causal_prefix: bool) -> Tensor:
    mask = row_step[None, :] <= row_step[:, None]
    if causal_prefix:
        mask[:prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool).tril()
    return mask


def _token_rows(order: Order, prefix: int) -> tuple[Tensor, Tensor]:
    """Step at which each prefix and token row is fed, and its position."""
    step = torch.cat((torch.zeros(prefix, dtype=torch.long), order.step[order.permutation] + 1))
    position = torch.cat((torch.full((prefix,), -1), order.permutation))
    return step, position


def _feeds(row_step: Tensor, steps: int) -> tuple[Tensor, ...]:
    return tuple((row_step == step).nonzero().squeeze(1) for step in range(steps))


def _plan(
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


@lru_cache(maxsize=64)
def token_plan(order: Order, prefix: int, causal_prefix: bool = False) -> RowPlan:
    """Next token: each row predicts the next position; the last prefix row predicts the first.

    Raises:
        TokenloomError: If the order predicts several positions in one step.
    """
    size = order.layout.size
    if order.num_steps != size:
        raise TokenloomError(
            f"Next-token prediction needs one position a step, but {order} has {size} positions in "
            f"{order.num_steps} steps; use NextBlockGenerator, which takes any order."
        )
    step, position = _token_rows(order, prefix)
    step, position = step[:-1], position[:-1]  # the last token predicts nothing
    return _plan(
        order,
        step,
        mask=_base_mask(step, prefix, causal_prefix),
        position=position,
        sources=(prefix - 1 + torch.arange(size))[None],
    )


@lru_cache(maxsize=64)
def neighbor_plan(order: Order, prefix: int, causal_prefix: bool = False) -> RowPlan:
    """Next neighbor (NAR): head j predicts the neighbour one step along axis j; predictions of all neighbours that
    exist are averaged; the first position is predicted by all heads of the last prefix row.

    Heads are ordered from the last axis to the first: right, below (and, for clips, the next frame).

    Raises:
        TokenloomError: If the order is not `neighbors`.
    """
    if order.name != "neighbors":
        raise TokenloomError(f"Next-neighbor prediction needs the order 'neighbors', got {order}.")
    step, position = _token_rows(order, prefix)
    kept = step < order.num_steps  # tokens of the last step predict nothing
    step, position = step[kept], position[kept]
    shape = order.layout.coords[-1].add(1).tolist()  # length of every axis
    coords = order.layout.coords[order.permutation]  # (N, A) in decode order
    sources, weights = [], []
    stride = 1
    for axis in reversed(range(len(shape))):
        neighbour = order.permutation - stride  # layout index one step back along the axis
        exists = coords[:, axis] > 0
        rows = prefix + order.inverse[neighbour.clamp(min=0)]
        first = order.permutation == 0
        sources.append(torch.where(exists, rows, prefix - 1))
        weights.append((exists | first).float())
        stride *= shape[axis]
    weight = torch.stack(weights)
    return _plan(
        order,
        step,
        mask=_base_mask(step, prefix, causal_prefix),
        position=position,
        sources=torch.stack(sources),
        weights=weight / weight.sum(0),
    )


@lru_cache(maxsize=64)
def query_plan(order: Order, prefix: int, causal_prefix: bool = False) -> RowPlan:
    """Next block of any order: each position of a step is asked for by a query row at its own place.

    At step s the tokens of step s-1 and the queries of step s are fed together. Queries see all earlier tokens and each
    other, tokens never see queries, and queries are not kept. Training runs tokens and queries side by side.
    """
    step, position = _token_rows(order, prefix)
    last = step == order.num_steps  # tokens of the last step are never fed
    tokens, token_position = step[~last], position[~last]
    query_step = order.step[order.permutation]
    row_step = torch.cat((tokens, query_step))
    query = torch.cat(
        (torch.zeros(len(tokens), dtype=torch.bool), torch.ones(len(query_step), dtype=torch.bool))
    )
    mask = _base_mask(row_step, prefix, causal_prefix)
    same = row_step[None, :] == row_step[:, None]
    mask = mask & (~query[None, :] | (query[:, None] & same))
    size = order.layout.size
    return _plan(
        order,
        row_step,
        committed=tuple(int((tokens == s).sum()) for s in range(order.num_steps)),
        mask=mask,
        position=torch.cat((token_position, order.permutation)),
        query=query,
        sources=(len(tokens) + torch.arange(size))[None],
    )


@lru_cache(maxsize=64)
def group_plan(order: Order, prefix: int, causal_prefix: bool = False) -> RowPlan:
    """Next block from the block before (PAR, NBP): the first n positions come one a step, then n at once.

    The first group of n is predicted by the token before it and n-1 learned rows, which stay; each later group by the
    group before, place by place. Rows of a group see each other. Learned positions follow the sequence: prefix, n
    tokens, the learned rows, the other tokens.

    Raises:
        TokenloomError: If the order is not n single positions and then groups of n.
    """
    sizes = [part.stop - part.start for part in order.slices]
    group, size = sizes[-1], order.layout.size
    if sizes != [1] * group + [group] * (size // group - 1) or group == size:
        raise TokenloomError(
            f"This plan needs an order of n single positions and then groups of n, got {order}; use "
            "orders.regions(grid, n) or orders.blocks(layout, n, sequential_first=True)."
        )
    step, position = _token_rows(order, prefix)
    step, position = step[: size - group + prefix], position[: size - group + prefix]
    extra, rows = group - 1, len(step)
    step = torch.cat((step, torch.full((extra,), group)))
    position = torch.cat((position, torch.full((extra,), -1)))
    query = torch.arange(rows + extra) >= rows
    index = torch.arange(rows)
    place = torch.cat((index + extra * (index >= prefix + group), prefix + group + torch.arange(extra)))
    wanted = torch.arange(size)
    before = prefix + torch.where(wanted < group, wanted - 1, wanted - group)
    sources = torch.where((wanted > group) & (wanted < 2 * group), rows + wanted - group - 1, before)
    sources[group] = prefix + group - 1
    return _plan(
        order,
        step,
        mask=_base_mask(step, prefix, causal_prefix),
        position=position,
        query=query,
        sources=sources[None],
        learned=torch.where(query, torch.arange(rows + extra) - rows, 0),
        place=place,
    )


@lru_cache(maxsize=64)
def shift_plan(order: Order, prefix: int, causal_prefix: bool = False) -> RowPlan:
    """Next block from the block before, without learned rows: the first block is not predicted, it has to be known.

    Raises:
        TokenloomError: If the steps do not all have the same number of positions.
    """
    size = order.layout.size
    block = size // order.num_steps
    if any(part.stop - part.start != block for part in order.slices) or order.num_steps < 2:
        raise TokenloomError(f"This plan needs an order of two or more steps of equal size, got {order}.")
    step, position = _token_rows(order, prefix)
    step, position = step[: size - block + prefix], position[: size - block + prefix]
    wanted = torch.arange(size)
    return _plan(
        order,
        step,
        mask=_base_mask(step, prefix, causal_prefix),
        position=position,
        sources=(prefix + wanted - block).clamp(min=0)[None],
        weights=(wanted >= block).float()[None],
    )


@lru_cache(maxsize=64)
def scale_plan(
    order: Order,
    prefix: int,
    causal_prefix: bool = False,
    own_scale: bool = False,
    window: int = 0,
    window_from: int = 0,
) -> RowPlan:
    """Next scale (VAR, MVAR): one row at each position of the scale being made, and each row predicts its own place.

    Rows of a scale see the prefix, all earlier scales and each other. They hold what earlier scales add up to, so there
    are no other rows, and unlike queries they stay in the cache.

    Args:
        order: A `scales` order.
        prefix: Number of prefix rows P, which may be 0.
        causal_prefix: Whether prefix rows see only earlier prefix rows.
        own_scale: Whether rows see the prefix and their own scale alone (MVAR); only the prefix stays in the cache.
        window: Side k of the neighbourhood that a row sees of its own scale; 0 for all of it. At a border the
            neighbourhood is moved inside, so that it always holds k x k positions if the scale does.
        window_from: First scale that has a window.

    Raises:
        TokenloomError: If the order is not `scales`, or the window is even.
    """
    if order.name != "scales":
        raise TokenloomError(f"Next-scale prediction needs the order 'scales', got {order}.")
    if window < 0 or (window and window % 2 == 0):
        raise TokenloomError(f"A window has an odd side, or 0 for none, got {window}.")
    scale = order.step
    seen = scale[None, :] == scale[:, None] if own_scale else scale[None, :] <= scale[:, None]
    if window:
        other = (scale[None, :] != scale[:, None]) | (scale < window_from)[:, None]
        seen &= other | _neighbourhood(order, window)
    kept = (prefix, *[0] * (order.num_steps - 1)) if own_scale else None
    return _place_plan(order, prefix, causal_prefix, seen, kept)


@lru_cache(maxsize=64)
def cell_plan(order: Order, prefix: int, causal_prefix: bool = False) -> RowPlan:
    """Next cell (xAR): one row at each position of any order, in decode order, and each row predicts its own place.

    Rows see the prefix, all earlier steps and each other. What stands in them changes while their step is made (noise
    becomes data), so a step runs its rows many times and commits them once.

    Args:
        order: Any order; a step is a cell.
        prefix: Number of prefix rows P, which may be 0.
        causal_prefix: Whether prefix rows see only earlier prefix rows.
    """
    step = order.step[order.permutation]
    return _place_plan(order, prefix, causal_prefix, step[None, :] <= step[:, None])


def _place_plan(
    order: Order, prefix: int, causal_prefix: bool, seen: Tensor, committed: tuple[int, ...] | None = None
) -> RowPlan:
    """A plan of prefix rows and one row a position, in decode order, that predicts its own place.

    `seen` (N, N) says which rows of positions see each other; they all see the prefix.
    """
    size = order.layout.size
    mask = torch.zeros(prefix + size, prefix + size, dtype=torch.bool)
    mask[:, :prefix] = True
    mask[prefix:, prefix:] = seen
    if causal_prefix:
        mask[:prefix, :prefix] = mask[:prefix, :prefix].tril()
    first = torch.zeros(prefix, dtype=torch.long)
    return _plan(
        order,
        torch.cat((first, order.step[order.permutation])),
        committed=committed,
        mask=mask,
        position=torch.cat((first - 1, order.permutation)),
        sources=(prefix + torch.arange(size))[None],
    )


def _neighbourhood(order: Order, window: int) -> Tensor:
    """BoolTensor (N, N): whether k has a row and a column inside the window around q in the map of q."""
    coords = order.layout.coords
    sides = torch.tensor(order.layout.maps)[coords[:, 0]]  # (N, 2): height and width of the map of q
    start = (coords[:, 1:] - window // 2).clamp(min=0)
    start = torch.minimum(start, (sides - window).clamp(min=0))
    places = coords[None, :, 1:] - start[:, None]
    return ((places >= 0) & (places < window)).all(-1)
