"""Layouts: coordinates, value semantics, configuration round trip, errors."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.errors import TokenloomError
from tokenloom.layouts import Layout, _coords

SIDES = st.integers(1, 5)
LAYOUTS = st.one_of(
    st.builds(Layout.line, SIDES),
    st.builds(Layout.grid, SIDES, SIDES),
    st.builds(Layout.scales, st.lists(st.one_of(SIDES, st.tuples(SIDES, SIDES)), min_size=1, max_size=4)),
    st.builds(Layout.frames, SIDES, SIDES),
    st.builds(Layout.clip, SIDES, SIDES, SIDES),
)


def test_each_kind_has_the_documented_axes_and_raster_coordinates():
    assert Layout.line(2).axes == ("position",)
    assert Layout.line(2).coords.tolist() == [[0], [1]]
    assert Layout.grid(2, 2).axes == ("row", "column")
    assert Layout.grid(2, 2).coords.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert Layout.frames(2, 2).axes == ("time", "codebook")
    assert Layout.frames(2, 2).coords.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert Layout.clip(2, 1, 2).axes == ("time", "row", "column")
    assert Layout.clip(2, 1, 2).coords.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert Layout.scales([1, (1, 2)]).axes == ("scale", "row", "column")
    assert Layout.scales([1, (1, 2)]).coords.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_published_sizes():
    assert Layout.scales([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]).size == 680
    assert Layout.clip(5, 16, 16).size == 1280
    assert Layout.frames(75, 8).size == 600


@settings(deadline=None)
@given(LAYOUTS)
def test_coordinates_are_unique_sorted_and_in_range(layout: Layout):
    coords = layout.coords
    assert coords.shape == (layout.size, len(layout.axes))
    assert coords.dtype == torch.int64
    rows = coords.tolist()
    assert rows == sorted(rows)
    assert len({tuple(row) for row in rows}) == layout.size
    if layout.kind != "scales":
        assert layout.size == math.prod(layout.shape)
        assert (coords.amax(0) + 1).tolist() == list(layout.shape)


@settings(deadline=None)
@given(LAYOUTS)
def test_layouts_are_values(layout: Layout):
    layout.coords  # noqa: B018 - fills the cache, which must change nothing below
    config = json.loads(json.dumps(layout.to_config()))
    for twin in (Layout.from_config(config), pickle.loads(pickle.dumps(layout))):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert twin.coords is layout.coords


def test_square_scales_equal_their_pairs():
    assert Layout.scales([1, (2, 2)]) == Layout.scales([(1, 1), 2])
    assert Layout.scales([1, (2, 2)]).shape == (1, 2)
    assert Layout.scales([1, (2, 3)]).maps == ((1, 1), (2, 3))
    assert Layout.grid(2, 3) != Layout.grid(3, 2)
    assert Layout.grid(2, 3) != Layout.frames(2, 3)


def test_coordinates_are_ordinary_cpu_tensors_wherever_they_are_first_asked_for():
    for layout in (Layout.grid(3, 5), Layout.scales([1, 3])):
        _coords.cache_clear()
        with torch.inference_mode(), torch.device("meta"):
            coords = layout.coords
        assert coords.device.type == "cpu"
        assert not coords.is_inference()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Layout.line(0), "positive integer, got 0"),
        (lambda: Layout.grid(4, -1), "positive integer, got -1"),
        (lambda: Layout.grid(4, 2.5), "positive integer, got 2.5"),
        (lambda: Layout.line(True), "positive integer, got True"),
        (lambda: Layout.scales([]), "at least one scale"),
        (lambda: Layout.scales([1, (2, 3, 4)]), "pair"),
        (lambda: Layout.scales(4), "sequence"),
        (lambda: Layout("gird", (2, 2)), "'grid'"),
        (lambda: Layout("grid", (2,)), "one length for each"),
        (lambda: Layout("grid", "22"), "sequence"),
        (lambda: Layout.grid(2, 2).maps, "Only a scales layout"),
        (lambda: Layout.from_config({"kind": "grid"}), "needs the keys"),
        (lambda: Layout.from_config({"kind": "grid", "shpae": [1, 1]}), "'shape'"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(TokenloomError, match=message.replace("(", r"\(")):
        build()


def test_messages_show_the_layout_in_short():
    assert str(Layout.scales([1, (2, 3)])) == "scales(1, (2, 3))"
    assert str(Layout.clip(2, 3, 4)) == "clip(2, 3, 4)"
