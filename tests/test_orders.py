"""Orders: properties that hold for every registered order, published schedules, speed, errors."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pickle
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.errors import TokenloomError
from tokenloom.generators import order as order_module
from tokenloom.generators import orders
from tokenloom.generators.orders import Order
from tokenloom.layouts import Layout

SIDES = st.integers(1, 5)
PAIRS = st.tuples(SIDES, SIDES)
GRIDS = st.builds(Layout.grid, SIDES, SIDES)
CLIPS = st.builds(Layout.clip, SIDES, SIDES, SIDES)
FRAMES = st.builds(Layout.frames, SIDES, SIDES)
SCALES = st.builds(Layout.scales, st.lists(st.one_of(SIDES, PAIRS), min_size=1, max_size=4))
LINES = st.builds(Layout.line, st.integers(1, 30))
ANY = st.one_of(LINES, GRIDS, SCALES, FRAMES, CLIPS)


@st.composite
def block_orders(draw: st.DrawFn) -> Order:
    first = draw(st.booleans())
    if draw(st.booleans()):
        layout = draw(ANY)
        run = draw(st.sampled_from([d for d in range(1, layout.size + 1) if layout.size % d == 0]))
        return orders.blocks(layout, run, sequential_first=first)
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    block = tuple(draw(st.integers(1, 3)) for _ in counts)
    shape = [count * side for count, side in zip(counts, block, strict=True)]
    kinds = {1: [Layout.line], 2: [Layout.grid, Layout.frames], 3: [Layout.clip]}[len(shape)]
    return orders.blocks(draw(st.sampled_from(kinds))(*shape), block, first)


@st.composite
def region_orders(draw: st.DrawFn) -> Order:
    sub = draw(st.integers(1, 3))
    return orders.regions(
        Layout.grid(sub * draw(st.integers(1, 3)), sub * draw(st.integers(1, 3))), n=sub * sub
    )


@st.composite
def random_orders(draw: st.DrawFn) -> Order:
    layout = draw(ANY)
    steps = draw(st.integers(1, layout.size))
    return orders.random(
        layout, steps, draw(st.integers(0, 2**64 - 1)), draw(st.sampled_from(["cosine", "equal"]))
    )


@st.composite
def delay_orders(draw: st.DrawFn) -> Order:
    layout = draw(FRAMES)
    late = st.lists(st.integers(0, 6), min_size=layout.shape[1], max_size=layout.shape[1])
    return orders.delay(layout, draw(st.one_of(st.none(), late)))


@st.composite
def patch_orders(draw: st.DrawFn) -> Order:
    frames, count, books = (draw(st.integers(1, 4)) for _ in range(3))
    inner = draw(st.sampled_from(["coarse_first", "delay", "flat", "parallel"]))
    return orders.patches(Layout.frames(frames * count, books), frames, inner, together=draw(st.booleans()))


def plain_orders(name: str) -> st.SearchStrategy[Order]:
    """Orders without options, on random layouts of every kind that the order accepts."""
    kinds = {Layout.line(4): LINES, Layout.grid(2, 2): GRIDS, Layout.scales([1, 2]): SCALES}
    kinds |= {Layout.frames(2, 2): FRAMES, Layout.clip(2, 2, 2): CLIPS}
    accepted = []
    for example, strategy in kinds.items():
        with contextlib.suppress(TokenloomError):
            orders.build(name, example)
            accepted.append(strategy)
    assert accepted, f"The order {name!r} needs options; give it a strategy in STRATEGIES."
    return st.builds(functools.partial(orders.build, name), st.one_of(accepted))


STRATEGIES = {
    "blocks": block_orders(),
    "coarse_first": st.builds(orders.coarse_first, FRAMES, st.booleans()),
    "delay": delay_orders(),
    "patches": patch_orders(),
    "regions": region_orders(),
    "random": random_orders(),
}

every_order = pytest.mark.parametrize("name", orders.names())


def draw_order(data: st.DataObject, name: str) -> Order:
    order = data.draw(STRATEGIES[name] if name in STRATEGIES else plain_orders(name))
    assert order.name == name
    return order


@every_order
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_permutation_is_a_bijection_sorted_by_step(name, data):
    order = draw_order(data, name)
    everything = torch.arange(order.layout.size)
    assert torch.equal(order.permutation.sort().values, everything)
    assert torch.equal(order.inverse[order.permutation], everything)
    assert torch.equal(order.permutation[order.inverse], everything)
    assert (order.step[order.permutation].diff() >= 0).all()
    for tensor in (order.step, order.permutation, order.inverse):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (order.layout.size,)


@every_order
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_slices_partition_the_positions_by_step(name, data):
    order = draw_order(data, name)
    assert len(order.slices) == order.num_steps
    places = [place for part in order.slices for place in range(part.start, part.stop)]
    assert places == list(range(order.layout.size))
    for step, part in enumerate(order.slices):
        assert part.stop > part.start
        assert order.step[order.permutation[part]].eq(step).all()


@every_order
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_mask_is_step_causal(name, data):
    order = draw_order(data, name)
    mask, step = order.mask(), order.step.tolist()
    assert mask.dtype == torch.bool
    expected = [[key <= query for key in step] for query in step]
    assert mask.tolist() == expected
    in_decode_order = mask[order.permutation][:, order.permutation]
    for (
        part
    ) in order.slices:  # what a static cache shows: everything up to the end of the step, and nothing after
        assert in_decode_order[part, : part.stop].all()
        assert not in_decode_order[part, part.stop :].any()


@every_order
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_orders_are_values(name, data):
    order = draw_order(data, name)
    order.mask()
    config = json.loads(json.dumps(order.to_config()))
    for twin in (
        Order.from_config(config),
        pickle.loads(pickle.dumps(order)),
        orders.build(name, order.layout, **dict(order.options)),
    ):
        assert twin == order
        assert hash(twin) == hash(order)
        assert twin.step is order.step
        assert twin.mask() is order.mask()
        assert torch.equal(twin.permutation, order.permutation)
    assert len(pickle.dumps(order)) < 1000  # no tensors travel with it


def test_raster_is_flat_everywhere():
    for layout in (
        Layout.line(6),
        Layout.grid(2, 3),
        Layout.frames(3, 2),
        Layout.scales([1, 2]),
        Layout.clip(1, 2, 3),
    ):
        assert orders.raster(layout).permutation.tolist() == list(range(layout.size))
        assert orders.raster(layout).num_steps == layout.size
    assert torch.equal(orders.raster(Layout.line(4)).mask(), torch.ones(4, 4).tril().bool())


def test_scales_predicts_one_map_a_step():
    order = orders.scales(Layout.scales([1, 2, (2, 3)]))
    assert order.slices == (slice(0, 1), slice(1, 5), slice(5, 11))
    assert order.permutation.tolist() == list(range(11))


def test_neighbors_follow_diagonals_by_increasing_row():
    order = orders.neighbors(Layout.grid(3, 3))
    assert order.permutation.tolist() == [0, 1, 3, 2, 4, 6, 5, 7, 8]
    assert [part.stop - part.start for part in order.slices] == [1, 2, 3, 2, 1]
    for side, steps in ((16, 31), (32, 63)):
        assert orders.neighbors(Layout.grid(side, side)).num_steps == steps


def test_neighbors_of_a_clip_follow_planes():
    layout = Layout.clip(4, 16, 16)
    order = orders.neighbors(layout)
    assert order.num_steps == 4 + 16 + 16 - 2
    assert torch.equal(order.step, layout.coords.sum(1))
    second = layout.coords[order.permutation[order.slices[1]]].tolist()
    assert second == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_blocks_cut_cells_rows_and_frames():
    cells = orders.blocks(Layout.grid(4, 4), (2, 2))
    assert cells.permutation.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert cells.num_steps == 4
    rows = orders.blocks(Layout.grid(3, 4), (1, 4))
    assert (
        rows.step.tolist() == orders.blocks(Layout.grid(3, 4), 4).step.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )
    clip = Layout.clip(5, 16, 16)
    assert orders.blocks(clip, (1, 16, 16)).num_steps == 5
    assert torch.equal(orders.blocks(clip, (1, 1, 16)).step, orders.blocks(clip, 16).step)
    frames = orders.blocks(Layout.frames(3, 2), (1, 2))
    assert frames.step.tolist() == [0, 0, 1, 1, 2, 2]


def test_hybrid_block_schedule_has_the_published_number_of_steps():
    order = orders.blocks(Layout.clip(5, 16, 16), (1, 1, 16), sequential_first=True)
    assert order.num_steps == 95  # 16 single tokens and 79 blocks
    assert order.step[:17].tolist() == list(range(17))
    assert order.slices[16] == slice(16, 32)
    cells = orders.blocks(Layout.grid(4, 4), (2, 2), sequential_first=True)
    assert cells.permutation[:4].tolist() == [0, 1, 4, 5]
    assert cells.num_steps == 7


@pytest.mark.parametrize(
    ("side", "n", "steps"), [(24, 4, 147), (24, 16, 51), (4, 4, 7), (6, 1, 36), (4, 16, 16)]
)
def test_regions_reproduce_the_reshape_of_parallel_generation(side, n, steps):
    order = orders.regions(Layout.grid(side, side), n)
    sub = math.isqrt(n)
    codes = torch.arange(side * side).view(1, sub, side // sub, sub, side // sub)
    assert torch.equal(order.permutation, codes.permute(0, 2, 4, 1, 3).flatten())
    assert order.num_steps == steps
    sizes = [part.stop - part.start for part in order.slices]
    assert sizes == [1] * n + [n] * (side * side // n - 1)


def test_delay_shifts_each_codebook_by_one_step():
    order = orders.delay(Layout.frames(4, 3))
    assert order.step.view(4, 3).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert order.num_steps == 4 + 3 - 1
    in_step = Layout.frames(4, 3).coords[order.permutation[order.slices[2]]].tolist()
    assert in_step == [[2, 0], [1, 1], [0, 2]]  # increasing codebook


def test_delays_of_their_own():
    layout = Layout.frames(3, 3)
    assert orders.delay(layout, (0, 1, 2)).step.tolist() == orders.delay(layout).step.tolist()
    assert orders.delay(layout, [0, 1, 1]).step.view(3, 3).tolist() == [[0, 1, 1], [1, 2, 2], [2, 3, 3]]
    assert orders.delay(Layout.frames(1, 2), (0, 5)).step.tolist() == [0, 1]  # no empty steps


def test_patches_come_one_after_the_other():
    order = orders.patches(Layout.frames(4, 3), 2)
    assert order.step.view(4, 3).tolist() == [[0, 1, 2], [1, 2, 3], [4, 5, 6], [5, 6, 7]]
    whole = orders.patches(Layout.frames(4, 3), 4, "coarse_first")
    assert torch.equal(whole.step, orders.coarse_first(Layout.frames(4, 3)).step)
    assert torch.equal(whole.permutation, orders.coarse_first(Layout.frames(4, 3)).permutation)


def test_orders_of_codec_frames():
    layout = Layout.frames(3, 2)
    assert orders.flat(layout).step.view(3, 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert orders.parallel(layout).step.view(3, 2).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert orders.coarse_first(layout).step.view(3, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    together = orders.coarse_first(Layout.frames(3, 4), together=True)
    assert together.step.view(3, 4).tolist() == [[0, 3, 3, 3], [1, 4, 4, 4], [2, 5, 5, 5]]
    assert torch.equal(orders.parallel(layout).step, orders.blocks(layout, (1, 2)).step)


def test_random_is_frozen_for_a_seed():
    layout = Layout.grid(4, 4)
    assert orders.random(layout, 4, 0).step.tolist() == [3, 2, 0, 2, 1, 0, 3, 1, 2, 3, 2, 2, 3, 1, 3, 3]
    assert orders.random(layout, 16, 1, "equal").step.argsort().tolist() == [
        12, 5, 2, 4, 13, 0, 8, 10, 1, 3, 14, 9, 6, 15, 11, 7,
    ]  # fmt: skip
    assert orders.random(layout, 4, 0) != orders.random(layout, 4, 1)


def test_random_schedules():
    def sizes(*arguments):
        return [part.stop - part.start for part in orders.random(*arguments).slices]

    assert sizes(Layout.line(10), 4, 0, "equal") == [3, 3, 2, 2]
    published = sizes(Layout.line(256), 8, 0)
    left = [math.floor(256 * math.cos(math.pi / 2 * step / 8) + 1e-6) for step in range(9)]
    assert published == [left[i] - left[i + 1] for i in range(8)]
    assert sizes(Layout.line(4), 3, 0) == [1, 1, 2]
    assert sizes(Layout.line(5), 5, 0) == [1] * 5
    third = sizes(Layout.line(300), 3, 0)
    assert third[2] == 150  # cos(pi / 3) is exactly one half: no library's rounding may move it


def test_random_positions_are_spread_evenly():
    """Over many seeds every position is equally likely to come first."""
    layout = Layout.line(8)
    first = torch.tensor([int(orders.random(layout, 8, seed, "equal").permutation[0]) for seed in range(400)])
    counts = first.bincount(minlength=8).double()
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_a_new_order_is_one_function():
    def backwards(layout):
        return torch.arange(layout.size).flip(0)

    constructor = orders.register(backwards)
    try:
        order = constructor(Layout.line(3))
        assert order == orders.build("backwards", Layout.line(3))
        assert order.permutation.tolist() == [2, 1, 0]
        assert "backwards" in orders.names()
        with pytest.raises(TokenloomError, match="exists already"):
            orders.register(backwards)
    finally:
        del order_module._REGISTRY["backwards"]


@pytest.mark.parametrize(
    "steps",
    [
        lambda n: torch.arange(n) * 2,
        lambda n: torch.arange(n) - 1,
        lambda n: torch.arange(n).float(),
        torch.ones,
    ],
)
def test_a_function_that_breaks_its_promise_is_refused(steps):
    def broken(layout):
        return steps(layout.size)

    orders.register(broken)
    try:
        with pytest.raises(TokenloomError, match="'broken' must"):
            orders.build("broken", Layout.line(3))
    finally:
        del order_module._REGISTRY["broken"]


def test_a_large_order_is_built_in_milliseconds():
    layout = Layout.grid(32, 32)
    best = math.inf
    for _ in range(20):
        order_module._plan.cache_clear()
        start = time.perf_counter()
        order = orders.neighbors(layout)
        parts = (order.permutation, order.inverse, order.slices)
        best = min(best, time.perf_counter() - start)
        assert len(parts[2]) == 63
    assert best < 5e-3


def test_cached_tensors_are_ordinary_cpu_tensors():
    for build in (lambda: orders.regions(Layout.grid(4, 4), 4), lambda: orders.random(Layout.line(9), 3, 2)):
        order_module._plan.cache_clear()
        order_module._mask.cache_clear()
        with torch.inference_mode(), torch.device("meta"):
            order = build()
            tensors = (order.step, order.permutation, order.inverse, order.mask())
        for tensor in tensors:
            assert tensor.device.type == "cpu"
            assert not tensor.is_inference()


def test_defaults_and_json_lists_make_no_difference():
    layout = Layout.grid(4, 4)
    assert orders.blocks(layout, [2, 2]) == orders.blocks(layout, block=(2, 2), sequential_first=False)
    assert Order(layout, "blocks", {"block": (2, 2)}) == orders.blocks(layout, (2, 2))
    assert orders.random(layout, steps=2, seed=3) == orders.random(layout, 2, 3, "cosine")
    assert orders.random(layout, torch.tensor(2), 3) == orders.random(layout, 2, 3)
    assert str(orders.blocks(layout, (2, 2))) == "blocks(grid(4, 4), block=(2, 2), sequential_first=False)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: orders.build("neighbours", Layout.grid(2, 2)), "Did you mean 'neighbors'"),
        (lambda: orders.neighbors(Layout.line(4)), "needs a grid or clip layout, got line.*Layout.grid"),
        (lambda: orders.neighbors(Layout.scales([1, 2])), "needs a grid or clip"),
        (lambda: orders.scales(Layout.grid(2, 2)), "needs a scales layout"),
        (lambda: orders.delay(Layout.grid(2, 2)), "needs a frames layout"),
        (lambda: orders.delay(Layout.frames(2, 2), (0,)), "2 integers of at least 0"),
        (lambda: orders.delay(Layout.frames(2, 2), (0, -1)), "2 integers of at least 0"),
        (lambda: orders.patches(Layout.frames(4, 2), 3), "do not divide.*Use 1, 2, 4"),
        (lambda: orders.patches(Layout.frames(4, 2), 2, "flatt"), "'flat'"),
        (lambda: orders.flat(Layout.line(4)), "needs a frames layout.*raster"),
        (lambda: orders.parallel(Layout.line(4)), "needs a frames layout"),
        (lambda: orders.coarse_first(Layout.line(4)), "needs a frames layout"),
        (lambda: orders.regions(Layout.clip(1, 2, 2), 4), "needs a grid layout"),
        (lambda: orders.regions(Layout.grid(8, 8), 8), "square, got n=8. Use 4 or 9"),
        (lambda: orders.regions(Layout.grid(8, 8), 9), "do not tile grid.*Use n = 1, 4, 16, 64"),
        (lambda: orders.regions(Layout.grid(8, 8), 0), "from 1 to 64, got 0"),
        (
            lambda: orders.blocks(Layout.line(12), 5),
            "does not divide the 12 positions.*Use 1, 2, 3, 4, 6, 12",
        ),
        (lambda: orders.blocks(Layout.grid(4, 6), (2, 4)), "divide the axis 'column'.*Use 1, 2, 3, 6"),
        (lambda: orders.blocks(Layout.grid(4, 6), (2,)), "one length for each"),
        (lambda: orders.blocks(Layout.grid(4, 6), (2, 8)), "from 1 to 6, got 8"),
        (lambda: orders.blocks(Layout.scales([2, 2]), (1, 2, 2)), "do not fit the maps"),
        (lambda: orders.blocks(Layout.line(4), "2"), "from 1 to 4, got '2'"),
        (lambda: orders.blocks(Layout.line(4)), "takes the options.*'block'"),
        (lambda: orders.blocks(Layout.line(4), 2, False, 1), "3 positional"),
        (lambda: orders.blocks(Layout.line(4), 2, block=2), "'block' twice"),
        (lambda: orders.blocks(Layout.line(4), object()), "must be a number"),
        (lambda: orders.build("blocks", Layout.line(4), blok=2), "Did you mean 'block'"),
        (lambda: orders.random(Layout.line(4), 5, 0), "from 1 to 4, got 5"),
        (lambda: orders.random(Layout.line(4), 2, -1), "seed"),
        (lambda: orders.random(Layout.line(4), 2, 0, "cosin"), "'cosine'"),
        (lambda: orders.raster("grid"), "needs a Layout"),
        (lambda: Order.from_config({"name": "raster"}), "needs the keys"),
        (lambda: Order.from_config({"name": "raster", "layuot": {}}), "'layout'"),
    ],
)
def test_mistakes_are_named_with_the_fix(build, message):
    with pytest.raises(TokenloomError, match=message):
        build()
