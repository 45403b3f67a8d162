"""Row plans: what every paradigm feeds, who sees whom, and which rows predict what."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_generators import CLASSES, ORDERS, cases
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import orders
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import (
    RowPlan,
    group_plan,
    neighbor_plan,
    query_plan,
    shift_plan,
    token_plan,
)
from tokenloom.layouts import Layout

PLANS = {"token": token_plan, "neighbor": neighbor_plan, "block": query_plan}
CASES = [pytest.param(name, order, id=f"{name}-{order}") for name, _, order in cases()]
PREFIXES = [(1, False), (3, False), (3, True)]


def test_every_order_has_an_example() -> None:
    assert set(ORDERS) == set(orders.names())
    assert all(order.name == name for name, group in ORDERS.items() for order in group)


def test_who_takes_what() -> None:
    """Next block takes every order, next token those with one position a step, next neighbor its own."""
    taken = {(name, order) for name, _, order in cases()}
    for order in (order for group in ORDERS.values() for order in group):
        assert ("block", order) in taken
        assert (("token", order) in taken) == (order.num_steps == order.layout.size)
        assert (("neighbor", order) in taken) == (order.name == "neighbors")
    assert {name for name, _ in taken} == set(CLASSES)


def reach(plan: RowPlan) -> Tensor:
    """reach[q, k]: information can flow from row k to row q through any number of layers."""
    closure = plan.mask.float()
    for _ in range(8):
        closure = ((closure @ closure) > 0).float()
    return closure > 0


@pytest.mark.parametrize(("prefix", "causal"), PREFIXES)
@pytest.mark.parametrize(("name", "order"), CASES)
def test_plan_properties(name: str, order: Order, prefix: int, causal: bool) -> None:
    plan = PLANS[name](order, prefix, causal)
    size, is_token = order.layout.size, (plan.position >= 0) & ~plan.query

    fed = torch.cat(plan.feeds)
    assert sorted(fed.tolist()) == list(range(plan.rows))  # every row is fed once
    assert len(plan.feeds) == len(plan.committed) == len(plan.steps) == order.num_steps
    assert plan.feeds[0][:prefix].tolist() == list(range(prefix))
    assert (plan.position[:prefix] == -1).all() and (plan.position[prefix:] >= 0).all()

    # The tokens of step s - 1 are fed at step s, in decode order; those of the last step never.
    for step, feed in enumerate(plan.feeds):
        got = plan.position[feed][is_token[feed]].tolist()
        assert got == ([] if step == 0 else order.permutation[order.slices[step - 1]].tolist())
        assert not plan.query[feed[: plan.committed[step]]].any()
        assert plan.query[feed[plan.committed[step] :]].all()

    # Predictions: weights are a mean, and only rows that were fed in the same step are read.
    assert plan.sources.shape == plan.weights.shape == (len(plan.weights), size)
    torch.testing.assert_close(plan.weights.sum(0), torch.ones(size))
    seen = reach(plan)
    token_step = torch.full((plan.rows,), -1)
    token_step[is_token] = order.step[plan.position[is_token]]
    for place, position in enumerate(order.permutation.tolist()):
        step = int(order.step[position])
        for head in range(len(plan.weights)):
            if plan.weights[head, place] > 0:
                source = int(plan.sources[head, place])
                assert source in plan.feeds[step].tolist()
                visible = seen[source] & is_token
                assert (token_step[visible] < step).all()  # causal through every layer
                assert int(visible.sum()) == int((order.step < step).sum())  # and nothing is withheld
                assert plan.mask[source, :prefix].all() or (causal and source < prefix)

    # No row sees another generation step's queries; prefix rows see the prefix only.
    assert not plan.mask[:prefix, prefix:].any()
    assert plan.mask[:prefix, :prefix].equal(torch.ones(prefix, prefix).tril(0 if causal else prefix) > 0)
    assert not plan.mask[~plan.query][:, plan.query].any()


@pytest.mark.parametrize(("name", "order"), CASES)
def test_steps_of_a_plan(name: str, order: Order) -> None:
    plan = PLANS[name](order, 2, True)
    kept: list[int] = []
    for index, step in enumerate(plan.steps):
        assert step.rows.equal(plan.feeds[index]) and step.committed == plan.committed[index]
        visible = plan.mask[step.rows][:, torch.tensor([*kept, *step.rows.tolist()])]
        assert (step.mask is None) == bool(visible.all())
        assert step.mask is None or step.mask.equal(visible)
        assert step.positions.tolist() == order.permutation[order.slices[index]].tolist()
        place = order.slices[index]
        active = plan.weights[:, place] > 0
        assert step.rows[step.sources][active].equal(plan.sources[:, place][active])
        assert step.weights.equal(plan.weights[:, place])
        rows = plan.position[step.rows]
        prefix = int((rows < 0).sum())
        assert rows[prefix:].tolist() == [
            *step.tokens.tolist(),
            *(step.positions.tolist() if len(step.learned) else []),
        ]
        assert len(kept) + len(step.rows) <= plan.capacity
        kept += step.rows[: step.committed].tolist()
    assert max(len(step.rows) + sum(plan.committed[:i]) for i, step in enumerate(plan.steps)) == plan.capacity


def test_token_plan_by_hand() -> None:
    """A line of three with two prefix rows: the last prefix row predicts the first position."""
    plan = token_plan(orders.raster(Layout.line(3)), 2)
    assert [feed.tolist() for feed in plan.feeds] == [[0, 1], [2], [3]]
    assert plan.sources.tolist() == [[1, 2, 3]]
    assert plan.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert plan.steps[1].mask is None and plan.capacity == 4


def test_query_plan_by_hand() -> None:
    """Two blocks of two with one prefix row: rows are prefix, two tokens, then four queries."""
    plan = query_plan(orders.blocks(Layout.line(4), 2), 1)
    assert [feed.tolist() for feed in plan.feeds] == [[0, 3, 4], [1, 2, 5, 6]]
    assert plan.committed == (1, 2) and plan.capacity == 5
    assert plan.sources.tolist() == [[3, 4, 5, 6]]
    assert plan.mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("layout", [Layout.grid(3, 4), Layout.clip(2, 3, 2), Layout.grid(1, 3)], ids=str)
def test_neighbor_sources(layout: Layout) -> None:
    """Head j reads the neighbour one step back along axis j, counted from the last; corners average what exists."""
    order, prefix = orders.neighbors(layout), 2
    plan = neighbor_plan(order, prefix)
    index = {tuple(coord): i for i, coord in enumerate(layout.coords.tolist())}
    axes = len(layout.shape)
    for place, position in enumerate(order.permutation.tolist()):
        coord = layout.coords[position].tolist()
        back: list[Any] = []
        for axis in reversed(range(axes)):
            neighbour = list(coord)
            neighbour[axis] -= 1
            back.append(index.get(tuple(neighbour)))
        existing = [item for item in back if item is not None]
        for head, neighbour in enumerate(back):
            weight = plan.weights[head, place].item()
            if not any(coord):
                assert weight == pytest.approx(1 / axes) and plan.sources[head, place] == prefix - 1
            elif neighbour is None:
                assert weight == 0
            else:
                assert weight == pytest.approx(1 / len(existing))
                assert plan.position[plan.sources[head, place]] == neighbour


def test_plans_are_cached() -> None:
    order = orders.raster(Layout.line(4))
    assert token_plan(order, 1) is token_plan(orders.raster(Layout.line(4)), 1)
    assert token_plan(order, 1) is not token_plan(order, 2)


def test_cache_never_grows_by_queries() -> None:
    plan = query_plan(orders.random(Layout.line(9), 3, 0), 2)
    held = [sum(plan.committed[:step]) for step in range(4)]
    assert all(before <= after for before, after in pairwise(held))
    assert held[-1] + len(plan.steps[-1].positions) == 2 + 9


def test_plans_refuse_other_orders() -> None:
    with pytest.raises(
        TokenloomError, match=r"one position a step.*scales.*5 positions in 2 steps.*NextBlock"
    ):
        token_plan(orders.scales(Layout.scales([1, 2])), 1)
    with pytest.raises(TokenloomError, match=r"needs the order 'neighbors', got raster"):
        neighbor_plan(orders.raster(Layout.grid(2, 2)), 1)


def test_group_plan_by_hand() -> None:
    """Three groups of two with one prefix row: prefix, four tokens, then the learned row of the first group."""
    plan = group_plan(orders.blocks(Layout.line(6), 2, sequential_first=True), 1)
    assert [feed.tolist() for feed in plan.feeds] == [[0], [1], [2, 5], [3, 4]]
    assert plan.committed == (1, 1, 2, 2) and plan.capacity == 6
    assert plan.sources.tolist() == [[0, 1, 2, 5, 3, 4]]
    assert plan.position.tolist() == [-1, 0, 1, 2, 3, -1]
    assert plan.place.tolist() == [0, 1, 2, 4, 5, 3] and plan.vectors.tolist() == [0]
    assert plan.mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 1],
    ]
    assert [step.learned.tolist() for step in plan.steps] == [[], [], [0], []]
    assert all(step.mask is None for step in plan.steps) and plan.predicted.all()


def test_shift_plan_by_hand() -> None:
    plan = shift_plan(orders.blocks(Layout.line(6), 2), 0)
    assert [feed.tolist() for feed in plan.feeds] == [[], [0, 1], [2, 3]]
    assert plan.sources[0, 2:].tolist() == [0, 1, 2, 3]
    assert plan.predicted.tolist() == [False, False, True, True, True, True]
    assert plan.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    "order", [orders.regions(Layout.grid(4, 6), 4), orders.regions(Layout.grid(6, 6), 9)]
)
def test_group_plan_reads_the_same_region(order: Order) -> None:
    """Each position of a later group is predicted by the row of its own region one step earlier."""
    plan, size = group_plan(order, 2), order.layout.size
    group = order.slices[-1].stop - order.slices[-1].start
    for place in range(2 * group, size):
        assert plan.position[plan.sources[0, place]] == order.permutation[place - group]
    for index, step in enumerate(plan.steps):
        assert set(plan.sources[0, order.slices[index]].tolist()) <= set(step.rows.tolist())
    assert sorted(plan.place.tolist()) == list(range(plan.rows))


@pytest.mark.parametrize(
    ("plan", "order", "message"),
    [
        (group_plan, orders.blocks(Layout.line(6), 2), "n single positions and then groups of n"),
        (group_plan, orders.neighbors(Layout.grid(3, 3)), "n single positions"),
        (shift_plan, orders.regions(Layout.grid(4, 4), 4), "two or more steps of equal size"),
        (shift_plan, orders.blocks(Layout.line(4), 4), "two or more steps"),
    ],
)
def test_orders_that_do_not_fit(plan: Any, order: Order, message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        plan(order, 1)
